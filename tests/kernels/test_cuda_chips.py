"""The chip that the CUDA kernel is compiled for, with compilers that know it and that do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux alone")

COMPILER = """#!/bin/sh
echo "$@" >> {log}
for word in "$@"; do
  case "$word" in
    -gencode=arch=compute_{unknown},*) echo "nvcc fatal   : Unsupported gpu architecture '$word'" >&2; exit 1 ;;
  esac
done
case " $* " in *" --dryrun "*) exit 0 ;; esac
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
"""Behaves as nvcc does to the build: it refuses chips that it does not know, and writes a file otherwise."""

BUILD = """
import pathlib, runpy, sys
arguments, sys.argv = sys.argv[1:], ["setup.py", "--version"]
setup = runpy.run_path("setup.py")
try:
    print(setup["compile_cuda"](arguments[0], pathlib.Path(arguments[1])))
except RuntimeError as error:
    print(error)
"""


def build(tmp_path: Path, unknown: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Compile with a compiler that does not know chips of a pattern; return what was said, and its calls."""
    compiler, log = tmp_path / "nvcc", tmp_path / "log"
    compiler.write_text(COMPILER.format(log=log, unknown=unknown))
    compiler.chmod(0o755)
    words = [sys.executable, "-c", BUILD, str(compiler), str(tmp_path / "objects")]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"ROCR_BUILD_EXT": "0"}, capture_output=True, text=True, check=True
    )
    return done, [line for line in log.read_text().splitlines() if "--dryrun" not in line]


def test_a_compiler_that_knows_the_chip_compiles_for_it_alone(tmp_path: Path) -> None:
    done, (moment,) = build(tmp_path, "100")
    assert re.findall(r",code=(\w+)", moment) == ["sm_90a"]
    assert done.stdout.strip().endswith("second_moment_sm90.cu.o")
    assert "WARNING" not in done.stderr


def test_a_compiler_that_is_too_old_is_named(tmp_path: Path) -> None:
    done, calls = build(tmp_path, "90a")
    assert "nvcc cannot compile second_moment_sm90.cu, which needs CUDA 12 or later" in done.stdout
    assert "compute_90a" in done.stdout
    assert calls == []
