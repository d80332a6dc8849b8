"""The CUDA kernels, compiled by nvcc: no spills where it matters, and the instructions that they were written for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-c"]
ALL_CHIPS = ("80", "86", "89", "90", "100")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_for(chips: tuple[str, ...], source: str, target: Path) -> dict[str, str]:
    """Compile for chips, and return what ptxas says of each kernel and chip, by their names."""
    code = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    words = ["nvcc", *FLAGS, *code, str(ROOT / "csrc" / source), "-o", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    # C7510: products wait for each other; C7508: a request for registers is ignored.
    assert not re.search(r"C75\d\d|warning", done.stderr), done.stderr
    found = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'(.*?)Used (\d+) registers", done.stderr, re.DOTALL)
    assert found
    return {f"{kernel} {chip}": report + registers for kernel, chip, report, registers in found}


def spills(report: str) -> int:
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def disassemble(binary: Path) -> str:
    triton = importlib.util.find_spec("triton")
    tool = shutil.which("cuobjdump")
    if tool is None and triton is not None and triton.origin is not None:
        tool = str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    return subprocess.run([tool, "--dump-sass", binary], capture_output=True, text=True, check=True).stdout


def test_second_moment_keeps_its_accumulator_in_registers(tmp_path: Path) -> None:
    binary = tmp_path / "second_moment_sm90.o"
    reports = compile_for(("90a",), "second_moment_sm90.cu", binary)
    assert len(reports) == 3
    assert not any(spills(report) for report in reports.values())
    code = disassemble(binary)
    assert "HGMMA.64x256x16.F32.BF16" in code
    assert re.search(r"HGMMA\S* \S+ gdesc\[\S+\]\.tnspA\.tnspB", code), "both operands are read as stored"
    assert "UTMALDG.2D.MULTICAST" in code
    assert "USETMAXREG" in code
    assert re.search(r"RED\S*\.F32", code) or "REDG" in code


@pytest.mark.parametrize(
    "chips", [("90",), pytest.param(ALL_CHIPS, marks=pytest.mark.slow)], ids=lambda chips: "-".join(chips)
)
def test_low_rank_update_spills_nothing_where_rows_are_whole_eights(tmp_path: Path, chips: tuple[str, ...]) -> None:
    reports = compile_for(chips, "low_rank_update.cu", tmp_path / "low_rank_update.o")
    # update<number, aligned, at_random>: Lb1 is true.
    hot = {name: report for name, report in reports.items() if re.search(r"ELb1ELb[01]E", name)}
    assert len(hot) == 5 * len(chips)
    assert not any(spills(report) for report in hot.values())


def test_neither_needs_the_driver_to_load(tmp_path: Path) -> None:
    text = "".join((ROOT / "csrc" / name).read_text() for name in ("second_moment_sm90.cu", "low_rank_update.cu"))
    called = set(re.findall(r"\bcu[A-Z]\w+\s*\(", text))
    assert called == set(), "driver functions are found at run time"
