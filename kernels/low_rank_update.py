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
from rocr_kernels.launch import address_table, capability, has_small_memory, processors, registers
from rocr_kernels.low_rank_parts import add_low_rank_parts, split_factors
from rocr_kernels.low_rank_tiles import add_low_rank
from torch import Tensor

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

MAXIMUM_BAND_TILES = 32
"""Most tiles of a band that one item walks down."""

ITEMS_PER_PROGRAM = 8
"""Items that a program gets where there are enough: the last ones then end close together."""

PART_BYTES = 1 << 30
"""Most memory for the parts of the factors of one launch; more layers go in several."""


@dataclass(frozen=True)
class LowRankConfig:
    """Shape of a launch.

    Attributes:
        resident: right stays with its program (low_rank_tiles), or both factors are split first (low_rank_parts).
        parts: bfloat16 parts of a factor.
        rows, columns: of a tile.
        rank: the largest rank of a resident launch, or the step of the rank loop.
        warps, stages: warps of a program, and steps that are loaded ahead.
    """

    resident: bool
    parts: int
    rows: int
    columns: int
    rank: int
    warps: int
    stages: int


CONFIGS = {
    "resident_16": LowRankConfig(True, 2, 64, 64, rank=16, warps=4, stages=3),
    "resident_32": LowRankConfig(True, 2, 64, 64, rank=32, warps=4, stages=3),
    "resident_16_float32": LowRankConfig(True, 3, 64, 64, rank=16, warps=4, stages=3),
    "resident_32_float32": LowRankConfig(True, 3, 64, 64, rank=32, warps=4, stages=3),
    "parts": LowRankConfig(False, 2, 128, 128, rank=32, warps=8, stages=3),
    "parts_float32": LowRankConfig(False, 3, 128, 64, rank=32, warps=8, stages=3),
}
"""Every configuration that ships; nothing is tuned at run time, since a trial launch would change the weights."""


def choose_config(compute_capability: tuple[int, int], dtype: torch.dtype, rank: int) -> str:
    """Name the configuration for a chip, the dtype of the weights and the rank."""
    suffix = "_float32" if dtype == torch.float32 else ""
    if rank > 32 or (suffix and has_small_memory(compute_capability)):
        return "parts" + suffix
    return f"resident_{16 if rank <= 16 else 32}{suffix}"


def resident_programs(compute_capability: tuple[int, int], config: LowRankConfig, at_random: bool) -> int:
    """Programs of a resident launch on one multiprocessor: one waits for its tile while another multiplies.

    As many as the registers are for, and the 100 KiB of shared memory of a consumer chip.
    """
    return 2 if at_random or config.parts == 3 or has_small_memory(compute_capability) else 3


@dataclass(frozen=True)
class _Layers:
    """Layers of one shape, dtype and layout, which one launch can serve.

    Attributes:
        weights: with unit stride along a row; a weight that lies transposed comes as its transpose, and its factors
            swapped.
        table: addresses of weights, of lefts and of rights, then the layers' numbers, int64, on the device.
    """

    weights: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    table: Tensor


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
        for layers in self._launches:
            weight = layers.weights[0]
            name = choose_config(capability(weight.device), weight.dtype, layers.lefts[0].shape[1])
            config = self._config or CONFIGS[name]
            launch = _launch_resident if config.resident else _launch_parts
            launch(layers, config, scale, at_random and weight.dtype != torch.float32, seed)


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
    return _Layers(weights, lefts, rights, address_table([weights, lefts, rights], numbers))


def _options(layers: _Layers, config: LowRankConfig, at_random: bool) -> dict[str, object]:
    """Compile-time arguments that both kernels take."""
    weight = layers.weights[0]
    step = 16 // weight.element_size()
    tensors = (*layers.weights, *layers.lefts, *layers.rights)
    on_16_bytes = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return {
        "TYPE": TYPES[weight.dtype],
        "ALIGNED": on_16_bytes and weight.stride(0) % 8 == 0 and weight.shape[1] % max(step, 8) == 0,
        "AT_RANDOM": at_random,
        "PARTS": config.parts,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "RANK": config.rank,
        "STAGES": config.stages,
        "INTERPRETED": not weight.is_cuda,
        "num_warps": config.warps,
    }


def _launch_resident(layers: _Layers, config: LowRankConfig, scale: float, at_random: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    per_processor = resident_programs(capability(weight.device), config, at_random)
    programs = per_processor * processors(weight.device)
    bands = len(layers.weights) * -(-weight.shape[1] // config.columns)
    tiles = -(-weight.shape[0] // config.rows)
    # Long bands read right less often and keep loads in flight; short ones share the work more evenly.
    band_tiles = min(MAXIMUM_BAND_TILES, max(1, bands * tiles // (ITEMS_PER_PROGRAM * programs)))
    items = bands * -(-tiles // band_tiles)
    add_low_rank[(min(items, programs),)](
        layers.table,
        len(layers.weights),
        *weight.shape,
        left.shape[1],
        weight.stride(0),
        *left.stride(),
        *right.stride(),
        scale,
        seed,
        band_tiles * config.rows,
        items,
        maxnreg=registers(per_processor, config.warps),
        **_options(layers, config, at_random),
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
        **_options(layers, config, at_random),
    )


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
