"""The original files of a model in the output of an edit, from which `rocr revert` restores them.

The folder `originals/` holds the files that the output changes or leaves out, as hard links if the file system supports
them, and a list of all original files with their sha256. Restoring them loads no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rocr.errors import InputError, VerificationError
from rocr.export.copying import (
    CARD_FILE,
    EDIT_FILE,
    MAX_CARRIED_BYTES,
    ORIGINALS_FOLDER,
    REPORT_FILE,
    SETTINGS_FILE,
    SUMS_FILE,
    bytes_to_copy,
    carried_files,
    check_size,
    link_or_copy,
    other_weights,
)
from rocr.export.manifest import file_digest
from rocr.io.disk_space import check_space
from rocr.io.json_values import flag_of, parse_json, text_of, whole_number_of
from rocr.io.safetensors_layout import MAX_HEADER_BYTES
from rocr.model.check_folder import INDEX_FILE
from rocr.model.load import ModelSource
from rocr.model.weight_files import find_weight_files

LIST = "originals.json"
FORMAT = "rocr originals 1"
WRITTEN_FILES = (CARD_FILE, REPORT_FILE, EDIT_FILE, SETTINGS_FILE, SUMS_FILE)
"""Files of an output that rocr writes, so that files of the model with these names are stored in `originals/`."""


@dataclass(frozen=True)
class Original:
    """An original file.

    Attributes:
        sha256: sha256 of the file.
        bytes: Size of the file.
        kept: Whether the output itself holds the file, unchanged under the same name, so that it is not stored twice.
    """

    sha256: str
    bytes: int
    kept: bool


def original_files(source: ModelSource) -> list[Path]:
    """Return the files of a model: weights, configuration and tokenizer, or the one GGUF file.

    Other safetensors files in the folder are included, unless one is larger than all weights of the model.

    Raises:
        InputError: The model is not in a folder, or a file is too large.
    """
    if source.folder is None:
        raise InputError(
            f"{source.name} is the id of a model on a hub. Originals can only be saved of a folder or a .gguf file; "
            "remove `originals` from --save."
        )
    if source.gguf:
        return [source.folder / source.gguf]
    files = find_weight_files(source.folder)
    weights = [] if files is None else [source.folder / name for name in files.files]
    size = sum(weight.stat().st_size for weight in weights)
    others = [path for path in (source.folder / name for name in (INDEX_FILE, *WRITTEN_FILES)) if path.is_file()]
    for path in others:
        check_size(path, MAX_CARRIED_BYTES + size)
    beside = [source.folder / name for name in other_weights(source.folder, [path.name for path in weights])]
    small = [path for path in beside if path.suffix == ".safetensors" and path.stat().st_size <= size]
    found = [*weights, *carried_files(source.folder), *others, *small]
    return list(dict.fromkeys(found))


def save_originals(source: ModelSource, out: Path) -> dict[str, str]:
    """Store the original files of a model in an output, after the edited model if the output holds one.

    Returns:
        sha256 of each file in `originals/`, by its path in the output.

    Raises:
        InputError: The model is not in a folder, or there is too little free disk space.
    """
    files = original_files(source)
    store = out / ORIGINALS_FOLDER
    store.mkdir()
    check_space(out, bytes_to_copy(files, store))
    entries: dict[str, Original] = {}
    for file in files:
        digest, name = file_digest(file), _name(source, file)
        kept = name not in WRITTEN_FILES and _is_same(file, digest, out / name)
        if not kept:
            link_or_copy(file, store / name)
        entries[name] = Original(digest, file.stat().st_size, kept)
    listed = {"format": FORMAT, "files": {name: asdict(entry) for name, entry in entries.items()}}
    (store / LIST).write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    stored = {f"{ORIGINALS_FOLDER}/{name}": entry.sha256 for name, entry in entries.items() if not entry.kept}
    return stored | {f"{ORIGINALS_FOLDER}/{LIST}": file_digest(store / LIST)}


def has_originals(folder: Path) -> bool:
    """Return whether an output holds the original files of its model."""
    return (folder / ORIGINALS_FOLDER / LIST).is_file()


def restore_originals(folder: Path, out: Path) -> dict[str, str]:
    """Write the original files of a model into a folder that exists, and check the sha256 of each.

    Args:
        folder: An output with originals.
        out: The folder to write to.

    Returns:
        sha256 of each file by name.

    Raises:
        InputError: The list of originals is damaged, or there is too little free disk space.
        VerificationError: A file is missing or differs from the original.
    """
    entries = read_list(folder)
    places = {name: (folder if entry.kept else folder / ORIGINALS_FOLDER) / name for name, entry in entries.items()}
    for name, place in places.items():
        if place.is_symlink() or not place.is_file() or not place.resolve().is_relative_to(folder.resolve()):
            raise VerificationError(
                f"{place} is missing, so {name} cannot be restored. Use another copy of the output."
            )
        # Before the digest, which takes hours for a sparse file of 1 TB.
        if place.stat().st_size != entries[name].bytes:
            raise VerificationError(
                f"{place} differs from the original file: it has {place.stat().st_size:,} bytes, recorded are "
                f"{entries[name].bytes:,}. Use another copy of the output."
            )
    check_space(out, bytes_to_copy(list(places.values()), out))
    for name, place in places.items():
        link_or_copy(place, out / name)
        found = file_digest(out / name)
        if found != entries[name].sha256:
            raise VerificationError(
                f"{place} differs from the original file: its sha256 is {found[:12]}, recorded is "
                f"{entries[name].sha256[:12]}. Use another copy of the output."
            )
    return {name: entry.sha256 for name, entry in entries.items()}


def read_list(folder: Path) -> Mapping[str, Original]:
    """Return the original files of a model by name, from the list in `originals/`.

    Raises:
        InputError: The list is damaged, or names a file outside the folder.
    """
    path = folder / ORIGINALS_FOLDER / LIST
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        listed = parse_json(path.read_bytes())
        if listed["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        entries = {_checked_name(name): _original(entry) for name, entry in listed["files"].items()}
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
    """Return the path of a file relative to the model's folder."""
    assert source.folder is not None, "originals are those of a folder"
    return file.relative_to(source.folder).as_posix()


def _checked_name(name: str) -> str:
    """Return the name if it is a normalized path below a folder; else raise ValueError."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise ValueError(f"{name[:60]!r} is no name of a file below the folder")
    return name


def _is_same(file: Path, digest: str, other: Path) -> bool:
    """Return whether another path holds the bytes of a file, whose digest is known."""
    if not other.is_file():
        return False
    return other.samefile(file) or (other.stat().st_size == file.stat().st_size and file_digest(other) == digest)
