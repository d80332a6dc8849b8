"""Every shipped configuration of the Triton kernels, compiled for its chips, which need not be there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

# ruff: noqa: E402
from rocr_kernels import low_rank_update, second_moment, support_solve
from rocr_kernels.grouped_second_moment import accumulate_grouped_second_moment
from rocr_kernels.low_rank_configs import resident_programs
from rocr_kernels.low_rank_update import LowRankPlan
from rocr_kernels.second_moment import accumulate_second_moments

from tests.support.kernel_launches import Launch, compile_launch, record_launches

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Shared memory of a program, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

REGISTERS = 65_536
"""Registers of a multiprocessor, which all its programs share."""

PROCESSOR_BYTES = {90: 233_472, 100: 233_472}
"""Shared memory of a multiprocessor; each program takes 1,024 bytes beside its own."""

CHIPS = (80, 90, 100)
"""Every configuration is compiled for these, or for those of them that it is for."""

ALWAYS = (
    90,
    "pointers 80",
    "tma_small 100",
    "resident_16 80",
    "resident_16 100",
    "bf16_splits 80",
)
"""What is compiled in every run; the rest is slow: all configurations for one chip, and some for the others."""

THOROUGH = ("tma_specialized 100", "column_strips_64 100", "column_strips_128 100")
"""What takes longer, and is compiled by `make thorough`."""

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return record_launches(monkeypatch, "cuda")


def check(compiled: Any, capability: int, tmp_path: Path) -> str:
    """Check shared memory, and that nothing is spilled; return the PTX."""
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    words = [CUOBJDUMP, "--dump-resource-usage", binary]
    report = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    assert registers <= 255
    assert stack == 0
    return compiled.asm["ptx"]


def multiplies_with(capability: int, rows: int) -> str:
    """The products' instruction: those of later chips take 64 rows at least."""
    if rows < 64:
        return "mma.sync"
    return {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma"}[capability // 10]


def case(config: str, dtype: torch.dtype, *rest: Any, slow: bool | None = None) -> Any:
    name = f"{config} {rest[-1]}"
    marks = [pytest.mark.thorough] if name in THOROUGH else []
    if slow is None:
        slow = rest[-1] not in ALWAYS and name not in (*ALWAYS, *THOROUGH)
    words = [config, str(dtype).removeprefix("torch."), *map(str, rest[:-1]), f"sm_{rest[-1]}"]
    return pytest.param(config, dtype, *rest, id="-".join(words), marks=pytest.mark.slow if slow else marks)


MOMENTS = {
    "tma_wide": (BFLOAT16, 4096),
    "tma_small": (BFLOAT16, 576),
    "tma_specialized": (BFLOAT16, 4096),
    "tma_bf16_splits": (FLOAT32, 576),
    "pointers": (BFLOAT16, 1536),
    "pointers_small": (BFLOAT16, 123),
    "pointers_bf16_splits": (FLOAT32, 1536),
}
"""Keys of each configuration: their dtype and width."""

MOMENT_CASES = [
    *(
        case(name, *keys, chip)
        for name, keys in MOMENTS.items()
        for chip in CHIPS
        if chip >= (100 if second_moment.CONFIGS[name].specialized else 90 if second_moment.CONFIGS[name].tma else 80)
    ),
    case("pointers", BFLOAT16, 1536, 89),
    case("pointers_bf16_splits", FLOAT32, 1536, 89),
    case("tma_wide", FLOAT16, 4096, 90, slow=True),
]

UPDATES = {
    "resident_16": (BFLOAT16, 16),
    "resident_32": (BFLOAT16, 32),
    "resident_16_float32": (FLOAT32, 16),
    "resident_32_float32": (FLOAT32, 32),
    "column_strips_64": (BFLOAT16, 64),
    "column_strips_128": (BFLOAT16, 128),
    "bf16_splits": (BFLOAT16, 128),
    "bf16_splits_float32": (FLOAT32, 128),
}
"""Weights of each configuration: their dtype, and the rank of the update."""

UPDATE_CASES = [
    *(
        case(name, *update, False, chip)
        for name, update in UPDATES.items()
        for chip in CHIPS
        if chip >= 90 or low_rank_update.CONFIGS[name].kind != "column_strips"
    ),
    case("column_strips_64", FLOAT16, 40, False, 90),
    case("column_strips_128", BFLOAT16, 100, False, 90, slow=True),
    case("resident_16", BFLOAT16, 1, False, 90),
    case("resident_16", FLOAT16, 16, True, 90),
    case("resident_32", BFLOAT16, 32, True, 90, slow=True),
    case("bf16_splits", BFLOAT16, 128, True, 80, slow=True),
    case("bf16_splits", BFLOAT16, 128, False, 86),
    case("bf16_splits_float32", FLOAT32, 128, False, 89),
    case("resident_16", FLOAT16, 16, True, 89),
    case("resident_32", BFLOAT16, 32, True, 89),
    case("bf16_splits", BFLOAT16, 128, True, 90, slow=True),
]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize("rank", [33, 64, 65, 128])
def test_ranks_up_to_128_stay_in_shared_memory_on_hopper_and_blackwell(rank: int, capability: tuple[int, int]) -> None:
    name = low_rank_update.choose_config(capability, BFLOAT16, rank, tma=True)
    assert name == f"column_strips_{64 if rank <= 64 else 128}"
    assert low_rank_update.choose_config((8, 0), BFLOAT16, rank, tma=True) == "bf16_splits"


def test_no_configuration_is_left_out() -> None:
    assert MOMENTS.keys() == second_moment.CONFIGS.keys()
    assert UPDATES.keys() == low_rank_update.CONFIGS.keys()


@pytest.mark.parametrize(("config", "dtype", "width", "capability"), MOMENT_CASES)
def test_second_moment_fits(
    launches: list[Any], tmp_path: Path, config: str, dtype: torch.dtype, width: int, capability: int
) -> None:
    # The wide tile is for large widths, of which one layer at a time comes.
    layers = 1 if config in ("tma_wide", "tma_specialized") else 2
    totals = [torch.empty(width, width)] * layers
    accumulate_second_moments(totals, [torch.empty(4096, width, dtype=dtype)] * layers, second_moment.CONFIGS[config])
    kernel, arguments = next(each for each in launches if "second_moments" in each[0].__name__)
    compiled = compile_launch(kernel, arguments, capability)
    ptx = check(compiled, capability, tmp_path)
    assert multiplies_with(capability, second_moment.CONFIGS[config].rows) in ptx
    if dtype == FLOAT32:
        assert adds_outside_of_products(compiled)
    assert ("ttg.warp_specialize" in compiled.asm["ttgir"]) == second_moment.CONFIGS[config].specialized
    if second_moment.CONFIGS[config].tma:
        check_copies(ptx, describes_once=layers == 1)
        programs = second_moment.CONFIGS[config].programs
        assert programs * (compiled.metadata.shared + 1024) <= PROCESSOR_BYTES[capability]
    elif width % 8 == 0:
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (0x)?(10|16)", ptx), "16 bytes at once"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("config", [name for name in MOMENTS if name.startswith("pointers")])
def test_grouped_second_moment_fits(launches: list[Any], tmp_path: Path, config: str, capability: int) -> None:
    dtype, width = MOMENTS[config]
    keys, shape = torch.empty(8192, width, dtype=dtype), second_moment.CONFIGS[config]
    accumulate_grouped_second_moment(torch.empty(3, width, width), keys, [0, 100, 100, 8192], shape)
    kernel, arguments = next(each for each in launches if "grouped" in each[0].__name__)
    compiled = compile_launch(kernel, arguments, capability)
    ptx = check(compiled, capability, tmp_path)
    assert multiplies_with(capability, shape.rows) in ptx
    if dtype == FLOAT32:
        assert adds_outside_of_products(compiled)
    if width % 8 == 0:
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (0x)?(10|16)", ptx), "16 bytes at once"


def check_copies(ptx: str, describes_once: bool) -> None:
    """Check that operands and sums move through TMA, and how often a program describes its memory."""
    assert re.search(r"cp\.async\.bulk\.tensor\.2d\.shared::(cluster|cta)\.global", ptx)
    adds = [match.start() for match in re.finditer(r"cp\.reduce\.async\.bulk\.tensor\.2d\S*\.add", ptx)]
    # Four pieces, each to a slice or to the total; where the diagonal crosses one, it is read and written back.
    stores = [match.start() for match in re.finditer(r"cp\.async\.bulk\.tensor\.2d\.global\S*\.shared", ptx)]
    assert len(adds) == 8 and len(stores) == 4
    waits = [match.start() for match in re.finditer(r"cp\.async\.bulk\.wait_group 0;", ptx)]
    assert len(waits) == 1 and waits[0] < min(*adds, *stores)
    descriptors = [match.start() for match in re.finditer(r"tensormap\.cp_fenceproxy", ptx)]
    assert all(place < start_of_loops(ptx) for place in descriptors) == describes_once


def start_of_loops(ptx: str) -> int:
    """Where the first label lies that a later branch goes back to."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    branches = re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)
    return min(labels[match[1]] for match in branches if labels[match[1]] < match.start())


def adds_outside_of_products(compiled: Any) -> bool:
    """Whether a loop adds a product to a sum; Triton likes to sum within the product, which tensor cores truncate."""
    text = compiled.asm["ttgir"]
    moves = re.search(r"(%\w+)\S* = tt\.elementwise_inline_asm \"mov\.b32", text)
    return (
        moves is not None and re.search(rf"arith\.addf %\w+, {moves[1]}\b|arith\.addf {moves[1]}\b", text) is not None
    )


@pytest.mark.parametrize(("config", "dtype", "rank", "stochastic", "capability"), UPDATE_CASES)
def test_low_rank_update_fits(
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: str,
    dtype: torch.dtype,
    rank: int,
    stochastic: bool,
    capability: int,
) -> None:
    monkeypatch.setattr(low_rank_update, "capability", lambda _: divmod(capability, 10))
    weights = [torch.empty(4096, 1536, dtype=dtype)] * 2
    lefts, rights = [torch.empty(4096, rank)] * 2, [torch.empty(rank, 1536)] * 2
    LowRankPlan(weights, lefts, rights, low_rank_update.CONFIGS[config]).run(0.5, stochastic, 1 << 40)
    kernel, arguments = next(each for each in launches if "add_low_rank" in each[0].__name__)
    compiled = compile_launch(kernel, arguments, capability)
    ptx = check(compiled, capability, tmp_path)
    shape = low_rank_update.CONFIGS[config]
    assert multiplies_with(capability, shape.rows) in ptx
    assert ("cvt.rn.bf16" in ptx) or dtype != BFLOAT16
    if shape.kind == "column_strips":
        assert re.search(r"cp\.async\.bulk\.tensor\.2d\.global\S*\.shared", ptx), "weights go back through TMA"
    else:
        assert re.search(r"st\.global\S*\.v4\.b32", ptx), "16 bytes at once"
    if config == "bf16_splits_float32":
        assert adds_outside_of_products(compiled)
    if shape.kind == "resident":
        programs = resident_programs(divmod(capability, 10), shape, stochastic)
        assert programs * 32 * arguments["num_warps"] * arguments["maxnreg"] <= REGISTERS


@pytest.mark.parametrize(("config", "capability"), [("resident_16", 80), ("column_strips_64", 90), ("bf16_splits", 90)])
def test_an_update_that_keeps_zeros_fits(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, capability: int
) -> None:
    monkeypatch.setattr(low_rank_update, "capability", lambda _: divmod(capability, 10))
    dtype, rank = UPDATES[config]
    operands = [torch.empty(4096, 1536, dtype=dtype)], [torch.empty(4096, rank)], [torch.empty(rank, 1536)]
    LowRankPlan(*operands, low_rank_update.CONFIGS[config], keep_zeros=True).run(0.5, False, 0)
    kernel, arguments = next(each for each in launches if "add_low_rank" in each[0].__name__)
    assert arguments["KEEP_ZEROS"] is True
    check(compile_launch(kernel, arguments, capability), capability, tmp_path)


@pytest.mark.parametrize("capability", [80, *(pytest.param(chip, marks=pytest.mark.slow) for chip in (90, 100))])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, torch.bool], ids=str)
def test_sums_on_a_support_fit(launches: list[Any], tmp_path: Path, dtype: torch.dtype, capability: int) -> None:
    keys = torch.empty(8, 1536)
    support_solve.products_on_support(torch.empty(4096, 1536, dtype=dtype), keys, keys)
    kernel, arguments = launches[0]
    compiled = compile_launch(kernel, arguments, capability)
    assert multiplies_with(capability, support_solve.TILE_ROWS) in check(compiled, capability, tmp_path)
    assert adds_outside_of_products(compiled)


@pytest.mark.parametrize("capability", [80, *(pytest.param(chip, marks=pytest.mark.slow) for chip in (90, 100))])
@pytest.mark.parametrize("size", [1, 8, support_solve.MAX_SIZE])
def test_systems_of_rows_fit(launches: list[Any], tmp_path: Path, size: int, capability: int) -> None:
    support_solve.solve_products(torch.empty(4096, size, size), torch.empty(4096, size), 0.5)
    kernel, arguments = launches[0]
    ptx = check(compile_launch(kernel, arguments, capability), capability, tmp_path)
    assert "fma.rn.f64" in ptx, "the systems are in float64"


@pytest.mark.parametrize("config", low_rank_update.CONFIGS)
def test_a_plan_makes_no_table_while_it_runs(launches: list[Any], monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """What a CUDA graph may capture."""
    dtype = FLOAT32 if low_rank_update.CONFIGS[config].bf16_splits == 3 else BFLOAT16
    operands = [torch.empty(64, 64, dtype=dtype)], [torch.empty(64, 8)], [torch.empty(8, 64)]
    plan = LowRankPlan(*operands, low_rank_update.CONFIGS[config])
    monkeypatch.setattr(low_rank_update, "address_table", None)
    plan.run(1.0, False, 0)
    assert launches
    with pytest.raises(TypeError):
        LowRankPlan(*operands)


def test_sizes_of_one_compile_as_the_constants_that_they_become(launches: list[Any], tmp_path: Path) -> None:
    accumulate_second_moments([torch.empty(1, 1)], [torch.empty(1, 1, dtype=BFLOAT16)])
    LowRankPlan([torch.empty(1, 1, dtype=BFLOAT16)], [torch.empty(1, 1)], [torch.empty(1, 1)]).run(1.0, True, 1)
    LowRankPlan([torch.empty(1, 1)], [torch.empty(1, 40)], [torch.empty(40, 1)]).run(1.0, False, 0)
    assert len(launches) == 5
    for kernel, arguments in launches:
        check(compile_launch(kernel, arguments, 90), 90, tmp_path)


def test_the_kernels_around_them_fit(launches: list[Any], tmp_path: Path) -> None:
    keys = [torch.empty(2500, 123)]
    accumulate_second_moments([torch.empty(123, 123)], keys, second_moment.CONFIGS["pointers_bf16_splits"])
    accumulate_grouped_second_moment(torch.empty(2, 123, 123), keys[0], [0, 1, 2500])
    LowRankPlan([torch.empty(64, 64)], [torch.empty(64, 40)], [torch.empty(40, 64)]).run(1.0, False, 0)
    names = {"split_keys", "add_slices", "add_group_slices", "split_factors"}
    found = {kernel.__name__: (kernel, arguments) for kernel, arguments in launches if kernel.__name__ in names}
    assert set(found) == names
    for kernel, arguments in found.values():
        check(compile_launch(kernel, arguments, 80), 80, tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_cuda_describes_keys_to_the_tensor_cores_as_triton_does(launches: list[Any], tmp_path: Path) -> None:
    # Two compilers, one memory layout: boxes of 64 columns, 128 bytes wide and swizzled, read across their rows.
    keys = [torch.empty(4096, 4096, dtype=BFLOAT16)]
    accumulate_second_moments([torch.empty(4096, 4096)], keys, second_moment.CONFIGS["tma_wide"])
    ptx = compile_launch(*launches[0], 90).asm["ptx"]
    shutil.copy(Path(__file__).parents[2] / "csrc/cuda_boxes.cuh", tmp_path)
    (tmp_path / "main.cpp").write_text(
        '#define __device__\n#include "cuda_boxes.cuh"\n#include <cstdio>\n'
        'int main() { std::printf("%llu", static_cast<unsigned long long>(rocr::sm90::describe(0))); }\n'
    )
    subprocess.run(["g++", "-std=c++17", "main.cpp", "-o", "main"], cwd=tmp_path, check=True)
    described = int(subprocess.run([tmp_path / "main"], capture_output=True, check=True).stdout)
    numbers = {int(word) for word in re.findall(r", (\d+);", ptx)}
    way_to_next_box = described & 0x3FFF << 16
    # The left operand's 64 rows are one box: its descriptor leaves the way to the next one out.
    assert described - way_to_next_box in numbers
    assert numbers & {described, way_to_next_box}
