"""Which rocr runs: where it lies, whether it hides an installed one, and why its compiled kernels are not there."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rocr import __version__
from rocr.ops import cpp_backend

_LIBRARIES = (".so", ".pyd", ".dylib")


@dataclass(frozen=True)
class Installation:
    """The package rocr of this process.

    Attributes:
        version: of it.
        folder: that holds it.
        source_tree: whether it runs from its sources.
        hidden: the folder of an installed rocr that another start of Python would find; None: there is no other.
        kernels_flaw: why rocr._C cannot be used, and what to do; None: it can.
    """

    version: str
    folder: Path
    source_tree: bool
    hidden: Path | None
    kernels_flaw: str | None


def find_installation() -> Installation:
    """Look at the package of this process."""
    folder = Path(__file__).resolve().parents[1]
    source_tree = (folder.parent / "csrc").is_dir() and (folder.parent / "setup.py").is_file()
    others = [place for place in map(_folder_of, distributions(name="rocr")) if place is not None and place != folder]
    hidden = others[0] if others else None
    error = cpp_backend.import_error()
    flaw = None if error is None else kernels_flaw(error, folder, source_tree, hidden)
    return Installation(__version__, folder, source_tree, hidden, flaw)


def _folder_of(distribution: Distribution) -> Path | None:
    """The folder of an installed rocr, also where it is installed as a link to its sources."""
    url = distribution.read_text("direct_url.json")
    if url is not None:
        try:
            found = json.loads(url)
            if found.get("dir_info", {}).get("editable"):
                return Path(unquote(urlsplit(found["url"]).path), "rocr").resolve()
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    place = Path(str(distribution.locate_file("rocr"))).resolve()
    return place if place.is_dir() else None


def kernels_flaw(error: str, folder: Path, source_tree: bool, hidden: Path | None) -> str:
    """Why rocr._C cannot be imported, and what to do.

    Args:
        error: what the import said.
        folder: of the package.
        source_tree: whether that is in a source tree.
        hidden: the folder of an installed rocr besides; None: there is no other.
    """
    built, wanted = _built(folder), {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES}
    if wanted & set(built):
        return f"It is there, but cannot be loaded: {error[:500]}. Install rocr again."
    if built:
        return f"It is built for another Python: {', '.join(built)}, not _C{EXTENSION_SUFFIXES[0]}. Install rocr again."
    if hidden is not None and _built(hidden):
        return f"It was not built here. The rocr in {hidden} has it: start rocr from another folder."
    place = "in this source tree" if source_tree else "when rocr was installed"
    compiler = _compiler()
    if compiler is None:
        return f"It was not built {place}, and no C++ compiler is found: install one that knows C++17, and rocr again."
    return f"It was not built {place}. There is a C++ compiler ({compiler}): install rocr again, with pip install -v."


def _built(folder: Path) -> list[str]:
    """Names of the compiled modules in a package's folder, of any Python."""
    return sorted(path.name for path in folder.glob("_C.*") if path.suffix in _LIBRARIES)


def _compiler() -> str | None:
    """The C++ compiler that a build would use."""
    configured = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"))
    names = [*(name.split()[0] for name in configured if name and name.strip()), "c++", "g++", "clang++", "cl"]
    return next((found for name in names if (found := shutil.which(name))), None)
