"""Weights that are spread over processes by tensor parallelism, as torch's DTensors.

What is read of them becomes whole in every process; what is written goes to each process's own part. Reading is a
step that all processes of the mesh must take together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, so that this process may hold only a part of it."""
    if tensor is None or not dist.is_available() or type(tensor) is Tensor:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_parallel(model: nn.Module) -> bool:
    """Whether a model is spread over processes, which must then run it together."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def flaw_of(weight: Tensor) -> str | None:
    """What is wrong with how a down-projection (d_out, d_in) is spread; None where rocr can edit it.

    Edited are weights that are split along their inputs, as transformers and Megatron-LM (arXiv 1909.08053,
    section 3) split them, and copies. Anything else, such as FSDP's parts of rows, is not.
    """
    if not is_sharded(weight):
        return None
    placements: tuple[Any, ...] = weight.placements  # type: ignore[attr-defined]
    if all(placement.is_replicate() or placement.is_shard(1) for placement in placements):
        return None
    return f"is spread over processes as {', '.join(map(repr, placements))}"


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in the memory of this process; a plain tensor is itself."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local


def own_part(values: Tensor, like: Tensor) -> Tensor:
    """Of a whole matrix that every process holds, the part that belongs to its part of another.

    Args:
        values: (rows, columns); where `like` is split along its columns, it is split likewise.
        like: a weight; its device is where the part goes.
    """
    if not is_sharded(like):
        return values.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(values.to(like.device), mesh, placements, src_data_rank=None).to_local().contiguous()


def whole_input(module: nn.Module, values: Tensor) -> Tensor:
    """All features of a module's input (..., d_in), of which a process gets those of its own part of the weight."""
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
