"""The Triton kernels without a GPU: their schedule, and in a child process, the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from rocr_kernels._common import MAXIMUM_SPLITS, make_schedule
from rocr_kernels.grouped_second_moment import make_parts
from rocr_kernels.low_rank_configs import make_column_strips

pytestmark = pytest.mark.thorough
INTERPRETED = ("test_kernels_interpreted.py", "test_support_interpreted.py")


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_are_right_in_the_interpreter(chosen: str) -> None:
    # In a process of its own: Triton decides at import whether a kernel is compiled or interpreted.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            chosen,
            *(Path(__file__).with_name(name) for name in INTERPRETED),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize("tiles", [1, 42, 132, 133, 210, 272, 3192])
@pytest.mark.parametrize("tokens", [1, 64, 2000, 8193, 131072])
@pytest.mark.parametrize("programs", [1, 66, 132])
def test_a_schedule_covers_every_token_of_every_tile_once(tiles: int, tokens: int, programs: int) -> None:
    schedule = make_schedule(tiles, tokens, programs, token_step=64)
    assert 1 <= schedule.splits <= MAXIMUM_SPLITS
    assert schedule.items == schedule.whole + (tiles - schedule.whole) * schedule.splits
    if schedule.whole == tiles:
        assert schedule.slices == 0
        return
    assert schedule.split_tokens % 64 == 0
    shares = [min(schedule.split_tokens, tokens - start) for start in range(0, tokens, schedule.split_tokens)]
    assert len(shares) == schedule.splits
    assert min(shares) > 0


def rounds(tiles: int, tokens: int, programs: int) -> float:
    """Time of a launch over the time with all programs busy."""
    schedule = make_schedule(tiles, tokens, programs, token_step=64)
    rest = -(-schedule.slices // programs) * schedule.split_tokens / tokens
    return (-(-schedule.whole // programs) + rest) / (tiles / programs)


@pytest.mark.parametrize(("tiles", "bound"), [(42, 1.06), (210, 1.02), (272, 1.08), (3192, 1.01)])
def test_a_schedule_keeps_a_large_chip_busy(tiles: int, bound: float) -> None:
    assert rounds(tiles, 131072, 132) <= bound


@pytest.mark.parametrize("sizes", [[0, 0], [1], [5, 0, 70], [131072], [10530, 324, 573] * 40, [3, 200000, 0, 9]])
@pytest.mark.parametrize("programs", [1, 132])
def test_parts_cover_every_row_of_every_group_once(sizes: list[int], programs: int) -> None:
    offsets = [sum(sizes[:group]) for group in range(len(sizes) + 1)]
    found = make_parts(offsets, tiles=21, programs=programs, token_step=32)
    lengths = [part.end - part.start for part in found.parts]
    assert lengths == sorted(lengths, reverse=True)
    slices = {group: range(first, first + count) for group, first, count in found.split}
    assert sorted(index for each in slices.values() for index in each) == list(range(found.slices))
    for group, (start, end) in enumerate(pairwise(offsets)):
        parts = sorted((part for part in found.parts if part.group == group), key=lambda part: part.start)
        covered = [row for part in parts for row in (part.start, part.end)]
        assert covered[:1] + covered[-1:] == ([start, end] if start < end else [])
        assert covered[1:-1:2] == covered[2::2]
        assert [part.slice_index for part in parts] == list(slices.get(group, [-1] * len(parts)))
        assert len(parts) <= MAXIMUM_SPLITS


def test_groups_of_a_mixture_keep_a_large_chip_busy() -> None:
    tokens, programs, tiles = 131072, 132, 21
    zipf = [1 / (group + 1) ** 0.8 for group in range(128)]
    sizes = [int(tokens * each / sum(zipf)) for each in zipf]
    offsets = [sum(sizes[:group]) for group in range(129)]
    busy = [0] * programs
    for item in range(tiles * len(parts := make_parts(offsets, tiles, programs, 32).parts)):
        busy[item % programs] += parts[item // tiles].end - parts[item // tiles].start
    assert max(busy) <= 1.15 * sum(busy) / programs


@pytest.mark.parametrize("columns", [1, 12, 360, 528, 3584])
@pytest.mark.parametrize("tiles", [1, 18, 64, 128])
@pytest.mark.parametrize("programs", [3, 132, 528])
def test_column_strips_cover_every_tile_of_every_column_once(columns: int, tiles: int, programs: int) -> None:
    strips = make_column_strips(columns, tiles, programs)
    assert strips.items == strips.whole + (columns - strips.whole) * strips.splits
    assert strips.whole % programs == 0 or strips.whole == columns
    shares = [min(strips.split_tiles, tiles - start) for start in range(0, tiles, strips.split_tiles)]
    assert len(shares) == strips.splits and min(shares) > 0


@pytest.mark.parametrize(("columns", "tiles", "bound"), [(3584, 64, 1.01), (360, 18, 1.5), (112, 64, 1.2)])
def test_column_strips_keep_a_large_chip_busy(columns: int, tiles: int, bound: float) -> None:
    strips, programs = make_column_strips(columns, tiles, 132), 132
    rest = -(-(strips.items - strips.whole) // programs) * strips.split_tiles / tiles
    assert (strips.whole // programs + rest) / (columns / programs) <= bound
