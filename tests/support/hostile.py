"""Hostile inputs: contents and places that no reader accepts, model folders to damage, checks of a refusal."""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rocr import InputError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
NORM, HEAD, DOWN_PROJECTION = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
DEEP, DIGITS, HUGE = "[" * 100_000, "9" * 10_000, "x" * 10**7
TERMINAL, BIDIRECTIONAL, ZERO_WIDTH = "\x1b]0;title\x07\x1b[2J", "\u202egnik\u202c", "a\u200bb"
PICKLE = (
    b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94"
    b"\x93\x94\x8c\x04true\x94\x85\x94R\x94."
)
NO_OBJECTS: dict[str, str | bytes] = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a text": '"x"',
    "deep": DEEP,
    "zeros": b"\0" * 1000,
    "a pickle": PICKLE,
    "a gzip": b"\x1f\x8b\x08\x00" + b"\0" * 60,
    "not UTF-8": b'{"a": "\xff"}',
}
"""Contents that are no JSON object."""
PLACES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
"""What lies at a path that should be a file."""
FOLDER_PLACES = PLACES | {"a link out": lambda path: path.symlink_to("/etc/hostname")}
"""What lies in the place of a file of a model's folder, which holds no links to other folders."""


class Missing:
    """In the place of a value: the field is left out."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()


def short(value: object) -> str:
    """Return a shortened repr of a value, without computing the whole one."""
    return reprlib.repr(value)


def by_value(fields: dict[str, list[Any]]) -> dict[str, tuple[str, Any]]:
    """The cases of a table of fields, whose paths have dots, and their wrong values: {readable id: (path, value)}."""
    return {f"{path}: {short(value)}": (path, value) for path, values in fields.items() for value in values}


def set_value(document: Any, path: str, value: object) -> None:
    """Set or remove the value at a path through objects and lists."""
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
    for step in steps:
        document = document[step]
    if value is MISSING:
        del document[last]
    else:
        document[last] = value


def to_bytes(data: str | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


class HostileFolder:
    """A copy of a tiny model's folder, and ways to damage it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: str | bytes) -> None:
        """Replace the contents of a file."""
        (self.path / name).write_bytes(to_bytes(data))

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of a file."""
        self.write(name, change((self.path / name).read_bytes()))

    def change(self, name: str, **values: object) -> None:
        """Change fields of a JSON file."""
        self.write(name, json.dumps(json.loads((self.path / name).read_text()) | values))

    def put(self, name: str, place: str) -> None:
        """Replace a file by one of FOLDER_PLACES."""
        (self.path / name).unlink(missing_ok=True)
        FOLDER_PLACES[place](self.path / name)

    def index(self, changes: object = None) -> None:
        """Write an index that puts every tensor into the one file, with some changes or with another map."""
        whole: object = dict.fromkeys(load_file(self.path / WEIGHTS), WEIGHTS)
        if isinstance(changes, dict) and isinstance(whole, dict):
            whole = {**whole, **changes}
        elif changes is not None:
            whole = changes
        self.write(INDEX, json.dumps({"metadata": {}, "weight_map": whole}))

    def shard(self, name: str, *tensors: str) -> None:
        """Write another weight file with copies of some tensors."""
        whole = load_file(self.path / WEIGHTS)
        save_file({tensor: whole[tensor] for tensor in tensors}, self.path / name, {"format": "pt"})

    def weights(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the tensors of the weight file."""
        tensors = load_file(self.path / WEIGHTS)
        change(tensors)
        save_file(tensors, self.path / WEIGHTS, {"format": "pt"})

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


@pytest.fixture
def on_reader(within_limits: Callable[[], Any], tally: Callable[..., None]) -> Callable[..., None]:
    """on_reader(kind, load, path): the file must be refused by its name, in a sentence, and nothing be written."""

    def run(kind: str, load: Callable[[Path], Iterable[Any]], path: Path) -> None:
        before = sorted(path.parent.iterdir())
        with within_limits(), pytest.raises(InputError) as caught:
            load(path)
        sentence = str(caught.value)
        assert str(path) in sentence
        assert sentence.replace("\n", "").isprintable()
        assert len(sentence) < 30_000
        assert sorted(path.parent.iterdir()) == before
        tally(f"bad {kind} refused")

    return run
