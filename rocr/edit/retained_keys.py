"""The keys of retained names, at which an update keeps the outputs: rows of its systems with a residual of 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept, folded
from rocr.config import EditConfig
from rocr.edit.controls import MAX_CONTROLS, PER_CONCEPT, load_names, without_concepts
from rocr.edit.record import EditRecord, RetainedKey
from rocr.edit.retain_impact import RetainedNames
from rocr.edit.task import LayerSystem, Task
from rocr.errors import GuardError
from rocr.io.json_values import list_of, text_of, whole_number_of
from rocr.keys.plan import plan_names
from rocr.keys.read import States
from rocr.model.kind import LANGUAGE_MODEL, ModelKind

SHARED = 0.999
"""Keys with at least this cosine in the first edited layer are those of the same tokens. Rounding in batches of another
size costs about 1e-4."""

SAMPLED = 20
"""One of so many names of the package's list is read to expect the number of keys."""
MAX_KEYS = 100_000
"""Largest number of keys of one retained name in a file."""


@dataclass(frozen=True)
class RetainedKeys:
    """The keys of retained names in an edit: those that its base edit holds, then its own.

    Attributes:
        labels: For each key, to whom it belongs.
        base_rows: Indices of the rows of the base edit that are kept.
        own_rows: Indices of the rows of `states` that are added.
        states: For each edited layer, the states of the retained names in the unedited model.
        weight: The weight of a key.
    """

    labels: list[RetainedKey]
    base_rows: list[int]
    own_rows: list[int]
    states: Mapping[int, States]
    weight: float

    @classmethod
    def of(cls, task: Task, retained: RetainedNames | None) -> RetainedKeys:
        """Choose the keys: of the names that the caller gave, or of the controls, but not of the redirects.

        Keys of the base edit whose name is now unlearned are left out, and names that the base edit retains already.
        """
        base = () if task.base_edit is None else task.base_edit.retained
        base_rows = retained_apart(base, task.concepts)
        labels = [base[row] for row in base_rows]
        own_rows: list[int] = []
        if retained is not None and task.config.retain_weight > 0:
            index = {concept.name: i for i, concept in enumerate(task.all_concepts)}
            owners = {control.name: (index[control.concept],) for control in retained.controls}
            held = {folded(label.name) for label in labels}
            for row, i in enumerate(retained.name_of):
                name = retained.names[i]
                if (retained.given or name in owners) and folded(name) not in held:
                    own_rows.append(row)
                    labels.append(RetainedKey(name, owners.get(name, ())))
        states = {} if retained is None else retained.states
        return cls(labels, base_rows, own_rows, states, task.config.retain_weight)

    def rows(self, task: Task, layer: int, system: LayerSystem) -> Tensor | None:
        """Return the keys of a layer times the root of their weight, (h, columns of the system).

        None if there are none.

        Raises:
            GuardError: A key is not finite.
        """
        if not self.labels:
            return None
        found = [system.keys[:0]]
        if self.base_rows:
            assert task.base_edit is not None
            base = next(update for update in task.base_edit.updates if update.layer == layer)
            assert base.system is not None and base.system.retained is not None, "an edit with retained keys has rows"
            held = base.system.retained.keys[self.base_rows].to(system.keys)
            found.append(system.blocks.arranged(held, base.blocks, system.touched))
        if self.own_rows:
            states = self.states[layer]
            assert states.keys is not None, "keys were read"
            own = states.keys[self.own_rows].to(system.keys) * math.sqrt(self.weight)
            found.append(system.blocks.arranged(own, states.blocks, system.touched))
        rows = torch.cat(found)
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise GuardError(
                f"The keys of the retained name {self.labels[bad[0]].name!r} at layer {layer} are not finite: the "
                "model overflows there. The model is unchanged; load it in float32 or bfloat16."
            )
        return rows


def expected_keys(
    tokenizer: Any,
    concepts: Sequence[Concept],
    config: EditConfig,
    names: Sequence[str] | None,
    kind: ModelKind = LANGUAGE_MODEL,
) -> int:
    """Return the number of keys that an edit is expected to retain in a layer, before the model is known.

    It is that of the given names and of the largest number of controls, with as many keys each as the mean of some
    listed names. A model that knows no names has no controls.

    Args:
        tokenizer: The tokenizer.
        concepts: The concepts.
        config: The settings.
        names: The names that the caller gives, as for `rocr.unlearn`.
        kind: The kind of the model.
    """
    if not config.retain_weight or not kind.writes_text or (names is not None and not names):
        return 0
    sample = list(load_names())[::SAMPLED]
    keys = len(plan_names(tokenizer, sample, config, kind)[1]) / len(sample)
    given = len(plan_names(tokenizer, names, config, kind)[1]) if names else 0
    return given + round(keys * min(PER_CONCEPT * len(concepts), MAX_CONTROLS))


