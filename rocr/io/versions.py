"""Versions of the packages that results depend on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from rocr import __version__


def versions() -> dict[str, str]:
    """Return the versions of rocr, Python and the installed packages that results depend on."""
    found = {"rocr": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton"):
        installed = _installed(package)
        if installed is not None:
            found[package] = installed
    return found


@cache
def _installed(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed.

    Cached: reading the metadata takes milliseconds, and a command asks some twenty times.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None
