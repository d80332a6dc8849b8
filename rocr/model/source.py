"""The source of a model: a folder, a GGUF file or the id of a model on a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rocr.errors import InputError

ADAPTER_GGUF = "lora.gguf"
"""The name of the adapter that rocr writes beside a model in a GGUF file."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: The name that the user gave.
        folder: The folder that holds the model; None for a hub id.
        gguf: The name of the GGUF file in that folder; None if the source is not a GGUF file.
        download: Whether the network may be used.
    """

    name: str
    folder: Path | None
    gguf: str | None = None
    download: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The paths that must never be written to."""
        if self.folder is None:
            return ()
        return (self.folder / self.gguf,) if self.gguf else (self.folder,)

    @property
    def place(self) -> str:
        """The folder, GGUF file or hub id, as `name_or_path` of a model's configuration holds it."""
        return self.name if self.folder is None else str(self.folder / (self.gguf or ""))

    @property
    def checkpoint_folder(self) -> Path | None:
        """The local folder of config.json and weight files; None for a GGUF file and for a hub id."""
        return None if self.gguf else self.folder


def find_model(name: str, download: bool = False) -> ModelSource:
    """Find out whether a name is a folder, a GGUF file or a hub id, without loading anything.

    A folder without config.json that holds one GGUF file, as rocr writes it, stands for that file.

    Args:
        name: A path, or the id of a model on a hub.
        download: Whether a hub id may be downloaded.

    Raises:
        InputError: The path does not exist or holds no model, or the name is neither a path nor a hub id.
    """
    path = Path(name)
    try:
        path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{name[:100]!r} cannot be examined: {getattr(error, 'strerror', None) or error}.") from None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name} does not exist or is not a file.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{name} is not a GGUF file: it does not begin with the bytes 'GGUF'.")
        return ModelSource(name, path.parent, path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(name, path)
        inside = [file for file in sorted(path.glob("*.gguf")) if file.is_file() and file.name != ADAPTER_GGUF]
        if len(inside) == 1:
            return find_model(str(inside[0]), download)
        several = f" Of its {len(inside)} .gguf files, name one." if inside else ""
        raise InputError(f"{name} holds no Hugging Face model: the folder has no config.json.{several}")
    if path.exists():
        raise InputError(f"{name} is neither a .gguf file nor a folder with a Hugging Face model.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} does not exist and is not the id of a model on a hub (owner/name).")
    return ModelSource(name, None, download=download)
