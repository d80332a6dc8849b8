"""An edit: what was done to a model, so that it can be reverted, repeated, saved and exported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from rocr.concepts import Concept
from rocr.edit.apply import apply_edit, mismatch, revert_edit
from rocr.edit.compose import merge_edits, remove_concepts
from rocr.edit.file import load_edit, save_edit
from rocr.edit.guards import Guards
from rocr.edit.lora import AdapterLayer, export_lora
from rocr.edit.record import EditRecord
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import ProgressCallback, silent
from rocr.statistics.statistics import Statistics


@dataclass
class Edit(EditRecord):
    """The redirection of some concepts in one model; its fields are those of `EditRecord`."""

    @plain_arithmetic()
    def revert(self, model: nn.Module) -> None:
        """Give the model back the weights it had before this edit, bit for bit.

        Raises:
            VerificationError: a weight is not as this edit left it; nothing is changed.
            InputError: the edit was saved without what undoes it.
        """
        revert_edit(self, model)

    @plain_arithmetic()
    def apply(self, model: nn.Module, allow_fingerprint_mismatch: bool = False) -> None:
        """Put the edit onto another copy of the model it was made for, or back onto the same.

        Raises:
            InputError: it is another model, unless a mismatch is allowed; or it holds this edit already.
            GuardError: a weight would overflow; the model is left as it was.
        """
        apply_edit(self, model, allow_fingerprint_mismatch)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with this edit inside the context, and without it after."""
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    @plain_arithmetic()
    def remove(self, names: str | Sequence[str], model: nn.Module | None = None) -> Edit:
        """The edit without some of its concepts, solved again from what it holds: no text, no statistics.

        What it equals, to rounding: the same solve without the removed concepts' keys. That is the edit that
        `unlearn` makes of the remaining concepts alone where their keys and residuals were measured before any
        weight changed: always in the first edited layer, so in edits of one layer, and in every layer with
        `EditConfig(measure="once")`. With "each", the keys and residuals of later layers were measured in a model
        in which the removed concepts were redirected already, and keep that trace: nothing but measuring them
        again (`revert`, then `unlearn`) takes it out. Settings that the number of concepts chose stay as they were;
        where it would now choose others, no layer is equal. `report.inexact` names the layers that are not.

        Args:
            names: names or aliases of the concepts to remove.
            model: the model this edit is applied to, which then carries the new one instead; None: only solve.

        Raises:
            InputError: a name is not in the edit, none would be left, or the edit lacks what it is solved from.
            VerificationError: the model is neither as this edit left it nor as it was before.
        """
        return remove_concepts(self, names, model)

    @plain_arithmetic()
    def add(
        self,
        concepts: Sequence[Concept],
        model: nn.Module,
        tokenizer: Any,
        statistics: Statistics,
        progress: ProgressCallback = silent,
        guards: Guards | None = None,
    ) -> Edit:
        """The edit with further concepts, applied to the model in place of this one.

        The concepts already there are not read again: their stored keys and residuals are solved together with the
        new ones. It equals `unlearn` of all of them under the same conditions as `remove`.

        Args:
            concepts: the new ones.
            model: with this edit or without it, and with no other.
            tokenizer: of the model.
            statistics: those that this edit was made with.
            progress: told how far each stage is.
            guards: the limits that the whole edit must stay within; None: `Guards()`.

        Raises:
            InputError: a concept is there already, or model, statistics or rendered templates differ from the edit's.
            VerificationError: the model carries another edit.
            GuardError: as `unlearn`. On any exception the model is as it was.
        """
        # Through the package: adding concepts is unlearning, which makes edits and so is imported after them.
        from rocr import add_concepts

        return add_concepts(self, concepts, model, tokenizer, statistics, progress, guards)

    @plain_arithmetic()
    def merge(self, other: Edit, model: nn.Module | None = None) -> Edit:
        """One edit of the concepts of two that were made, each by itself, on the same unedited model.

        Solved together, each one's keys are protected from the other, which edits applied one after the other do
        not give. Either order gives the same update to rounding, and under the conditions of `remove` it equals
        `unlearn` of all concepts. Applied one after the other instead, edits simply add up: in any order to
        rounding, and `revert`, which is exact, takes them off in the reverse order only.

        Args:
            other: the second edit, of the same layers, settings and statistics.
            model: the model this edit is applied to, and the other not, or neither; None: only solve.

        Raises:
            InputError: models, settings, layers or statistics differ, both hold a concept, or one was made in a model
                that carried the other.
            VerificationError: the model is neither as this edit left it nor as it was before.
        """
        return merge_edits(self, other, model)

    @plain_arithmetic()
    def save(self, path: str | os.PathLike[str], undo: bool = True, overwrite: bool = False) -> None:
        """Write one safetensors file.

        Args:
            path: the file.
            undo: whether it holds what restores the first weights bit for bit.
            overwrite: whether a file that is there is replaced.

        Raises:
            InputError: the file exists and `overwrite` is not set.
            RocrError: it cannot be written.
        """
        save_edit(self, path, undo, overwrite)

    @classmethod
    @plain_arithmetic()
    def load(cls, path: str | os.PathLike[str]) -> Edit:
        """Read a file that `save` wrote.

        Raises:
            InputError: it is missing, damaged, or not an edit file.
        """
        return cls(**vars(load_edit(path)))

    @plain_arithmetic()
    def export_lora(
        self, path: str | os.PathLike[str], rank: int | None = None, overwrite: bool = False
    ) -> list[AdapterLayer]:
        """Write the edit as a PEFT adapter: a folder that peft and vLLM load without rocr.

        Its rank at a layer is the number of keys, or the size of the weight where that is smaller. vLLM takes ranks
        up to its `max_lora_rank`: 16 unless set, 512 at most (`rocr.edit.lora.VLLM_RANKS`).

        Args:
            path: the folder.
            rank: the largest rank wanted, for which as little as possible is left out at the concepts' keys; None:
                nothing is left out.
            overwrite: whether a folder that is there is replaced.

        Returns:
            For each layer its rank, and what a smaller one left out.

        Raises:
            InputError: the folder exists and `overwrite` is not set, the rank is none, or the disk is too small.
            RocrError: it cannot be written.
        """
        return export_lora(self, path, rank, overwrite)

    @plain_arithmetic()
    def mismatch(self, model: nn.Module) -> str | None:
        """Describe how the model differs from the one that the edit was made for; None where it does not."""
        return mismatch(self, model)
