"""An edit of a model, which can be applied, reverted, changed, saved and exported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from rocr.concepts import Concept
from rocr.edit.apply import apply_edit, mismatch, revert_edit, without_edit
from rocr.edit.compose import merge_edits, remove_concepts
from rocr.edit.file import load_edit, save_edit
from rocr.edit.guards import Guards
from rocr.edit.lora import AdapterLayer, export_lora
from rocr.edit.record import EditRecord
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import ProgressCallback, silent
from rocr.statistics.statistics import Statistics


@dataclass(repr=False)
class Edit(EditRecord):
    """An edit: the updates that redirect some concepts in one model.

    `rocr.unlearn` returns it, and `load` reads it from a file.

    Attributes:
        concepts: The concepts and their redirects.
        config: The settings, with the layers that are edited.
        fingerprint: Digests of the model and the tokenizer that the edit was made for.
        updates: One update per edited layer, in ascending order: left (d_out, r) and right (r, d_in), float32.
        concept_of: For each key (row of `keys` of an update), the index of its concept.
        report: Measurements, see `EditReport`.
        computed_with: Settings of the model that the keys depend on. Empty if they are not known.
        rendered: The templates of the settings as the model reads them. Empty if they are not known.
        model_type: The type of the whole model, by whose rules peft renames the adapters of experts. None for an edit
            of dense layers.
        retained: For each row of a retained name in the systems of the updates, to whom it belongs.
    """

    @plain_arithmetic()
    def revert(self, model: nn.Module) -> None:
        """Restore the weights that the model had before this edit, bit for bit.

        Args:
            model: A model that has this edit, and no later one, applied. It is changed in place.

        Raises:
            VerificationError: A weight differs from the one after this edit; no weight is changed.
            InputError: The edit was saved without undo data, or the model has other layers.
        """
        revert_edit(self, model)

    @plain_arithmetic()
    def apply(self, model: nn.Module, allow_fingerprint_mismatch: bool = False) -> None:
        """Apply the edit to a copy of the model that it was made for, or again to the same model.

        Args:
            model: The model, without this edit. It is changed in place: Δ is added to each edited weight and rounded
                once to the dtype of the weight.
            allow_fingerprint_mismatch: Whether the model may differ from the one that the edit was made for, as a
                close relative with the same shapes does.

        Raises:
            InputError: The model is not the one that the edit was made for, or has the edit applied already.
            GuardError: A weight would overflow; no weight is changed.
        """
        apply_edit(self, model, allow_fingerprint_mismatch)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Return a context in which the model has this edit applied; raises as `apply` and `revert`."""
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    @contextmanager
    def reverted(self, model: nn.Module) -> Iterator[nn.Module]:
        """Return a context in which a model with this edit has the weights before it; raises as `revert`.

        Both changes flip the recorded bits, so that the weights at the end are those at the beginning, bit for bit.
        Raises VerificationError at the end if the block has changed an edited weight.
        """
        with without_edit(self, model):
            yield model

    @plain_arithmetic()
    def remove(self, names: str | Sequence[str], model: nn.Module | None = None) -> Edit:
        """Return the edit without some of its concepts, solved again from what the edit holds.

        Neither text nor statistics are needed. The result equals, up to rounding, the same solve without the keys of
        the removed concepts. That is the edit that `unlearn` makes of the remaining concepts alone if their keys and
        residuals were measured before any weight changed: in the first edited layer, and with
        `EditConfig(measure="once")` in all layers, with the names that remain retained: rows of retained names go with
        the concepts that they were chosen for, and are not chosen again. With "each", keys and residuals of later
        layers were measured in a model in which the removed concepts were already redirected; to measure them again,
        revert the edit and call `unlearn`. Settings that were chosen by the number of concepts keep their values; if
        other values are the default for the new number, no layer is equal. `report.inexact` lists the layers that are
        not equal.

        Args:
            names: Names or aliases of the concepts to remove.
            model: The model that has this edit applied, or neither edit. It then has the new edit applied instead.
                None only solves.

        Returns:
            The new edit. This one stays as it is.

        Raises:
            InputError: A name is not in the edit, no concept would be left, or the edit was saved without its systems.
            VerificationError: The weights of the model match neither those after this edit nor those before it.
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
        """Return the edit with further concepts, applied to the model in place of this one.

        The stored keys and residuals of the concepts in the edit are solved together with those of the new ones, and
        are not measured again. The result equals `unlearn` of all concepts under the same conditions as for `remove`.

        Args:
            concepts: The new concepts.
            model: The model with this edit applied, or with no edit. It is changed in place.
            tokenizer: Its tokenizer.
            statistics: The statistics that this edit was made with.
            progress: Called with the progress of each stage.
            guards: The limits that the whole edit must stay within. None is `Guards()`.

        Returns:
            The new edit. This one stays as it is.

        Raises:
            InputError: A concept is in the edit already, or model, statistics or rendered templates differ from those
                of the edit.
            VerificationError: The model has another edit applied.
            GuardError: As `unlearn`. After any exception the model has its former weights, bit for bit.
        """
        # Imported here, since `rocr.unlearn` imports this module.
        from rocr import add_concepts

        return add_concepts(self, concepts, model, tokenizer, statistics, progress, guards)

    @plain_arithmetic()
    def merge(self, other: Edit, model: nn.Module | None = None) -> Edit:
        """Return one edit of the concepts of two edits that were made, each by itself, on the same unedited model.

        The concepts are solved together, so that the update of each is protected from the keys of the others. Edits
        that are applied one after the other are not: they only add up. Both orders give the same update up to
        rounding, and the result equals `unlearn` of all concepts under the conditions of `remove`.

        Args:
            other: The second edit, with the same layers, settings and statistics.
            model: The model that has this edit applied, and not the other one, or neither. It then has the new edit
                applied instead. None only solves.

        Returns:
            The new edit. Both others stay as they are.

        Raises:
            InputError: Models, settings, layers or statistics differ, a concept is in both edits, or one edit was made
                in a model that had the other one applied.
            VerificationError: The weights of the model match neither those after this edit nor those before it.
        """
        return merge_edits(self, other, model)

    @plain_arithmetic()
    def save(self, path: str | os.PathLike[str], undo: bool = True, overwrite: bool = False) -> None:
        """Write the edit to one safetensors file, completely or not at all.

        Args:
            path: The file.
            undo: Whether to include the undo data, without which a loaded edit cannot be reverted.
            overwrite: Whether to replace an existing file.

        Raises:
            InputError: The file exists and `overwrite` is not set.
            RocrError: The file cannot be written.
        """
        save_edit(self, path, undo, overwrite)

    @classmethod
    @plain_arithmetic()
    def load(cls, path: str | os.PathLike[str]) -> Edit:
        """Read an edit from a file that `save` or `rocr unlearn` wrote.

        Args:
            path: The file. No code in it is run.

        Raises:
            InputError: The file is missing, damaged, or not an edit file.
        """
        return cls(**vars(load_edit(path)))

    @plain_arithmetic()
    def export_lora(
        self, path: str | os.PathLike[str], rank: int | None = None, overwrite: bool = False
    ) -> list[AdapterLayer]:
        """Write the edit as a PEFT adapter: a folder that peft and vLLM load without rocr.

        Without a smaller `rank`, the rank at a layer is the number of keys, or min(d_out, d_in) if that is smaller.
        vLLM supports ranks up to its setting `max_lora_rank`: 16 by default, at most 512 (`rocr.edit.lora.VLLM_RANKS`).

        Args:
            path: The folder.
            rank: Largest rank. Of all updates of this rank, the adapter has the one with the smallest error at the
                concepts' keys. None leaves nothing out.
            overwrite: Whether to replace an existing folder.

        Returns:
            One `AdapterLayer` per layer, with its rank and truncation errors.

        Raises:
            InputError: The folder exists and `overwrite` is not set, the rank is not a whole number of at least 1, or
                there is too little free disk space.
            RocrError: The folder cannot be written.
        """
        return export_lora(self, path, rank, overwrite)

    @plain_arithmetic()
    def mismatch(self, model: nn.Module) -> str | None:
        """Return a sentence on how the model differs from the one that the edit was made for; None if it does not."""
        return mismatch(self, model)
