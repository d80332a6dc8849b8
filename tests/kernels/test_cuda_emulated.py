"""The code of the CUDA kernels, run by threads of the CPU: what it computes, not how the chip carries it out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from rocr_kernels._common import make_schedule

ROOT = Path(__file__).parents[2]
TILE = 256
TOKEN_STEP = 64

TWO_ROUNDINGS = 1.001
"""Error over that of one rounding of the exact result: 1.0000 was measured; a second rounding gives 1.07 or more."""

SUM_OF_FLOAT32 = 1e-5
"""Relative error of 9,000 float32 additions one after the other; 6.0e-6 was measured."""

pytestmark = [pytest.mark.thorough, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]


def build(name: str, sources: list[str], folder: Path) -> Path:
    for path in [ROOT / "csrc" / each for each in sources]:
        shutil.copy(path, folder)
    shutil.copy(ROOT / "tests/kernels/emulated/meeting.h", folder)
    for path in (ROOT / "tests/kernels/emulated" / name).iterdir():
        shutil.copy(path, folder)
    words = ["g++", "-std=c++20", "-O2", "-pthread", "-D__device__=", "-D__host__=", "main.cpp", "-o", name]
    subprocess.run(words, cwd=folder, check=True, timeout=600)
    return folder / name


@pytest.fixture(scope="module")
def second_moment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = ["second_moment_sm90.cuh", "cuda_boxes.cuh", "cuda_triangle.cuh", "cuda_kernels.h", "simd.h"]
    return build("second_moment", sources, tmp_path_factory.mktemp("second_moment"))


@pytest.fixture(scope="module")
def low_rank_update(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = ["low_rank_update.cuh", "cuda_rounding.cuh", "cuda_kernels.h", "simd.h"]
    return build("low_rank_update", sources, tmp_path_factory.mktemp("low_rank_update"))


def second_moment_error(
    program: Path, width: int, tokens: int, layers: int, clusters: int, eager: bool, splits: int = 0
) -> float:
    blocks = -(-width // TILE)
    tiles = layers * blocks * (blocks + 1) // 2
    schedule = make_schedule(tiles, tokens, clusters, TOKEN_STEP)
    whole, used_splits, split_tokens, items = schedule.whole, schedule.splits, schedule.split_tokens, schedule.items
    if splits:
        split_tokens = -(-tokens // (splits * TOKEN_STEP)) * TOKEN_STEP
        whole, used_splits = 1, splits
        items = 1 + (tiles - 1) * splits
    words = [width, tokens, layers, clusters, whole, used_splits, split_tokens, items, int(eager), width + tokens]
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(
    ("width", "tokens", "layers", "clusters", "eager"),
    [
        (8, 1, 1, 1, False),
        (300, 400, 1, 1, True),
        (264, 400, 2, 2, False),
        (520, 200, 1, 4, False),
        (64, 8300, 1, 1, False),
    ],
)
def test_second_moment_is_right_whenever_copies_and_products_happen(
    second_moment: Path, width: int, tokens: int, layers: int, clusters: int, eager: bool
) -> None:
    assert second_moment_error(second_moment, width, tokens, layers, clusters, eager) < SUM_OF_FLOAT32


def test_second_moment_adds_up_the_slices_of_shared_tiles(second_moment: Path) -> None:
    assert second_moment_error(second_moment, 264, 500, 1, 2, False, splits=3) < SUM_OF_FLOAT32


def test_a_fault_in_the_protocol_shows(second_moment: Path, tmp_path: Path) -> None:
    for path in second_moment.parent.iterdir():
        shutil.copy(path, tmp_path)
    kernel = tmp_path / "second_moment_sm90.cuh"
    code = kernel.read_text()
    faulty = code.replace("wait_for_products<1>();", "wait_for_products<2>();")
    assert faulty != code
    kernel.write_text(faulty)
    words = ["g++", "-std=c++20", "-O1", "-pthread", "-D__device__=", "-D__host__=", "main.cpp", "-o", "faulty"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=600)
    assert second_moment_error(tmp_path / "faulty", 300, 700, 1, 1, eager=False) > 1e-2


@dataclass(frozen=True)
class Update:
    """One call of the low-rank kernel."""

    layers: int
    rows: int
    columns: int
    rank: int
    dtype: torch.dtype
    transposed: bool = False
    stochastic: bool = False
    scale: float = 1.0
    seed: int = 5


def stored(tensors: list[Tensor]) -> bytes:
    return b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in tensors)


def run_update(
    program: Path, update: Update, weights: list[Tensor], lefts: list[Tensor], rights: list[Tensor]
) -> list[Tensor]:
    """Weights after the update; their rows lie 8 numbers further apart than they are long, and NaN is in between."""
    stride = -(-update.columns // 8) * 8 + 8
    padded = [torch.full((update.rows, stride), torch.nan, dtype=update.dtype) for _ in weights]
    for target, weight in zip(padded, weights, strict=True):
        target[:, : update.columns] = weight
    if update.transposed:
        lefts, rights = [each.T for each in lefts], [each.T for each in rights]
    memory = program.parent / "operands"
    memory.write_bytes(stored(padded) + stored(lefts) + stored(rights))
    dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[update.dtype]
    whole_eights = int(update.columns % 8 == 0)
    words = [update.layers, update.rows, update.columns, update.rank, stride, dtype, whole_eights]
    words += [int(update.stochastic), update.rows if update.transposed else 1]
    subprocess.run(
        [program, memory, *map(str, words), str(update.scale), str(update.seed), "2"], check=True, timeout=600
    )
    result = torch.from_numpy(np.fromfile(memory, dtype=np.uint8)).view(update.dtype)
    result = result.view(update.layers, update.rows, stride)
    assert result[:, :, update.columns :].isnan().all()
    return list(result[:, :, : update.columns])


def random_operands(update: Update) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(update.rows * update.columns + update.rank)

    def draw(*shape: int) -> list[Tensor]:
        return list(torch.randn(update.layers, *shape, generator=generator))

    weights = [each.to(update.dtype) for each in draw(update.rows, update.columns)]
    return weights, draw(update.rows, update.rank), draw(update.rank, update.columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "transposed"),
    [(1, 1, 1, False), (63, 123, 3, False), (40, 520, 16, False), (33, 264, 17, True), (64, 256, 40, False)],
)
def test_low_rank_update_rounds_the_exact_result_once(
    low_rank_update: Path, rows: int, columns: int, rank: int, transposed: bool, dtype: torch.dtype
) -> None:
    update = Update(2, rows, columns, rank, dtype, transposed, scale=-0.5)
    weights, lefts, rights = random_operands(update)
    results = run_update(low_rank_update, update, weights, lefts, rights)
    for weight, left, right, result in zip(weights, lefts, rights, results, strict=True):
        exact = weight.double() - 0.5 * (left.double() @ right.double())
        error = (result.double() - exact).norm()
        torch_error = (torch.addmm(weight.float(), left, right, alpha=-0.5).to(dtype).double() - exact).norm()
        assert error <= TWO_ROUNDINGS * torch_error + 1e-7 * exact.norm() * (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_low_rank_update_is_right_on_average(low_rank_update: Path, dtype: torch.dtype) -> None:
    update = Update(1, 64, 512, 1, dtype, stochastic=True)
    weight = torch.ones(64, 512, dtype=dtype)
    step = torch.finfo(dtype).eps
    left, right = torch.full((64, 1), step), torch.full((1, 512), 0.3)
    (first,) = run_update(low_rank_update, update, [weight], [left], [right])
    assert set(first.unique().tolist()) == {1.0, 1.0 + step}
    share = (first > 1).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * (0.21 / first.numel()) ** 0.5)
    (again,) = run_update(low_rank_update, update, [weight], [left], [right])
    assert torch.equal(first, again)


def test_stochastic_low_rank_update_is_golden(
    low_rank_update: Path, philox_update: Any, joint_digest: Callable[..., str]
) -> None:
    given = philox_update
    update = Update(2, 40, 72, 5, given.dtype, stochastic=True, scale=given.scale, seed=given.seed)
    results = run_update(low_rank_update, update, given.weights, given.lefts, given.rights)
    assert joint_digest(results) == given.digest


def test_stochastic_low_rank_update_keeps_its_odds_below_the_normal_numbers(low_rank_update: Path) -> None:
    update = Update(1, 64, 512, 1, torch.float16, stochastic=True)
    left, right = torch.full((64, 1), 2.0**-24), torch.full((1, 512), 5.25)
    (result,) = run_update(low_rank_update, update, [torch.zeros(64, 512, dtype=torch.float16)], [left], [right])
    assert set((result.double() * 2**24).unique().tolist()) == {5.0, 6.0}
    assert (result.double() * 2**24).mean().item() == pytest.approx(5.25, abs=5 * (0.1875 / 32768) ** 0.5)