def rows_apart(retained: Tensor, keys: Tensor) -> Tensor:
    """Return (h,) whether each row of a retained name differs from all keys of the concepts, in the first edited layer.

    Names that begin alike have the same key at their common beginning, which the concept's own row decides.

    Args:
        retained: (h, d_in) rows of retained names.
        keys: (n, d_in) keys of the concepts.
    """
    rows, others = (values / values.norm(dim=1, keepdim=True).clamp(min=1e-30) for values in (retained, keys))
    cosines: Tensor = rows @ others.to(rows).T
    return cosines.amax(dim=1) < SHARED


def retained_apart(labels: Sequence[RetainedKey], concepts: Sequence[Concept]) -> list[int]:
    """Return the indices of the retained keys whose name is not that of one of some concepts or its redirect."""
    apart = set(without_concepts([label.name for label in labels], concepts))
    return [row for row, label in enumerate(labels) if label.name in apart]


def of_remaining(labels: Sequence[RetainedKey], new_index: Mapping[int, int]) -> dict[int, RetainedKey]:
    """Return by row the retained keys of the concepts that remain, with the concepts' new indices."""
    kept = {}
    for row, label in enumerate(labels):
        concepts = tuple(new_index[concept] for concept in label.concepts if concept in new_index)
        if concepts or not label.concepts:
            kept[row] = replace(label, concepts=concepts)
    return kept


@dataclass(frozen=True)
class JoinedKeys:
    """The retained keys of two edits that are merged.

    Attributes:
        rows: Indices of the first edit's rows that are kept.
        other_rows: Indices of the second edit's rows that follow.
        labels: To whom the rows belong in the merged edit.
    """

    rows: list[int]
    other_rows: list[int]
    labels: tuple[RetainedKey, ...]

    @classmethod
    def of(cls, edit: EditRecord, other: EditRecord) -> JoinedKeys:
        """Join the retained keys of two edits, whose concepts stand one after the other.

        A name that one edit retains and the other unlearns is left out. One that both retain occurs once, for the
        concepts of both.
        """
        offset = len(edit.concepts)
        theirs = [
            replace(label, concepts=tuple(offset + concept for concept in label.concepts)) for label in other.retained
        ]
        rows = retained_apart(edit.retained, other.concepts)
        mine = {folded(edit.retained[row].name) for row in rows}
        apart = retained_apart(theirs, edit.concepts)
        other_rows = [row for row in apart if folded(theirs[row].name) not in mine]
        shared = {folded(theirs[row].name): theirs[row].concepts for row in apart}
        labels = [_shared(edit.retained[row], shared) for row in rows]
        return cls(rows, other_rows, (*labels, *(theirs[row] for row in other_rows)))


def _shared(label: RetainedKey, shared: Mapping[str, tuple[int, ...]]) -> RetainedKey:
    """Return a retained key that belongs to the concepts of both edits; to none if a caller gave the name."""
    others = shared.get(folded(label.name))
    if others is None:
        return label
    return replace(label, concepts=(*label.concepts, *others) if label.concepts and others else ())


def labels_to_json(labels: Sequence[RetainedKey]) -> list[dict[str, Any]]:
    """Return the labels of retained keys as JSON values; those of one name that follow each other are one entry."""
    return [
        {"name": label.name, "concepts": list(label.concepts), "keys": len(list(same))}
        for label, same in groupby(labels)
    ]


def labels_from_json(values: object, concepts: int) -> tuple[RetainedKey, ...]:
    """Return the inverse of `labels_to_json`.

    Raises:
        KeyError, TypeError, ValueError: The values are not those of retained keys of that many concepts.
    """
    labels: list[RetainedKey] = []
    for entry in list_of(values, "retained"):
        owners = tuple(whole_number_of(concept, "concepts") for concept in list_of(entry["concepts"], "concepts"))
        if not all(owner < concepts for owner in owners):
            raise ValueError(f"a retained name belongs to concept {max(owners)} of {concepts}")
        count = whole_number_of(entry["keys"], "keys")
        if count > MAX_KEYS:
            raise ValueError(f"a retained name has {count:,} keys, more than {MAX_KEYS:,}")
        labels += [RetainedKey(text_of(entry["name"], "name"), owners)] * count
    return tuple(labels)
