"""Read and write weights that tensor parallelism splits over processes, as torch's DTensors.

Reading gathers the full tensor in every process, so all processes of the mesh must read at the same time. Writing
changes the part that each process holds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a DTensor, of which this process may hold only a part."""
    if tensor is None or not dist.is_available() or type(tensor) is Tensor:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_parallel(model: nn.Module) -> bool:
    """Return whether a model is split over processes, which must then run it together."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def flaw_of(weight: Tensor) -> str | None:
    """Describe why rocr cannot edit a down-projection (d_out, d_in) that is split as it is; None if it can.

    rocr edits weights that are replicated, or split along their inputs as transformers and Megatron-LM (arXiv
    1909.08053, section 3) split them. Other placements, such as the rows of FSDP, are not supported.
    """
    if not is_sharded(weight):
        return None
    placements: tuple[Any, ...] = weight.placements  # type: ignore[attr-defined]
    if all(placement.is_replicate() or placement.is_shard(1) for placement in placements):
        return None
    return f"is split over processes as {', '.join(map(repr, placements))}"


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor, in the memory of this process; a plain tensor is returned unchanged."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def own(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, as a view."""
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local


def own_part(values: Tensor, like: Tensor) -> Tensor:
    """Return the part of a full matrix that corresponds to this process's part of a weight.

    Args:
        values: (rows, columns) the full matrix, which every process holds. It is split as `like` is.
        like: The weight; the result is on its device.
    """
    if not is_sharded(like):
        return values.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(values.to(like.device), mesh, placements, src_data_rank=None).to_local().contiguous()


def whole_input(module: nn.Module, values: Tensor) -> Tensor:
    """Gather all features of a module's input (..., d_in): each process gets those of its part of the weight only."""
    if is_sharded(values):
        return whole(values)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not is_sharded(weight) or values.shape[-1] == weight.shape[-1]:
        return values
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(values.ndim - 1) if each.is_shard() else each for each in weight.placements]  # type: ignore[attr-defined]
    shape = torch.Size([*values.shape[:-1], weight.shape[-1]])
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        values.contiguous(),
        weight.device_mesh,  # type: ignore[attr-defined]
        placements,
        shape=shape,
        stride=stride,
    )
    full: Tensor = spread.full_tensor()
    return full
