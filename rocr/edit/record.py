"""The data of an edit: its concepts, settings, updates and measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.edit.measures import EditReport
from rocr.edit.update import Applied, LayerUpdate
from rocr.keys.prompts import RenderedTemplate
from rocr.model.fingerprint import Fingerprint

AnEdit = TypeVar("AnEdit", bound="EditRecord")
"""The caller's class of edit: `EditRecord` or a subclass."""


@dataclass(frozen=True)
class RetainedKey:
    """To whom a row of a system belongs that keeps the output at a key of a retained name.

    Attributes:
        name: The name.
        concepts: Indices of the concepts that it was chosen for. Empty if the caller gave the name.
    """

    name: str
    concepts: tuple[int, ...] = ()


@dataclass(repr=False)
class EditRecord:
    """The data of an edit, which is what an edit file holds.

    Attributes:
        concepts: The concepts and their redirects.
        config: The settings, with the layers that are edited.
        fingerprint: Digests of the model and the tokenizer that the edit was made for.
        updates: One update per edited layer, in ascending order.
        concept_of: For each key (row of `keys` of an update), the index of its concept.
        report: Measurements.
        computed_with: Settings of the model that the keys depend on. Empty if they are not known.
        rendered: The templates of the settings as the model reads them. Empty if they are not known.
        model_type: The type of the whole model, by whose rules peft renames the adapters of experts. None for an edit
            of dense layers.
        retained: For each row of a retained name in the systems of the updates, to whom it belongs.
    """

    concepts: list[Concept]
    config: EditConfig
    fingerprint: Fingerprint
    updates: list[LayerUpdate]
    concept_of: list[int]
    report: EditReport = field(default_factory=EditReport)
    computed_with: Mapping[str, Any] = field(default_factory=dict)
    rendered: tuple[RenderedTemplate, ...] = ()
    model_type: str | None = None
    retained: tuple[RetainedKey, ...] = ()

    def __repr__(self) -> str:
        """Return one line, such as "Edit(3 concepts, layers=(4, 5), method='whitened', model='…')"."""
        count = len(self.concepts)
        return (
            f"{type(self).__name__}({count:,} concept{'s' * (count != 1)}, layers={self.layers}, "
            f"method={self.config.method!r}, model={self.fingerprint.name[:60]!r})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the edited decoder layers."""
        return tuple(update.layer for update in self.updates)

    def set_applied(self, applied: Sequence[Applied]) -> None:
        """Store the records of how the updates changed a model's weights, one per update."""
        self.updates = [replace(update, applied=record) for update, record in zip(self.updates, applied, strict=True)]

    def with_own_names(self: AnEdit, names: Mapping[str, str]) -> AnEdit:
        """Return the edit with the weights' names in the other class of its checkpoint; see `rocr.model.own_names`.

        Args:
            names: New names by the parameters' names in the model. Parameters that are not listed keep theirs.
        """
        updates = [
            replace(
                update,
                own=names.get(update.parameter, update.own),
                parts=tuple(replace(part, own=names.get(part.parameter, part.own)) for part in update.parts),
            )
            for update in self.updates
        ]
        return replace(self, updates=updates)
