"""The data of an edit: its concepts, settings and updates, and what was measured."""

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
"""An edit of the caller's class."""


@dataclass
class EditRecord:
    """What an edit is made of, and what its file holds.

    Attributes:
        concepts: what was redirected to what.
        config: the settings, with the layers that were edited.
        fingerprint: the model and tokenizer it was made for.
        updates: one per edited layer, ascending.
        concept_of: for each key (row of `keys`), the index of its concept.
        report: what was measured while it was made.
        computed_with: the settings of the model that its keys depend on; empty: not known.
        rendered: the templates of the settings as the model read them; empty: not known.
    """

    concepts: list[Concept]
    config: EditConfig
    fingerprint: Fingerprint
    updates: list[LayerUpdate]
    concept_of: list[int]
    report: EditReport = field(default_factory=EditReport)
    computed_with: Mapping[str, Any] = field(default_factory=dict)
    rendered: tuple[RenderedTemplate, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited decoder layers."""
        return tuple(update.layer for update in self.updates)

    def keep(self, applied: Sequence[Applied]) -> None:
        """Take the records of what the updates did to a model's weights."""
        self.updates = [replace(update, applied=record) for update, record in zip(self.updates, applied, strict=True)]

    def with_own_names(self: AnEdit, names: Mapping[str, str]) -> AnEdit:
        """The edit with names of its weights in the checkpoint's own class; see `rocr.model.own_names`.

        Args:
            names: by the parameters' names in the model; what is not named stays as it is.
        """
        updates = [replace(update, own=names.get(update.parameter, update.own)) for update in self.updates]
        return replace(self, updates=updates)
