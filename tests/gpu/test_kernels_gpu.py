"""The GPU backends on a GPU: against float64 and torch, the same bytes every time, and no byte out of place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rocr import ops
from rocr.errors import InputError
from rocr.ops import reference, triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

ERROR_OVER_TORCH = 1.5
"""Bound of a kernel's error over that of torch in float32; every shape here keeps it on an H200."""

TRUNCATED_SUM = 2e-5
"""What tensor cores may lose of 8,192 products of one sign by truncating their sums (Khattak, arXiv 2512.07004)."""

SMALL_SHAPES = (
    "(second_moment_of_odd_shapes and 63-136) or triangle_alone"
    " or (low_rank_update_of_odd_shapes and (63-123 or 130-264-100))"
)
"""What compute-sanitizer runs, which takes many times as long."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENT_BACKENDS = ("triton", "cuda", "torch")
SIXTEEN_BIT = DTYPES[1:]


def require(backend: str) -> None:
    if backend not in ops.available_backends("cuda"):
        pytest.skip(f"the backend {backend} is not built for this device")


def moment_errors(total: Tensor, keys: Tensor, backend: str) -> tuple[float, float]:
    exact = total.double() + reference.second_moment(keys)
    by_torch = torch.addmm(total, keys.float().T, keys.float())
    ops.accumulate_second_moment(total, keys, backend=backend)

    def error(result: Tensor) -> float:
        return ((result.double() - exact).tril().norm() / exact.tril().norm()).item()

    return error(total), error(by_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (63, 136), (123, 63), (700, 520), (3000, 1544), (9000, 264)])
@pytest.mark.parametrize("backend", MOMENT_BACKENDS)
def test_second_moment_of_odd_shapes(backend: str, tokens: int, width: int, dtype: torch.dtype) -> None:
    require(backend)
    if backend == "cuda" and (dtype == torch.float32 or width % 8):
        pytest.skip("the CUDA kernel takes rows of 16 bytes")
    keys = torch.randn(tokens, width, device="cuda").to(dtype)
    ours, of_torch = moment_errors(torch.randn(width, width, device="cuda"), keys, backend)
    assert ours <= ERROR_OVER_TORCH * of_torch + (TRUNCATED_SUM if dtype != torch.float32 else 2e-6)


@pytest.mark.parametrize("backend", MOMENT_BACKENDS)
@pytest.mark.parametrize("tokens", [300, 20000])
def test_second_moment_writes_the_lower_triangle_alone(
    backend: str, tokens: int, left_alone: Callable[[Tensor], Tensor]
) -> None:
    require(backend)
    memory = left_alone(torch.empty(524, 544)).cuda()
    inside = memory[2:522, 8:528]
    lower = torch.ones(520, 520, dtype=torch.bool, device="cuda").tril()
    inside[lower] = 0
    before = memory.clone()
    keys = torch.full((tokens, 536), torch.nan, device="cuda", dtype=torch.bfloat16)
    keys[:, 8:528] = torch.randn(tokens, 520, device="cuda")
    ops.accumulate_second_moment(inside, keys[:, 8:528], backend=backend)
    written = torch.zeros_like(memory, dtype=torch.bool)
    written[2:522, 8:528] = lower
    assert memory[written].isfinite().all()
    assert torch.equal(memory.view(torch.int32)[~written], before.view(torch.int32)[~written])


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("width", [576, 1536, 4096])
@pytest.mark.parametrize("backend", MOMENT_BACKENDS)
def test_second_moments_repeat_bit_for_bit(backend: str, width: int, layers: int) -> None:
    require(backend)
    keys = [torch.randn(20000, width, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    first = [torch.zeros(width, width, device="cuda") for _ in keys]
    ops.accumulate_second_moments(first, keys, backend=backend)
    for _ in range(3):
        again = [torch.zeros(width, width, device="cuda") for _ in keys]
        ops.accumulate_second_moments(again, keys, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    exact = reference.second_moment(keys[-1][:, :64]).tril()
    torch.testing.assert_close(first[-1][:64, :64].tril().double(), exact, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "width"), [([1, 0, 63], 63), ([0, 700, 0, 5000, 33], 136), ([20000, 10, 0], 520)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_grouped_second_moments(backend: str, sizes: list[int], width: int, dtype: torch.dtype) -> None:
    require(backend)
    keys = torch.randn(sum(sizes), width, device="cuda").to(dtype)
    start = torch.randn(len(sizes), width, width, device="cuda")
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0)
    totals, again = start.clone(), start.clone()
    ops.accumulate_grouped_second_moment(totals, keys, offsets, backend)
    ops.accumulate_grouped_second_moment(again, keys, offsets.cpu(), backend)
    assert torch.equal(totals, again)
    assert torch.equal(totals.triu(1), start.triu(1))
    groups = zip(start, keys.split(sizes), strict=True)
    exact = torch.stack([total.double() + reference.second_moment(each) for total, each in groups]).tril()
    error = ((totals.double().tril() - exact).norm() / exact.norm()).item()
    assert error <= (TRUNCATED_SUM if dtype != torch.float32 else 2e-6)


def update_errors(weight: Tensor, left: Tensor, right: Tensor) -> tuple[float, float]:
    exact = reference.updated_weight(weight, left, right, 0.7)
    by_torch = torch.addmm(weight.float(), left, right, alpha=0.7).to(weight.dtype)
    ops.low_rank_update(weight, left, right, scale=0.7, backend="triton")
    return (weight.double() - exact).norm().item(), (by_torch.double() - exact).norm().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        (1, 1, 1),
        (63, 123, 1),
        (123, 200, 16),
        (130, 264, 17),
        (576, 1536, 32),
        (264, 520, 40),
        (130, 264, 100),
        (1100, 1032, 128),
        (264, 520, 130),
        (100, 136, 4096),
    ],
)
def test_low_rank_update_of_odd_shapes(
    rows: int, columns: int, rank: int, transposed: bool, dtype: torch.dtype
) -> None:
    require("triton")
    weight = torch.randn(rows, columns, device="cuda").to(dtype)
    weight = weight.T.contiguous().T if transposed else weight
    left, right = torch.randn(rows, rank, device="cuda"), torch.randn(rank, columns, device="cuda") / rank**0.5
    ours, of_torch = update_errors(weight, left, right)
    assert ours <= ERROR_OVER_TORCH * of_torch + 1e-6 * weight.float().norm().item()


@pytest.mark.parametrize("rank", [16, 50, 128])
def test_layers_of_one_call_are_updated_alone_and_the_same_every_time(rank: int) -> None:
    require("triton")
    lefts = [torch.randn(130, rank, device="cuda") for _ in range(150)]
    rights = [torch.randn(rank, 264, device="cuda") for _ in lefts]
    memory = torch.randn(150, 132, 280, device="cuda", dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        written = memory.clone()
        ops.low_rank_update([each[1:131, 8:272] for each in written], lefts, rights, backend="triton")
        results.append(written)
    assert torch.equal(*results)
    expected = memory.float()
    for each, left, right in zip(expected, lefts, rights, strict=True):
        each[1:131, 8:272] += left @ right
    torch.testing.assert_close(results[0].float(), expected, rtol=2**-7, atol=1e-3)
    results[0][:, 1:131, 8:272] = memory[:, 1:131, 8:272]
    assert torch.equal(results[0], memory)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_stochastic_rounding_repeats_and_is_right_on_average(dtype: torch.dtype) -> None:
    require("triton")
    step = torch.finfo(dtype).eps
    left, right = torch.full((256, 1), step, device="cuda"), torch.full((1, 512), 0.3, device="cuda")
    results = []
    for seed in (3, 3, 4):
        weight = torch.ones(256, 512, device="cuda", dtype=dtype)
        ops.low_rank_update(weight, left, right, rounding="stochastic", seed=seed, backend="triton")
        results.append(weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert set(results[0].unique().tolist()) == {1.0, 1.0 + step}
    share = (results[0] > 1).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * (0.21 / weight.numel()) ** 0.5)


def test_a_compiled_function_updates_in_place() -> None:
    require("triton")
    operator = triton_backend.low_rank_update_op
    left, right = torch.randn(64, 2, device="cuda"), torch.randn(2, 64, device="cuda")

    def edit(weight: Tensor) -> Tensor:
        operator([weight], [left], [right], 1.0, False, 0)
        return weight.sum()

    weight = torch.randn(64, 64, device="cuda")
    other = weight.clone()
    torch.testing.assert_close(torch.compile(edit, fullgraph=True)(other), edit(weight))
    assert torch.equal(other, weight)


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_a_graph_repeats_a_second_moment_that_copies_no_table(backend: str) -> None:
    require(backend)
    keys = torch.randn(300, 72, device="cuda", dtype=torch.bfloat16)
    expected, total = torch.zeros(72, 72, device="cuda"), torch.zeros(72, 72, device="cuda")
    ops.accumulate_second_moment(expected, keys, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.accumulate_second_moment(total, keys, backend=backend)
    assert not total.any()
    graph.replay()
    assert torch.equal(total, expected)


def test_a_graph_repeats_an_update_by_torch() -> None:
    start, left, right = (torch.randn(size, device="cuda") for size in ((64, 72), (64, 3), (3, 72)))
    expected, weight = start.clone(), start.clone()
    ops.low_rank_update(expected, left, right, backend="torch")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.low_rank_update(weight, left, right, backend="torch")
    assert torch.equal(weight, start)
    graph.replay()
    assert torch.equal(weight, expected)


def test_triton_refuses_to_be_captured() -> None:
    require("triton")
    weight, left, right = (torch.randn(size, device="cuda") for size in ((64, 72), (64, 3), (3, 72)))
    before = weight.clone()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(InputError, match="cannot be captured"):
        ops.low_rank_update(weight, left, right, backend="triton")
    assert torch.equal(weight, before)


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, from CUDA_HOME, PATH, or where CUDA is by default."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin", *map(Path, os.get_exec_path())]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, folders)))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_a_sanitizer_finds_nothing(tool: str) -> None:
    """memcheck: accesses out of bounds; racecheck: races in shared memory; synccheck: barriers that threads miss."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip(
            f"{tool} did not run: compute-sanitizer is neither in CUDA_HOME/bin nor on PATH; "
            "it comes with the CUDA toolkit, package cuda-sanitizer"
        )
    words = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    # What torch asks CUDA in vain is no fault of a kernel: accesses alone are reported.
    words += ["--report-api-errors", "no"] if tool == "memcheck" else []
    words += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", SMALL_SHAPES, __file__]
    # Without torch's cache every tensor is an allocation of its own, and what lies beyond it is out of bounds.
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(words, env=alone, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert summary in done.stdout + done.stderr
    assert " passed" in done.stdout
