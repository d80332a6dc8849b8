"""The CUDA kernel, compiled by nvcc: no spills, and the instructions that it was written for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-c"]

pytestmark = [pytest.mark.thorough, pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")]


def compile_kernel(target: Path) -> dict[str, str]:
    """Compile the source, and return what ptxas says of each kernel, by their names."""
    code = "-gencode=arch=compute_90a,code=sm_90a"
    words = ["nvcc", *FLAGS, code, str(ROOT / "csrc/second_moment_sm90.cu"), "-o", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    # C7510: products wait for each other; C7508: a request for registers is ignored.
    assert not re.search(r"C75\d\d|warning", done.stderr), done.stderr
    found = re.findall(r"Compiling entry function '(\S+)' for 'sm_90a'(.*?)Used \d+ registers", done.stderr, re.DOTALL)
    assert found
    return dict(found)


def spills(report: str) -> int:
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def cuobjdump(*words: str | Path) -> str:
    triton = importlib.util.find_spec("triton")
    tool = shutil.which("cuobjdump")
    if tool is None and triton is not None and triton.origin is not None:
        tool = str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout


def test_second_moment_keeps_its_accumulator_in_registers(tmp_path: Path) -> None:
    binary = tmp_path / "second_moment_sm90.o"
    reports = compile_kernel(binary)
    assert len(reports) == 3
    assert not any(spills(report) for report in reports.values())
    code = cuobjdump("--dump-sass", binary)
    assert "HGMMA.64x256x16.F32.BF16" in code
    assert re.search(r"HGMMA\S* \S+ gdesc\[\S+\]\.tnspA\.tnspB", code), "both operands are read as stored"
    assert "UTMALDG.2D.MULTICAST" in code
    assert "USETMAXREG" in code
    assert re.search(r"RED\S*\.F32", code) or "REDG" in code
    for kernel in code.split("Function : ")[1:]:
        steps = re.findall(r"\b(HGMMA|MEMBAR|ERRBAR|CCTL)\b", kernel)
        products = [i for i, step in enumerate(steps) if step == "HGMMA"]
        between = set(steps[products[0] : products[-1]]) if products else set()
        assert between <= {"HGMMA"}, "no memory fence stands between two products"


def test_it_needs_no_driver_to_load() -> None:
    text = (ROOT / "csrc/second_moment_sm90.cu").read_text()
    called = set(re.findall(r"\bcu[A-Z]\w+\s*\(", text))
    assert called == set(), "driver functions are found at run time"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rocr._C as an installation builds it where nvcc is."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    folder = tmp_path_factory.mktemp("built")
    words = ["build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    wanted = {name: value for name, value in os.environ.items() if name not in ("ROCR_CUDA", "ROCR_BUILD_EXT")}
    subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=ROOT, env=wanted, check=True, timeout=1800)
    (module,) = (folder / "lib" / "rocr").glob("_C*.so")
    return module


@pytest.mark.slow
def test_the_module_holds_code_for_its_chip_alone(built: Path) -> None:
    assert set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf", built))) == {"sm_90a"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_module_links_neither_the_driver_nor_torch(built: Path) -> None:
    dynamic = subprocess.run(["readelf", "--dynamic", built], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(\S+?)\.so", dynamic)
    assert set(needed) <= {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('rocr._C', {str(built)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cuda_error(2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "out of memory\n"
