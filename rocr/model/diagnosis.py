"""Check a configuration before a model is loaded, and name the field of config.json that made loading fail."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rocr.errors import InputError
from rocr.io.json_values import parse_json
from rocr.model.hub import Loading, skeleton_of_fields
from rocr.model.source import ModelSource
from rocr.model.weight_files import find_weight_files

SPARE_BYTES = 2**30
LARGEST_GROWTH = 16
"""A model in memory has at most this many times the bytes of its files, plus `SPARE_BYTES`. A GGUF file of 2 bits a
weight grows 16 times in float32."""
SETTINGS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False}
"""Settings that rocr's forward passes need."""
SEARCH_SECONDS = 20.0
"""Time limit of the search for the field that makes loading fail."""


def set_settings(config: Any) -> dict[str, Any]:
    """Apply `SETTINGS` to a configuration and its text part; return the values that were replaced."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    before = {name: getattr(config, name) for name, value in SETTINGS.items() if getattr(config, name, value) != value}
    for part in (config, text):
        for name, value in SETTINGS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    return before


def stored_bytes(source: ModelSource) -> int | None:
    """Return the bytes of a model's weight files; None for a hub id."""
    if source.folder is not None and source.gguf is not None:
        return (source.folder / source.gguf).stat().st_size
    files = find_weight_files(source.checkpoint_folder)
    return files.size if files is not None else None


def check_memory(library: Loading, config: Any) -> None:
    """Raise InputError if a configuration describes more bytes of tensors than the weight files can fill.

    Args:
        library: The means to load the model.
        config: The model's configuration.

    Raises:
        InputError: The tensors are too large; the message names the largest one.
    """
    stored = stored_bytes(library.source)
    if stored is None:
        return
    try:
        model = library.skeleton(copy.deepcopy(config))
    except InputError:
        return  # loading fails too, with a message that names the field
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if sum(tensor.nbytes for tensor in tensors.values()) <= LARGEST_GROWTH * stored + SPARE_BYTES:
        return
    name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
    raise InputError(
        f"{library.source.name} cannot be loaded: its configuration makes {name} a tensor of {largest.nbytes:,} bytes "
        f"(shape {tuple(largest.shape)}), but its weight files have {stored:,} bytes in total."
    )


@contextmanager
def naming_the_field(source: ModelSource, trust_remote_code: bool) -> Iterator[None]:
    """If loading a folder's model fails inside the context, name the field of config.json that is the reason."""
    try:
        yield
    except InputError as error:
        if source.checkpoint_folder is None or trust_remote_code:
            raise
        message = _message_with_field(source.name, source.checkpoint_folder, str(error))
        if not message:
            raise
        raise InputError(message) from error.__cause__


def _message_with_field(model_name: str, folder: Path, message: str) -> str:
    """Return an error message that names the field which made loading fail; empty if no field is found."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    model = _built(config)
    if model is not None:
        mismatch = _mismatch(folder, model)
        return f"{model_name} cannot be loaded: {mismatch}" if mismatch else ""
    name, value = _field_to_remove(config)
    if not name or f"{name!r}" in message:
        return ""
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return f"{message} The model can be built without the field {name} ({shown}) of config.json."


def _built(fields: Mapping[str, Any]) -> torch.nn.Module | None:
    """Build the skeleton of a model from the fields of a config.json; None if that fails."""
    try:
        return skeleton_of_fields(copy.deepcopy(dict(fields)))
    except Exception:  # the error itself was raised before: only whether there is one matters
        return None


def _field_to_remove(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and value of the first field without which the model can be built; an empty name for none."""
    end = time.monotonic() + SEARCH_SECONDS
    text = config.get("text_config")
    within = text if isinstance(text, dict) else {}
    trials = [(name, {key: config[key] for key in config if key != name}, config[name]) for name in config]
    trials += [
        (f"text_config.{name}", {**config, "text_config": {k: v for k, v in within.items() if k != name}}, within[name])
        for name in within
    ]
    for name, fields, value in trials:
        if time.monotonic() > end:
            break
        if name != "model_type" and _built(fields) is not None:
            return name, value
    return "", None


def _mismatch(folder: Path, model: torch.nn.Module) -> str:
    """Describe the first tensor whose stored shape differs from the one in the configuration; empty for none."""
    files = find_weight_files(folder)
    for name, tensor in model.state_dict().items():
        if files is not None and name in files.file_of and files.find(name).shape != tuple(tensor.shape):
            stored = files.find(name).shape
            return f"{name} has the shape {stored} in the files, but {tuple(tensor.shape)} by config.json."
    return ""
