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
    done = run("--tiny", "second-moment", "second-moments", "update-16", "solve-1000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == 5, done.stdout


@pytest.mark.slow
def test_every_row_runs_at_small_shapes() -> None:
    done = run("--tiny")
    assert done.returncode == 0, done.stderr
