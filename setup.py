"""Build of rocr; the metadata is in pyproject.toml."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CUDA_SOURCE = "second_moment_sm90.cu"
CUDA_CODE = "-gencode=arch=compute_90a,code=sm_90a"  # wgmma is for sm_90a alone


def find_nvcc() -> str | None:
    """Return the path of CUDA's compiler, from CUDA_HOME, else PATH; ROCR_CUDA=0 leaves the CUDA kernels out."""
    if os.environ.get("ROCR_CUDA", "1") == "0" or sys.platform != "linux":
        return None
    home = os.environ.get("CUDA_HOME")
    in_home = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    return in_home or shutil.which("nvcc")


def require_known_chip(nvcc: str) -> None:
    """Raise a RuntimeError if this nvcc is too old to compile for sm_90a."""
    # It checks the names and compiles nothing; --list-gpu-code leaves sm_90a out.
    words = [nvcc, "--dryrun", CUDA_CODE, "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        refusal = " ".join(done.stderr.split())
        raise RuntimeError(f"{nvcc} cannot compile {CUDA_SOURCE}, which needs CUDA 12 or later: {refusal}")


def compile_cuda(nvcc: str, folder: Path) -> str:
    """Compile the CUDA kernel, and return the object file."""
    require_known_chip(nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    target = str(folder / f"{CUDA_SOURCE}.o")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xfatbin", "-compress-all"]
    subprocess.run([nvcc, *flags, CUDA_CODE, "-c", str(Path("csrc") / CUDA_SOURCE), "-o", target], check=True)
    return target


def cuda_link_arguments(nvcc: str) -> list[str]:
    """Return what links CUDA's runtime into the module; the driver's library is looked up when it runs."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    folders = re.findall(r'"-L([^"]+)"', plan.stderr)
    if not any((Path(folder) / "libcudart_static.a").exists() for folder in folders):
        raise FileNotFoundError(f"libcudart_static.a is in none of {folders}")
    return [*(f"-L{folder}" for folder in folders), "-lcudart_static", "-lrt", "-ldl"]


def extensions() -> list[Pybind11Extension]:
    """Return the compiled part, rocr._C; ROCR_BUILD_EXT=0 leaves it out."""
    if os.environ.get("ROCR_BUILD_EXT", "1") == "0":
        return []
    compiled = Pybind11Extension(
        "rocr._C",
        sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for pattern in ("*.h", "*.cu", "*.cuh") for path in Path("csrc").glob(pattern)),
        cxx_std=17,
        # Every file names the instruction sets of its functions itself: the result runs on any machine.
        extra_compile_args=["-O3", "-ffp-contract=fast"],
        extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
    )
    return [compiled]


class OptionalBuild(build_ext):
    """Compile rocr._C, or say why not and go on: without it, rocr runs on torch."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        """Build one extension; a compiler that is missing or fails is not an error."""
        self.add_cuda(extension)
        try:
            super().build_extension(extension)
        except Exception as error:
            logging.warning(
                "rocr: %s was not built (%s). rocr runs on torch instead, which gives the same results but is slower: "
                "on a CPU, second moments (rocr stats) take about 4 times as long, and the update of a bfloat16 "
                "weight 5 to 11 times. Models in 16 bits run slower on chips without 16-bit instructions. Install a "
                "C++17 compiler and install rocr again for the compiled kernels; rocr doctor shows which are there.",
                extension.name,
                error,
            )

    def add_cuda(self, extension: Pybind11Extension) -> None:
        """Add the CUDA kernels where nvcc is; without them the module is built for the CPU alone."""
        nvcc = find_nvcc()
        if nvcc is None:
            return
        try:
            compiled = compile_cuda(nvcc, Path(self.build_temp) / "csrc")
            libraries = cuda_link_arguments(nvcc)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            logging.warning("rocr: the CUDA kernels were not built (%s).", error)
            return
        extension.extra_objects.append(compiled)
        extension.extra_link_args += libraries
        extension.define_macros.append(("ROCR_WITH_CUDA", None))


setup(
    # Of rocr/ alone: kernels/ would otherwise be shipped as a package named "kernels".
    packages=[*find_packages(include=["rocr", "rocr.*"]), "rocr_kernels"],
    # kernels/ has no __init__.py: a root package named "kernels" would hide the one transformers imports.
    package_dir={"rocr": "rocr", "rocr_kernels": "kernels"},
    package_data={"rocr": ["py.typed", "data/*"]},
    include_package_data=False,  # the sdist's other files are not the package's
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
)
