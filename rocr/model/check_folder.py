"""Check a model folder before it is loaded: plain files of limited size, safetensors only, no links to the outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.io.dtypes import dtype_name
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import MAX_HEADER_BYTES, StoredTensor, read_layout
from rocr.model.check_config import Weights, check_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_BYTES = 128 * 2**20  # a tokenizer of 256,000 tokens has about 30 MB
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
SETTINGS_BYTES = 16 * 2**20
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def check_model_folder(folder: Path, whole: bool = True) -> None:
    """Raise InputError unless a folder holds a complete and harmless safetensors model. Nothing is loaded.

    Args:
        folder: The folder.
        whole: Whether the headers of all weight files are checked; else only that the files of an index exist.

    Raises:
        InputError: A file is damaged, missing, too large or outside the folder, or the weights are pickled.
    """
    for path in sorted(folder.iterdir()):
        check_inside(folder, path)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} is an adapter: it holds adapter_config.json. Merge it into its model first.")
    config = _read_object(folder / "config.json", SETTINGS_BYTES)
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            _read_object(folder / name, SETTINGS_BYTES)
    for name in TOKENIZER_FILES:
        _check_size(folder / name, TOKENIZER_BYTES)
    for path in (folder / "chat_template.jinja", folder / "chat_template.json", *folder.glob(MORE_TEMPLATES)):
        check_inside(folder, path)
        _check_size(path, SETTINGS_BYTES)
    check_config(folder / "config.json", config, _weights(folder, whole))


def _weights(folder: Path, whole: bool) -> Weights:
    """Summarise the weight files, as far as `check_model_folder` reads them."""
    if not whole and (folder / INDEX_FILE).exists() and not (folder / SINGLE_FILE).is_file():
        return Weights(sum(map(len, _read_index(folder).values())), None, frozenset())
    found = _check_weights(folder)
    longest = max((size for tensor in found.values() for size in tensor.shape), default=0)
    return Weights(len(found), longest, frozenset(dtype_name(tensor.dtype) for tensor in found.values()))


def check_inside(folder: Path, path: Path) -> None:
    """Raise InputError if a path is a link to a place outside the folder and the blobs of a hub's cache."""
    if not path.is_symlink():
        return
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python before 3.13
        raise InputError(f"{path} is a link in a circle of links.") from None
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(f"{path} is a link to {target}, outside the model's folder; put the file itself there.")
    if not target.exists():
        raise InputError(f"{path} is a link to {target}, which does not exist.")


def _read_object(path: Path, limit: int) -> dict[str, Any]:
    try:
        _require_file(path)
        _check_size(path, limit)
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    return value


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size > limit:
        raise InputError(f"{path} has {size:,} bytes, and the limit is {limit:,}.")


def _check_weights(folder: Path) -> dict[str, StoredTensor]:
    """Check the weight files and return the tensors that transformers loads."""
    indexed = _check_index(folder) if (folder / INDEX_FILE).exists() else None
    if (folder / SINGLE_FILE).is_file():  # transformers loads it, whatever an index names
        return _read_header(folder / SINGLE_FILE)
    if indexed is not None:
        return indexed
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder} holds its weights in {pickled[0]}, a pickle, which can run code when it is loaded; rocr reads "
            "safetensors only. If you trust it, load it with transformers and save it again."
        )
    raise InputError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}.")


def _check_index(folder: Path) -> dict[str, StoredTensor]:
    tensors_found: dict[str, StoredTensor] = {}
    for name, tensors in _read_index(folder).items():
        found = _read_header(folder / name)
        missing = tensors - set(found)
        if missing:
            raise InputError(f"{folder / name} lacks {min(missing)[:100]!r}, which {INDEX_FILE} puts there.")
        twice = set(found) & set(tensors_found)
        if twice:
            raise InputError(f"{folder / name} holds {min(twice)[:100]!r}, which another weight file holds too.")
        tensors_found |= found
    return tensors_found


def _read_index(folder: Path) -> dict[str, set[str]]:
    """Return the names of the tensors that an index puts into each weight file, after a check that the files exist."""
    place = folder / INDEX_FILE
    weights = _read_object(place, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{place} has no weight_map with the files of the tensors.")
    shards: dict[str, set[str]] = {}
    for tensor, name in weights.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise InputError(
                f"{place} puts {tensor[:60]!r} into {repr(name)[:100]}, which is not the name of a safetensors file of "
                "this folder."
            )
        shards.setdefault(name, set()).add(tensor)
    for name in shards:
        _require_file(folder / name)
    return shards


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a weight file. Only the header is read, whatever size the file claims."""
    _require_file(path)
    try:
        return read_layout(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None


def _require_file(path: Path) -> None:
    try:
        is_file = path.is_file()
    except OSError:  # a name that is too long, or a folder without permission
        is_file = False
    if not is_file:
        raise InputError(f"{path} does not exist or is not a file.")
