"""Model folders to be damaged, and the check that a damaged one is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


class HostileFolder:
    """A copy of a tiny model's folder, and ways to damage it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: str | bytes) -> None:
        """Put other contents into a file."""
        (self.path / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    def change(self, name: str, **values: object) -> None:
        """Change fields of a JSON file."""
        self.write(name, json.dumps(json.loads((self.path / name).read_text()) | values))

    def link(self, name: str, target: str) -> None:
        """Put a link in the place of a file."""
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).symlink_to(target)

    def make(self, name: str, kind: str) -> None:
        """Put a folder or a pipe in the place of a file."""
        (self.path / name).unlink(missing_ok=True)
        {"folder": os.mkdir, "pipe": os.mkfifo}[kind](self.path / name)

    def index(self, changes: object = None, **more: object) -> None:
        """An index that puts every tensor into the one file, but for what is changed."""
        whole: object = dict.fromkeys(load_file(self.path / WEIGHTS), WEIGHTS)
        if isinstance(changes, dict) and isinstance(whole, dict):
            whole = {**whole, **changes}
        elif changes is not None:
            whole = changes
        self.write(INDEX, json.dumps({"metadata": {}, "weight_map": whole, **more}))

    def shard(self, name: str, *tensors: str) -> None:
        """Another weight file with copies of some tensors."""
        whole = load_file(self.path / WEIGHTS)
        save_file({tensor: whole[tensor] for tensor in tensors}, self.path / name, {"format": "pt"})

    def contents(self) -> dict[str, bytes]:
        """Every plain file, to see that none was changed."""
        found = (path for path in self.path.iterdir() if path.is_file() and not path.is_symlink())
        return {path.name: path.read_bytes() for path in found}


@pytest.fixture
def hostile_folder(files: SimpleNamespace, tmp_path: Path) -> HostileFolder:
    shutil.copytree(files.model, tmp_path / "bad")
    return HostileFolder(tmp_path / "bad")


@pytest.fixture
def on_folder(
    hostile_folder: HostileFolder, files: SimpleNamespace, attack: Callable[..., SimpleNamespace]
) -> Callable[[str], Any]:
    """on_folder(kind): the damaged folder must be refused as a model, by its name, and stay as it is."""

    def run(kind: str) -> None:
        before = hostile_folder.contents()
        done = attack(kind, "stats", hostile_folder.path, "--text", files.text, "--layers", "1")
        assert str(hostile_folder.path) in done.errors
        assert hostile_folder.contents() == before

    return run
