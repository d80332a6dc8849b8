"""The part of an edit file that holds wide keys, which are zero at the blocks that they are not routed to.

Only the other parts are stored, one after the other, sorted by block and row. The product K M has the same zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rocr.edit.update import LayerUpdate, Part
from rocr.model.blocks import column_slices


def routed_rows(keys: Tensor, update: LayerUpdate) -> Tensor:
    """Return (blocks, n) uint8: whether a wide key (n, sum of d_in) is routed to a block of an update."""
    return torch.stack([keys[:, place].any(dim=1) for place in update.columns]).to("cpu", torch.uint8)


def pack_wide(values: Tensor, routed: Tensor, update: LayerUpdate) -> Tensor:
    """Return the values of a wide matrix (n, sum of d_in) at the blocks that its rows are routed to, flat."""
    pieces = [values[rows][:, place].reshape(-1) for rows, place in zip(routed.bool(), update.columns, strict=True)]
    return torch.cat(pieces)


def pack_wide_system(tensors: dict[str, Tensor], update: LayerUpdate) -> dict[str, Tensor]:
    """Return the tensors of a system (see `pack_system`) with their wide matrices packed, and the routing of rows."""
    found = {}
    for name, values in tensors.items():
        rows = tensors["retained"] if name.startswith("retained") else update.keys
        found[name] = pack_wide(values.cpu(), routed_rows(rows, update), update)
    if "retained" in tensors:
        found["retained_routed"] = routed_rows(tensors["retained"], update)
    return found


def unpack_wide(layer: int, parts: Sequence[Part], tensors: dict[str, Tensor], retained: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a file with the wide matrices of a layer, which has a number of retained rows, unpacked.

    Raises:
        KeyError, ValueError: A tensor is missing or does not have the size that the parts give it.
    """
    prefix = f"layer.{layer}."
    if len({part.block for part in parts}) != len(parts):
        raise ValueError(f"two parts of layer {layer} are of one block")
    found = dict(tensors)
    for flags, n, names in (
        ("routed", len(tensors[f"{prefix}residuals"]), ("keys", "product")),
        ("retained_routed", retained, ("retained", "retained_product")),
    ):
        if not n:
            continue
        routed = tensors[f"{prefix}{flags}"]
        if routed.dtype != torch.uint8 or tuple(routed.shape) != (len(parts), n) or bool((routed > 1).any()):
            raise ValueError(
                f"the routing of layer {layer} is {routed.dtype} of shape {tuple(routed.shape)}, not a flag for "
                f"each of {len(parts)} blocks and {n} keys"
            )
        for name in names:
            flat = tensors.get(f"{prefix}{name}")
            if flat is not None:
                found[f"{prefix}{name}"] = _unpacked(flat, parts, routed.bool(), f"{prefix}{name}")
    return found


def _unpacked(flat: Tensor, parts: Sequence[Part], routed: Tensor, name: str) -> Tensor:
    counts = routed.sum(dim=1).tolist()
    sizes = [count * part.width for count, part in zip(counts, parts, strict=True)]
    if flat.dtype != torch.float32 or tuple(flat.shape) != (sum(sizes),):
        raise ValueError(f"{name} is {flat.dtype} of shape {tuple(flat.shape)}, not float32 of {sum(sizes)} values")
    values = torch.zeros(routed.shape[1], sum(part.width for part in parts))
    places = column_slices(part.width for part in parts)
    for part, place, rows, piece in zip(parts, places, routed, torch.split(flat, sizes), strict=True):
        values[rows, place] = piece.view(-1, part.width)
    return values
