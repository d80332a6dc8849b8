"""Low-rank updates in Triton: weight += scale * left @ right, in place, for many layers in one launch.

Formula, for a weight W [rows, columns], left [rows, rank] and right [rank, columns], float32:

    W[i, j] = round(W[i, j] + scale * sum over k of left[i, k] * right[k, j])

Each element of a weight is read once and written once. The sum is float32 and is rounded once, to nearest even or
stochastically. Tensor cores multiply the float32 factors as bf16 splits (_common.py): two terms for 16-bit weights,
whose rounding is far coarser than the 2**-16 that two terms lose, and three terms, which lose nothing, for float32
weights. The products of terms are added smallest first: high @ middle, middle @ high, high @ high, and with three terms
high @ low, low @ high and middle @ middle before them.

Tiles. A tile is ROWS x COLUMNS elements of a weight. Three kinds of launch differ in what stays with a program:

    resident, column_strips: an item is a column strip, a column of tiles or a range of its rows. The strip's part of
    right stays with the program; the tiles of the weight and rows of left stream past it.

                          right  [RANK, COLUMNS]   loaded and split once for an item
                            |
        left [ROWS, RANK] --+-- weight tile, row 0
        left [ROWS, RANK] --+-- weight tile, row ROWS
        left [ROWS, RANK] --+-- weight tile, row 2 * ROWS
                           ...

    resident: rank up to 32; right stays in registers, everything moves through pointers, any layout.
    column_strips: rank up to 128, compute capability 9 or 10, 16-bit weights; left is split by split_factors before,
    right stays in shared memory, and left and weight move through tensor memory access (TMA).

    bf16_splits: any rank; an item is one tile. split_factors splits both factors first, and the program sums over the
    rank, RANK columns of left and rows of right at a time.

The kernels are in low_rank_pointers.py and low_rank_tma.py, their configurations in low_rank_configs.py; this file
launches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from rocr_kernels._common import (
    address_table,
    backend_of,
    capability,
    multiprocessors,
    offset_type,
    register_limit,
    run_with_scratch,
    steps_ahead,
)
from rocr_kernels.low_rank_configs import (
    CONFIGS,
    ColumnStrips,
    LowRankConfig,
    choose_config,
    make_column_strips,
    resident_programs,
)
from rocr_kernels.low_rank_pointers import add_low_rank_bf16_splits, add_low_rank_resident, split_factors
from rocr_kernels.low_rank_tma import add_low_rank_column_strips
from torch import Tensor

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

SPLIT_BYTES = 1 << 30
"""Most memory for the bf16 splits of the factors of one launch; more layers take several launches."""


@dataclass(frozen=True)
class _Layers:
    """Layers of one shape, dtype and layout, which one launch serves.

    Attributes:
        weights: with unit stride along a row. A transposed weight is given as its transpose, with swapped factors.
        lefts, rights: the factors of each weight.
        table: addresses of weights, of lefts and of rights, then the indices of the layers, int64, on the device.
        aligned: all addresses and all rows of the weights start at multiples of 16 bytes, and rows are whole.
        keep_zeros: elements that are zero keep their bits.
    """

    weights: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    table: Tensor
    aligned: bool
    keep_zeros: bool


class LowRankPlan:
    """An update whose tables are on the device: make it before the capture of a CUDA graph, run it inside."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        config: LowRankConfig | None = None,
        keep_zeros: bool = False,
    ) -> None:
        """Group the layers by launch and copy their addresses to the device.

        Args:
            weights: as for update_low_rank. The plan keeps weights and factors, and reads them when it runs.
            lefts: as for update_low_rank.
            rights: as for update_low_rank.
            config: shape of the launches; None for the ones that choose_config names.
            keep_zeros: as for update_low_rank.

        Raises:
            ValueError: strides or dtypes that no kernel takes.
            CaptureError: a CUDA graph is being captured.
        """
        self._config = config
        alike: dict[tuple[object, ...], list[int]] = {}
        rows_first = [_rows_first(*layer) for layer in zip(weights, lefts, rights, strict=True)]
        for index, (weight, left, right) in enumerate(rows_first):
            if not weight.numel() or not left.shape[1]:
                continue
            alike.setdefault(
                (weight.shape, weight.stride(), weight.dtype, left.shape, left.stride(), right.stride()), []
            ).append(index)
        self._launches: list[_Layers] = []
        for indices in alike.values():
            weight, left, _ = rows_first[indices[0]]
            count = max(1, SPLIT_BYTES // (6 * sum(weight.shape) * left.shape[1]))
            for start in range(0, len(indices), count):
                self._launches.append(_layers(rows_first, indices[start : start + count], keep_zeros))

    def run(self, scale: float, stochastic: bool, seed: int) -> None:
        """Add scale * left @ right to every weight, rounded stochastically (16-bit weights only) or to nearest."""
        launch = {
            "resident": _launch_resident,
            "column_strips": _launch_column_strips,
            "bf16_splits": _launch_bf16_splits,
        }
        for layers in self._launches:
            weight, rank = layers.weights[0], layers.lefts[0].shape[1]
            layers_stochastic = stochastic and weight.dtype != torch.float32
            rank_stride, column_stride = layers.rights[0].stride()
            tma = layers.aligned and column_stride == 1 and rank_stride % 4 == 0 and not layers_stochastic
            config = self._config or CONFIGS[choose_config(capability(weight.device), weight.dtype, rank, tma)]
            launch[config.kind](layers, config, scale, layers_stochastic, seed)


def update_low_rank(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float = 1.0,
    stochastic: bool = False,
    seed: int = 0,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight, in place, in float32 with one rounding.

    Args:
        weights: matrices (d_out, d_in), bfloat16, float16 or float32, with a stride of 1 in either dimension.
        lefts: one (d_out, n) for each weight, float32.
        rights: one (n, d_in) for each weight, float32.
        scale: factor of the update.
        stochastic: round 16-bit weights stochastically, which keeps the expectation, not to nearest even.
        seed: of stochastic rounding, 0 to 2**63 - 1.
        keep_zeros: leave elements of a weight that are zero as they are, their signs too.

    Raises:
        ValueError: strides or dtypes that no kernel takes.
        CaptureError: a CUDA graph is being captured.
    """
    LowRankPlan(weights, lefts, rights, keep_zeros=keep_zeros).run(scale, stochastic, seed)


def _rows_first(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the update, or its transpose where the weight is transposed, so that a row has unit stride."""
    if left.dtype != torch.float32 or right.dtype != torch.float32:
        raise ValueError(f"Factors must be float32, but are {left.dtype} and {right.dtype}.")
    if weight.stride(0) == 1 < weight.stride(1):
        weight, left, right = weight.T, right.T, left.T
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"A weight has the strides {weight.stride()}, but one of them must be 1.")
    return weight, left, right


def _layers(rows_first: Sequence[tuple[Tensor, Tensor, Tensor]], indices: Sequence[int], keep_zeros: bool) -> _Layers:
    weights, lefts, rights = ([rows_first[index][operand] for index in indices] for operand in range(3))
    on_16_bytes = all(tensor.data_ptr() % 16 == 0 for tensor in (*weights, *lefts, *rights))
    aligned = on_16_bytes and weights[0].stride(0) % 8 == 0 and weights[0].shape[1] % 8 == 0
    return _Layers(weights, lefts, rights, address_table([weights, lefts, rights], indices), aligned, keep_zeros)


def _shape(layers: _Layers, config: LowRankConfig) -> dict[str, object]:
    """Compile-time arguments of all kernels."""
    backend = backend_of(layers.weights[0].device)
    return {
        "TYPE": TYPES[layers.weights[0].dtype],
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "RANK": config.rank,
        "STAGES": steps_ahead(backend, config.stages),
        "BACKEND": backend,
        "KEEP_ZEROS": layers.keep_zeros,
        "num_warps": config.warps,
    }


def _options(layers: _Layers, config: LowRankConfig, stochastic: bool) -> dict[str, object]:
    """Compile-time arguments of the kernels that take any layout."""
    return _shape(layers, config) | {
        "ALIGNED": layers.aligned,
        "STOCHASTIC": stochastic,
        "BF16_SPLITS": config.bf16_splits,
    }


def _column_strips(layers: _Layers, config: LowRankConfig, programs: int) -> ColumnStrips:
    rows, columns = layers.weights[0].shape
    return make_column_strips(len(layers.weights) * -(-columns // config.columns), -(-rows // config.rows), programs)


def _launch_resident(layers: _Layers, config: LowRankConfig, scale: float, stochastic: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    programs_each = resident_programs(capability(weight.device), config, stochastic)
    programs = programs_each * multiprocessors(weight.device)
    strips = _column_strips(layers, config, programs)
    add_low_rank_resident[(min(strips.items, programs),)](
        layers.table,
        len(layers.weights),
        *weight.shape,
        left.shape[1],
        weight.stride(0),
        *left.stride(),
        *right.stride(),
        scale,
        seed,
        strips.whole,
        strips.splits,
        strips.split_tiles * config.rows,
        strips.items,
        OFFSETS=offset_type(config.rows * weight.stride(0), _extent(left), _extent(right)),
        **register_limit(backend_of(weight.device), programs_each, config.warps),
        **_options(layers, config, stochastic),
    )


def _launch_column_strips(layers: _Layers, config: LowRankConfig, scale: float, stochastic: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    count, device = len(layers.weights), weight.device
    lefts = _split_factors(layers.table[count:], left, count, config)
    programs = config.programs * multiprocessors(device)
    strips = _column_strips(layers, config, programs)
    run_with_scratch(
        device,
        lambda: add_low_rank_column_strips[(min(strips.items, programs),)](
            layers.table,
            lefts,
            count,
            *weight.shape,
            left.shape[1],
            weight.stride(0),
            right.stride(0),
            scale,
            strips.whole,
            strips.splits,
            strips.split_tiles * config.rows,
            strips.items,
            **_shape(layers, config),
        ),
    )


def _launch_bf16_splits(layers: _Layers, config: LowRankConfig, scale: float, stochastic: bool, seed: int) -> None:
    weight = layers.weights[0]
    count = len(layers.weights)
    lefts = _split_factors(layers.table[count:], layers.lefts[0], count, config)
    rights = _split_factors(layers.table[2 * count :], layers.rights[0].T, count, config)
    items = count * -(-weight.shape[0] // config.rows) * -(-weight.shape[1] // config.columns)
    add_low_rank_bf16_splits[(min(items, multiprocessors(weight.device)),)](
        layers.table,
        lefts,
        rights,
        count,
        *weight.shape,
        lefts.shape[2] // config.bf16_splits,
        weight.stride(0),
        scale,
        seed,
        items,
        OFFSETS=offset_type(config.rows * weight.stride(0), max(config.rows, config.columns) * lefts.shape[2]),
        **_options(layers, config, stochastic),
    )


def _extent(matrix: Tensor) -> int:
    """Distance from the first to the last element of a matrix, in elements."""
    return sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))


def _split_factors(table: Tensor, factor: Tensor, count: int, config: LowRankConfig) -> Tensor:
    """Split the factors at the head of table into (count, size, bf16_splits * rank), bfloat16; rank is rounded up."""
    size, rank = factor.shape
    term_rank = -(-rank // config.rank) * config.rank
    terms = factor.new_empty((count, size, config.bf16_splits * term_rank), dtype=torch.bfloat16)
    split_factors[(-(-size // 64), -(-term_rank // 64), count)](
        table,
        terms,
        size,
        rank,
        term_rank,
        *factor.stride(),
        BF16_SPLITS=config.bf16_splits,
        SIZE=64,
        RANK=64,
        BACKEND=backend_of(factor.device),
        num_warps=4,
    )
    return terms
