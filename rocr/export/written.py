"""The entries of a report about edited weights: where an output holds them, and in which dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight
from rocr.export.quantised import WrittenBlock, WrittenQuantised
from rocr.io.dtypes import dtype_name
from rocr.model.stored_weights import Place


@dataclass(frozen=True)
class WrittenWeight:
    """An edited weight in the output.

    Attributes:
        layer: Index of the decoder layer.
        parameter: Name of the weight in the loaded model.
        stored: Names of the weight in the files.
        dtype: The stored dtype.
        loaded: The dtype in the loaded model. None if the weight was not loaded, to revert an edit.
        surviving: Share of the entries that the update changes after rounding to the stored dtype. None if the edit
            was reverted.
        parts: For each block of a mixture of experts, in the order of the update, where the files hold it. None for a
            dense layer.
    """

    layer: int
    parameter: str
    stored: list[str]
    dtype: str
    loaded: str | None
    surviving: float | None
    parts: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, without `parts` for a dense layer."""
        return {name: value for name, value in asdict(self).items() if name != "parts" or value is not None}


def written_plain(
    weight: Weight, update: LayerUpdate, places: Sequence[Sequence[Place]], record: Applied | None
) -> WrittenWeight:
    """Return the entry of the report for an edited weight of a model that is not quantised."""
    block = weight.blocks[0]
    return WrittenWeight(
        update.layer,
        update.parameter,
        list(dict.fromkeys(place.tensor.name for block_places in places for place in block_places)),
        str(places[0][0].dtype).removeprefix("torch."),
        None if block.parameter.device.type == "meta" else dtype_name(block.parameter.dtype),
        None if record is None else record.surviving,
        [_part_entry(block_places[0]) for block_places in places] if weight.is_mixture else None,
    )


def _part_entry(place: Place) -> dict[str, Any]:
    return {"stored": place.tensor.name, "expert": place.expert, "experts": place.experts, "flipped": place.flipped}


def written_quantised(weight: Weight, update: LayerUpdate, done: WrittenQuantised) -> WrittenWeight:
    """Return the entry of the report for an edited weight of a quantised model."""
    parts = [_quantised_entry(block, done.is_plain) for block in done.blocks]
    own = done.quantised[0][0].weight
    dtype = dtype_name(done.blocks[0].values.dtype) if done.is_plain else own.scheme.label
    if weight.is_mixture:
        stored = list(dict.fromkeys(part["stored"] for part in parts))
    else:
        stored = [own.name] if done.is_plain else sorted(own.names.values())
    return WrittenWeight(
        update.layer,
        update.parameter,
        stored,
        dtype,
        dtype_name(weight.dtype),
        done.applied.surviving,
        parts if weight.is_mixture else None,
    )


def _quantised_entry(block: WrittenBlock, is_plain: bool) -> dict[str, Any]:
    """Return where an output holds a block; a block that is quantised there is named by its marker."""
    place = block.place
    if isinstance(place, Place):
        return _part_entry(place)
    stored = place.weight.name if is_plain else place.weight.names[place.weight.scheme.marker]
    experts = 1 if place.expert is None else place.weight.shape[0]
    return {"stored": stored, "expert": place.expert, "experts": experts, "flipped": place.flipped}
