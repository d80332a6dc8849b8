"""The zeros of a sparse weight, which an edit keeps: when it does, and whether a model still has the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rocr.config import EditConfig
from rocr.edit.weight import Weight
from rocr.errors import InputError
from rocr.model.blocks import LayerBlocks, column_slices
from rocr.model.tensor_parallel import own, own_part, whole
from rocr.solve.support import density

SPARSE = 0.2
"""Share of exact zeros above which a weight is sparse, so that an edit keeps its zeros unless it is told not to.
Weights that are trained and not pruned have next to none; patterns such as 2:4 have half."""


def share_of_zeros(blocks: LayerBlocks, chosen: Sequence[int]) -> float:
    """Return the share of exact zeros in the weights of some blocks of a layer."""
    return 1 - density(_support_of(blocks, chosen))


def find_support(config: EditConfig, blocks: LayerBlocks, chosen: Sequence[int]) -> Tensor | None:
    """Return where the weights of blocks, side by side, are not zero, if an edit keeps their zeros.

    Args:
        config: The settings; keep_zeros is used.
        blocks: The blocks of the layer.
        chosen: Indices of the blocks that are edited.

    Returns:
        (d_out, sum of d_in) bool; None if the zeros are not kept, or if there are none.
    """
    if config.keep_zeros is False:
        return None
    support = _support_of(blocks, chosen)
    return support if 1 - density(support) > (0.0 if config.keep_zeros else SPARSE) else None


def _support_of(blocks: LayerBlocks, chosen: Sequence[int]) -> Tensor:
    """Return where the weights of blocks, side by side, are not zero."""
    # A conversion to bool takes half the time of a comparison with 0.
    found = [whole(blocks.blocks[block].weight).detach().bool() for block in chosen]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def check_zeros(weight: Weight, support: Tensor) -> None:
    """Raise InputError unless a weight has its zeros where the update was solved for them.

    Args:
        weight: The weight.
        support: (d_out, sum of d_in) bool, where it must not be zero.
    """
    for block, place in zip(
        weight.blocks, column_slices(block.weight.shape[1] for block in weight.blocks), strict=True
    ):
        found = own(block.weight) != 0
        expected = own_part(support[:, place], block.weight)
        if torch.equal(found, expected):
            continue
        raise InputError(
            f"The edit keeps the zeros of {block.label}, but {int((found != expected).sum()):,} of its "
            f"{found.numel():,} elements are zero where they were not when the edit was made, or the other way round. "
            "Use the weights that the edit was made for, in the same dtype."
        )


def refuse_low_rank(support: Tensor | None, parameter: str, what: str) -> None:
    """Raise InputError if an update keeps zeros, where a low-rank product is written.

    Args:
        support: That of the update.
        parameter: Name of the weight.
        what: What is written, such as "A LoRA adapter".
    """
    if support is not None:
        raise InputError(
            f"{what} adds a product of low rank to {parameter}, which would fill its zeros: the edit keeps them. Write "
            "the edited model, or the edit file, instead (--save model,edit); or make the edit without the zeros "
            "(keep_zeros=False, --fill-zeros)."
        )


def pack_support(support: Tensor) -> Tensor:
    """Return a support (d_out, d_in) as bits: (d_out, d_in / 8, rounded up) uint8, the first column in the high bit."""
    return torch.from_numpy(np.packbits(support.cpu().numpy(), axis=1))


def unpack_support(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return the inverse of `pack_support`.

    Raises:
        ValueError: The bits are not those of a support of this shape.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (rows, -(-columns // 8)):
        raise ValueError(f"a support is {packed.dtype} of shape {tuple(packed.shape)}, not bits of {(rows, columns)}")
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns)).bool()
