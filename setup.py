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

# Machine code for each generation, and what the driver translates for later ones; wgmma is for sm_90a alone.
CUDA_CODE = {
    "low_rank_update.cu": [
        *(f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in (80, 86, 89, 90, 100)),
        "-gencode=arch=compute_90,code=compute_90",
    ],
    "second_moment_sm90.cu": ["-gencode=arch=compute_90a,code=sm_90a"],
}


def find_nvcc() -> str | None:
    """Return the path of CUDA's compiler, from CUDA_HOME, else PATH; ROCR_CUDA=0 leaves the CUDA kernels out."""
    if os.environ.get("ROCR_CUDA", "1") == "0" or sys.platform != "linux":
        return None
    home = os.environ.get("CUDA_HOME")
    in_home = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    return in_home or shutil.which("nvcc")


def known_code(nvcc: str, source: str) -> list[str]:
    """Return the options for the chips that this nvcc can compile a source for; older ones do not know the newest.

    Raises:
        RuntimeError: there is no such chip.
    """
    known, refusals = [], []
    for option in CUDA_CODE[source]:
        # It checks the names and compiles nothing; --list-gpu-code leaves sm_90a out.
        words = [nvcc, "--dryrun", option, "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            known.append(option)
        else:
            refusals.append(" ".join(done.stderr.split()))
    if not known:
        raise RuntimeError(f"{nvcc} cannot compile {source}, which needs CUDA 12 or later: {refusals[0]}")
    for refusal in refusals:
        logging.warning("rocr: %s is compiled without a chip that this nvcc does not know (%s).", source, refusal)
    return known


def compile_cuda(nvcc: str, folder: Path) -> list[str]:
    """Compile the CUDA kernels for the chips that nvcc knows, and return the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xfatbin", "-compress-all", "--threads=0"]
    objects = []
    for source in CUDA_CODE:
        target = str(folder / f"{source}.o")
        code = known_code(nvcc, source)
        subprocess.run([nvcc, *flags, *code, "-c", str(Path("csrc") / source), "-o", target], check=True)
        objects.append(target)
    return objects


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
        extra_link_args=["-pthread"],
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
                "weight 5 to 11 times. Loading, generating and evaluating take the same time. Install a C++17 "
                "compiler and install rocr again for the compiled kernels; rocr doctor shows which are there.",
                extension.name,
                error,
            )

    def add_cuda(self, extension: Pybind11Extension) -> None:
        """Add the CUDA kernels where nvcc is; without them the module is built for the CPU alone."""
        nvcc = find_nvcc()
        if nvcc is None:
            return
        try:
            objects = compile_cuda(nvcc, Path(self.build_temp) / "csrc")
            libraries = cuda_link_arguments(nvcc)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            logging.warning("rocr: the CUDA kernels were not built (%s).", error)
            return
        extension.extra_objects += objects
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
