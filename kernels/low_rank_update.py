"""Low-rank updates in Triton: weight += scale * left @ right for many layers in one launch.

A tile of a weight is read and written once; the sum is taken in float32 and rounded once, to nearest even or at random.
Tensor cores multiply the float32 factors as sums of bfloat16 parts: two parts for 16-bit weights, whose rounding is
coarser by far than the 2**-16 that is lost, and three, with nothing lost, for float32 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from rocr_kernels.launch import (
    address_table,
    capability,
    offset_type,
    processors,
    registers,
    run_with_scratch,
)
from rocr_kernels.low_rank_bands import add_low_rank_bands
from rocr_kernels.low_rank_configs import CONFIGS, LowRankConfig, choose_config, resident_programs
from rocr_kernels.low_rank_parts import add_low_rank_parts, split_factors
from rocr_kernels.low_rank_tiles import add_low_rank
from rocr_kernels.schedule import Bands, make_bands
from torch import Tensor

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

PART_BYTES = 1 << 30
"""Most memory for the parts of the factors of one launch; more layers go in several."""


@dataclass(frozen=True)
class _Layers:
    """Layers of one shape, dtype and layout, which one launch can serve.

    Attributes:
        weights: with unit stride along a row; a weight that lies transposed comes as its transpose, and its factors
            swapped.
        table: addresses of weights, of lefts and of rights, then the layers' numbers, int64, on the device.
        aligned: all addresses and every row of a weight lie at multiples of 16 bytes.
    """

    weights: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    table: Tensor
    aligned: bool


class LowRankPlan:
    """An update whose tables lie on the device: make it before a CUDA graph's capture, run it inside."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        config: LowRankConfig | None = None,
    ) -> None:
        """Arguments as for update_low_rank, which are kept and read when the plan runs; config: None to choose."""
        self._config = config
        alike: dict[tuple[object, ...], list[int]] = {}
        rows_first = [_rows_first(*layer) for layer in zip(weights, lefts, rights, strict=True)]
        for number, (weight, left, right) in enumerate(rows_first):
            if not weight.numel() or not left.shape[1]:
                continue
            alike.setdefault(
                (weight.shape, weight.stride(), weight.dtype, left.shape, left.stride(), right.stride()), []
            ).append(number)
        self._launches: list[_Layers] = []
        for numbers in alike.values():
            weight, left, _ = rows_first[numbers[0]]
            count = max(1, PART_BYTES // (6 * sum(weight.shape) * left.shape[1]))
            for start in range(0, len(numbers), count):
                self._launches.append(_layers(rows_first, numbers[start : start + count]))

    def run(self, scale: float, at_random: bool, seed: int) -> None:
        """Add scale * left @ right to every weight, rounded to nearest even or at random."""
        launch = {"resident": _launch_resident, "bands": _launch_bands, "parts": _launch_parts}
        for layers in self._launches:
            weight, rank = layers.weights[0], layers.lefts[0].shape[1]
            layers_at_random = at_random and weight.dtype != torch.float32
            rank_stride, column_stride = layers.rights[0].stride()
            streams = layers.aligned and column_stride == 1 and rank_stride % 4 == 0 and not layers_at_random
            config = self._config or CONFIGS[choose_config(capability(weight.device), weight.dtype, rank, streams)]
            launch[config.kind](layers, config, scale, layers_at_random, seed)


def update_low_rank(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float = 1.0,
    at_random: bool = False,
    seed: int = 0,
) -> None:
    """Add scale * left @ right to every weight, in place, in float32 with one rounding.

    Args:
        weights: matrices (d_out, d_in), bfloat16, float16 or float32, with a stride of 1 in either dimension.
        lefts: one (d_out, n) for each weight, float32.
        rights: one (n, d_in) for each weight, float32.
        scale: a factor.
        at_random: round 16-bit weights up or down at random, right on average, not to nearest even.
        seed: of the rounding, 0 to 2**63 - 1.

    Raises:
        ValueError: strides or dtypes that do not fit.
    """
    LowRankPlan(weights, lefts, rights).run(scale, at_random, seed)


def _rows_first(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The update, or its transpose where the weight lies transposed, so that a row of the weight has unit stride."""
    if left.dtype != torch.float32 or right.dtype != torch.float32:
        raise ValueError(f"Factors must be float32, but are {left.dtype} and {right.dtype}.")
    if weight.stride(0) == 1 < weight.stride(1):
        weight, left, right = weight.T, right.T, left.T
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"A weight has the strides {weight.stride()}, but one of them must be 1.")
    return weight, left, right


def _layers(rows_first: Sequence[tuple[Tensor, Tensor, Tensor]], numbers: Sequence[int]) -> _Layers:
    weights, lefts, rights = ([rows_first[number][index] for number in numbers] for index in range(3))
    on_16_bytes = all(tensor.data_ptr() % 16 == 0 for tensor in (*weights, *lefts, *rights))
    aligned = on_16_bytes and weights[0].stride(0) % 8 == 0 and weights[0].shape[1] % 8 == 0
    return _Layers(weights, lefts, rights, address_table([weights, lefts, rights], numbers), aligned)


def _options(layers: _Layers, config: LowRankConfig, at_random: bool) -> dict[str, object]:
    """Compile-time arguments of the kernels that take any layout."""
    return _shape(layers, config) | {"ALIGNED": layers.aligned, "AT_RANDOM": at_random, "PARTS": config.parts}


def _shape(layers: _Layers, config: LowRankConfig) -> dict[str, object]:
    """Compile-time arguments that all kernels take."""
    return {
        "TYPE": TYPES[layers.weights[0].dtype],
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "RANK": config.rank,
        "STAGES": config.stages,
        "INTERPRETED": not layers.weights[0].is_cuda,
        "num_warps": config.warps,
    }


def _bands(layers: _Layers, config: LowRankConfig, programs: int) -> Bands:
    rows, columns = layers.weights[0].shape
    return make_bands(len(layers.weights) * -(-columns // config.columns), -(-rows // config.rows), programs)


def _launch_resident(layers: _Layers, config: LowRankConfig, scale: float, at_random: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    per_processor = resident_programs(capability(weight.device), config, at_random)
    programs = per_processor * processors(weight.device)
    bands = _bands(layers, config, programs)
    add_low_rank[(min(bands.items, programs),)](
        layers.table,
        len(layers.weights),
        *weight.shape,
        left.shape[1],
        weight.stride(0),
        *left.stride(),
        *right.stride(),
        scale,
        seed,
        bands.whole,
        bands.splits,
        bands.split_tiles * config.rows,
        bands.items,
        OFFSETS=offset_type(config.rows * weight.stride(0), _reach(left), _reach(right)),
        maxnreg=registers(per_processor, config.warps),
        **_options(layers, config, at_random),
    )


def _launch_bands(layers: _Layers, config: LowRankConfig, scale: float, at_random: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    count, device = len(layers.weights), weight.device
    lefts = _in_parts(layers.table[count:], left, count, config)
    programs = config.programs * processors(device)
    bands = _bands(layers, config, programs)
    run_with_scratch(
        device,
        lambda: add_low_rank_bands[(min(bands.items, programs),)](
            layers.table,
            lefts,
            count,
            *weight.shape,
            left.shape[1],
            weight.stride(0),
            right.stride(0),
            scale,
            bands.whole,
            bands.splits,
            bands.split_tiles * config.rows,
            bands.items,
            **_shape(layers, config),
        ),
    )


def _launch_parts(layers: _Layers, config: LowRankConfig, scale: float, at_random: bool, seed: int) -> None:
    weight = layers.weights[0]
    count = len(layers.weights)
    lefts = _in_parts(layers.table[count:], layers.lefts[0], count, config)
    rights = _in_parts(layers.table[2 * count :], layers.rights[0].T, count, config)
    items = count * -(-weight.shape[0] // config.rows) * -(-weight.shape[1] // config.columns)
    add_low_rank_parts[(min(items, processors(weight.device)),)](
        layers.table,
        lefts,
        rights,
        count,
        *weight.shape,
        lefts.shape[2] // config.parts,
        weight.stride(0),
        scale,
        seed,
        items,
        OFFSETS=offset_type(config.rows * weight.stride(0), max(config.rows, config.columns) * lefts.shape[2]),
        **_options(layers, config, at_random),
    )


def _reach(matrix: Tensor) -> int:
    """Distance of the first and the last number of a matrix."""
    return sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))


def _in_parts(table: Tensor, factor: Tensor, count: int, config: LowRankConfig) -> Tensor:
    """Take the factors that the table starts with apart: (count, size, parts * rank), the rank rounded up."""
    size, rank = factor.shape
    part_rank = -(-rank // config.rank) * config.rank
    parts = factor.new_empty((count, size, config.parts * part_rank), dtype=torch.bfloat16)
    split_factors[(-(-size // 64), -(-part_rank // 64), count)](
        table,
        parts,
        size,
        rank,
        part_rank,
        *factor.stride(),
        PARTS=config.parts,
        SIZE=64,
        RANK=64,
        INTERPRETED=not factor.is_cuda,
        num_warps=4,
    )
    return parts
