"""The code of the CUDA kernel, run by threads of the CPU: what it computes, not how the chip carries it out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from rocr_kernels._common import make_schedule

ROOT = Path(__file__).parents[2]
TILE = 256
TOKEN_STEP = 64

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
