"""What a MODEL argument means: a folder, a GGUF file or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rocr.errors import InputError


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what the user called it.
        folder: the folder it lies in; None for a hub id.
        gguf: name of the GGUF file in that folder, where it is one.
        download: whether the network may be used.
    """

    name: str
    folder: Path | None
    gguf: str | None = None
    download: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Paths that must never be written to."""
        if self.folder is None:
            return ()
        return (self.folder / self.gguf,) if self.gguf else (self.folder,)

    @property
    def place(self) -> str:
        """The folder or hub id, as a model's configuration calls it."""
        return self.name if self.folder is None else str(self.folder)


def find_model(name: str, download: bool = False) -> ModelSource:
    """Decide what a MODEL argument means, without loading anything.

    Raises:
        InputError: it is a path that holds no model, or not there.
    """
    path = Path(name)
    try:
        path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{name[:100]!r} cannot be examined: {getattr(error, 'strerror', None) or error}.") from None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name} is not there, or not a file.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{name} does not begin like a GGUF file.")
        return ModelSource(name, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is a folder without config.json, so it holds no Hugging Face model.")
        return ModelSource(name, path)
    if path.exists():
        raise InputError(f"{name} is a file, but neither a .gguf file nor a folder with a Hugging Face model.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not there, and is not the id of a model on a hub (owner/name) either.")
    return ModelSource(name, None, download=download)
