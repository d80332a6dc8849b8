"""The first bytes of a model, kept in the output of an edit so that `rocr revert` gives them back file by file.

What the output has changed or left out lies in its folder `originals/`, as hard links where the file system has
them; a list with the sha256 of every first file says what belongs to the model. Nothing is loaded to put it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rocr.errors import InputError, VerificationError
from rocr.export.copying import MAX_CARRIED_BYTES, bytes_to_copy, carried_files, check_size, link_or_copy, other_weights
from rocr.export.report import file_digest
from rocr.io.disk_space import check_space
from rocr.io.json_values import flag_of, parse_json, text_of, whole_number_of
from rocr.io.safetensors_layout import MAX_HEADER_BYTES
from rocr.model.check_folder import INDEX_FILE
from rocr.model.load import ModelSource
from rocr.model.weight_files import find_weight_files

FOLDER = "originals"
LIST = "originals.json"
FORMAT = "rocr originals 1"
OWN_FILES = ("README.md", "report.json", "edit.safetensors")


@dataclass(frozen=True)
class Original:
    """A first file.

    Attributes:
        sha256: of its bytes.
        bytes: its size.
        kept: whether the output's own file of this name is the same, so that it is stored once.
    """

    sha256: str
    bytes: int
    kept: bool


def original_files(source: ModelSource) -> list[Path]:
    """The files a model consists of: weights, configuration and tokenizer, or the one GGUF file.

    Safetensors files beside the weights count too, unless they are larger than all of these.

    Raises:
        InputError: it lies in no folder of its own, or a file is larger than any such file can be.
    """
    if source.folder is None:
        raise InputError(
            f"{source.name} is the id of a model on a hub: originals are kept of a folder or a .gguf file only."
        )
    if source.gguf:
        return [source.folder / source.gguf]
    files = find_weight_files(source.folder)
    weights = [] if files is None else [source.folder / name for name in files.files]
    size = sum(weight.stat().st_size for weight in weights)
    others = [path for path in (source.folder / name for name in (INDEX_FILE, *OWN_FILES)) if path.is_file()]
    for path in others:
        check_size(path, MAX_CARRIED_BYTES + size)
    beside = [source.folder / name for name in other_weights(source.folder, [path.name for path in weights])]
    small = [path for path in beside if path.suffix == ".safetensors" and path.stat().st_size <= size]
    found = [*weights, *carried_files(source.folder), *others, *small]
    return list(dict.fromkeys(found))


def save_originals(source: ModelSource, out: Path) -> dict[str, str]:
    """Keep a model's first bytes in an output that holds the edited model, or nothing of it yet.

    Returns:
        sha256 of each file stored in `originals/`, by its path in the output.

    Raises:
        InputError: the model lies in no folder, or the disk is too small.
    """
    files = original_files(source)
    store = out / FOLDER
    store.mkdir()
    check_space(out, bytes_to_copy(files, store))
    entries: dict[str, Original] = {}
    for file in files:
        digest, name = file_digest(file), _name(source, file)
        kept = name not in OWN_FILES and _is_same(file, digest, out / name)
        if not kept:
            link_or_copy(file, store / name)
        entries[name] = Original(digest, file.stat().st_size, kept)
    listed = {"format": FORMAT, "files": {name: asdict(entry) for name, entry in entries.items()}}
    (store / LIST).write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    stored = {f"{FOLDER}/{name}": entry.sha256 for name, entry in entries.items() if not entry.kept}
    return stored | {f"{FOLDER}/{LIST}": file_digest(store / LIST)}


def has_originals(folder: Path) -> bool:
    """Whether an output keeps the first bytes of its model."""
    return (folder / FOLDER / LIST).is_file()


def restore_originals(folder: Path, out: Path) -> dict[str, str]:
    """Put a model's first files into a folder that exists, each checked by its sha256.

    Args:
        folder: an output with originals.
        out: where they go.

    Returns:
        sha256 of each file.

    Raises:
        InputError: the list of originals is damaged, or the disk is too small.
        VerificationError: a file is missing or is not as it was; names it.
    """
    entries = read_list(folder)
    places = {name: (folder if entry.kept else folder / FOLDER) / name for name, entry in entries.items()}
    for name, place in places.items():
        if place.is_symlink() or not place.is_file() or not place.resolve().is_relative_to(folder.resolve()):
            raise VerificationError(f"{place} is missing, so {name} cannot be given back.")
        # Looked at first: the digest of a file that claims to be huge would take hours.
        if place.stat().st_size != entries[name].bytes:
            raise VerificationError(
                f"{place} is not the first file: it has {place.stat().st_size:,} bytes, recorded were "
                f"{entries[name].bytes:,}."
            )
    check_space(out, bytes_to_copy(list(places.values()), out))
    for name, place in places.items():
        link_or_copy(place, out / name)
        found = file_digest(out / name)
        if found != entries[name].sha256:
            raise VerificationError(
                f"{place} is not the first file: its sha256 is {found[:12]}, recorded was {entries[name].sha256[:12]}."
            )
    return {name: entry.sha256 for name, entry in entries.items()}


def read_list(folder: Path) -> Mapping[str, Original]:
    """The first files of a model, by name.

    Raises:
        InputError: the list is damaged, or names a file outside the folder.
    """
    path = folder / FOLDER / LIST
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        listed = parse_json(path.read_bytes())
        if listed["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        entries = {_plain(name): _original(entry) for name, entry in listed["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a list of originals: {str(error)[:200]}.") from None
    if not entries:
        raise InputError(f"{path} names no file.")
    return entries


def _original(entry: dict[str, object]) -> Original:
    return Original(
        text_of(entry["sha256"], "sha256"), whole_number_of(entry["bytes"], "bytes"), flag_of(entry["kept"], "kept")
    )


def _name(source: ModelSource, file: Path) -> str:
    assert source.folder is not None, "originals are those of a folder"
    return file.relative_to(source.folder).as_posix()


def _plain(name: str) -> str:
    """A path below a folder, in its shortest spelling."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise ValueError(f"{name[:60]!r} is no name of a file")
    return name


def _is_same(file: Path, digest: str, other: Path) -> bool:
    if not other.is_file():
        return False
    return other.samefile(file) or (other.stat().st_size == file.stat().st_size and file_digest(other) == digest)
