"""Versions of the packages that results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rocr import __version__


def versions() -> dict[str, str]:
    """Return the versions of rocr, Python and the installed packages that results depend on."""
    found = {"rocr": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
