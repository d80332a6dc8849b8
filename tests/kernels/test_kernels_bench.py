"""The GPU bench without a GPU: it says what it needs, and its rows run at small shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.thorough

SCRIPT = Path(__file__).parents[2] / "benches/gpu.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("benches/gpu.py needs an NVIDIA GPU, and torch sees none here")
    assert done.stdout == ""


def test_its_kernel_rows_run_at_small_shapes() -> None:
    done = run("--tiny", "second-moment", "second-moments", "experts", "update-1", "update-16", "solve-1000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == 7, done.stdout
    assert "| second moments of experts |" in done.stdout


def test_a_row_after_the_limit_is_named() -> None:
    done = run("--tiny", "--limit", "-1", "update-16")
    assert done.returncode == 1
    assert "update-16: TimeoutError: not measured, since -1 s had passed before it" in done.stderr


def test_rank_one_is_compared_with_exact_factors_and_clocks_are_read() -> None:
    code = (
        "import torch\n"
        "from gpu_kernels import low_rank_update\n"
        "from gpu_timing import clocks, parse_clocks\n"
        "bench = lambda rank: low_rank_update(torch.device('cpu'), 2, (24, 40), rank, 2, (1, 1))[0]\n"
        "row = bench(1)\n"
        "assert 'addcmul_' in row.times and row.baseline in ('addmm_', 'addcmul_')\n"
        "assert row.error['addcmul_'] <= row.error['addmm_']\n"
        "assert 'addcmul_' not in bench(2).times\n"
        "found = parse_clocks('1980 MHz, 3201 MHz, 412.10 W, 45, 0x0000000000000000')\n"
        "assert found['clocks.sm'] == '1980 MHz' and found['temperature.gpu'] == '45'\n"
        "assert set(parse_clocks('unknown').values()) == {'unknown'} and clocks(torch.device('cpu')) == {}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, timeout=600)


@pytest.mark.slow
def test_every_row_runs_at_small_shapes() -> None:
    done = run("--tiny")
    assert done.returncode == 0, done.stderr
