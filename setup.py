"""Build of rocr; the metadata is in pyproject.toml."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext


def extensions() -> list[Pybind11Extension]:
    """Return the compiled part, rocr._C; ROCR_BUILD_EXT=0 leaves it out."""
    if os.environ.get("ROCR_BUILD_EXT", "1") == "0":
        return []
    compiled = Pybind11Extension(
        "rocr._C",
        sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
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
        try:
            super().build_extension(extension)
        except Exception as error:
            logging.warning(
                "rocr: %s was not built (%s). rocr will run on torch, at a lower speed; install a C++17 compiler "
                "and install rocr again for the compiled kernels.",
                extension.name,
                error,
            )


setup(
    # By hand: find_packages() would ship kernels/ as a package named "kernels".
    packages=["rocr", "rocr.cli", "rocr.evaluation", "rocr_kernels"],
    # kernels/ has no __init__.py: a root package named "kernels" would hide the one transformers imports.
    package_dir={
        "rocr": "rocr",
        "rocr.cli": "rocr/cli",
        "rocr.evaluation": "rocr/evaluation",
        "rocr_kernels": "kernels",
    },
    package_data={"rocr": ["py.typed", "data/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
)
