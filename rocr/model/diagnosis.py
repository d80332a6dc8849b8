"""Before and after a model fails to load: which field of its config.json is the reason."""

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
from rocr.model.hub import Loading, build_skeleton
from rocr.model.source import ModelSource
from rocr.model.weight_files import find_weight_files

SPARE_BYTES = 2**30
LARGEST_GROWTH = 16
"""A model in memory has at most so many times the bytes of its files, and some spare: a GGUF file of 2 bits a weight
has that many in float32."""
SETTINGS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False}
"""What rocr's passes depend on, whatever a configuration says."""
PATIENCE = 20.0
"""Seconds in which the reason of a failure is looked for."""


def set_settings(config: Any) -> dict[str, Any]:
    """Set what rocr's passes depend on, in a configuration and its text part; returns what was set before."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    before = {name: getattr(config, name) for name, value in SETTINGS.items() if getattr(config, name, value) != value}
    for part in (config, text):
        for name, value in SETTINGS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    return before


def stored_bytes(source: ModelSource) -> int | None:
    """Bytes of a model's weight files; None for a hub id."""
    if source.folder is None:
        return None
    if source.gguf is not None:
        return (source.folder / source.gguf).stat().st_size
    files = find_weight_files(source.folder)
    return files.size if files is not None else None


def check_memory(library: Loading, config: Any) -> None:
    """Refuse a configuration that makes tensors which the weight files cannot fill.

    Args:
        library: what loads the model.
        config: its configuration.

    Raises:
        InputError: names the largest tensor.
    """
    stored = stored_bytes(library.source)
    if stored is None:
        return
    try:
        with torch.device("meta"):
            model = library.structure(copy.deepcopy(config))
    except InputError:
        return  # loading itself says why, with the field
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if sum(tensor.nbytes for tensor in tensors.values()) <= LARGEST_GROWTH * stored + SPARE_BYTES:
        return
    name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
    raise InputError(
        f"{library.source.name} cannot be loaded: its configuration makes {name} a tensor of {largest.nbytes:,} bytes "
        f"(shape {tuple(largest.shape)}), but its weights have {stored:,} bytes in all."
    )


@contextmanager
def naming_the_field(source: ModelSource, trust_remote_code: bool) -> Iterator[None]:
    """Add to a failure to load a folder's model which field of its config.json is the reason, where that is found."""
    try:
        yield
    except InputError as error:
        if source.folder is None or source.gguf is not None or trust_remote_code:
            raise
        sentence = _sentence(source, source.folder, str(error))
        if not sentence:
            raise
        raise InputError(sentence) from error.__cause__


def _sentence(source: ModelSource, folder: Path, message: str) -> str:
    """A better message for a failure; empty: there is none."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    model = _built(config)
    if model is not None:
        mismatch = _mismatch(folder, model)
        return f"{source.name} cannot be loaded: {mismatch}" if mismatch else ""
    name, value = _suspect(config)
    if not name or f"{name!r}" in message:
        return ""
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return f"{message} Without the field {name} ({shown}) of config.json it can be built."


def _built(fields: Mapping[str, Any]) -> torch.nn.Module | None:
    try:
        return build_skeleton(copy.deepcopy(dict(fields)))
    except Exception:  # what it raises is known already: only whether it does is asked here
        return None


def _suspect(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The first field without which the model can be built; an empty name where there is none."""
    end = time.monotonic() + PATIENCE
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
    """The first tensor that is stored in another shape than the configuration makes it."""
    files = find_weight_files(folder)
    for name, tensor in model.state_dict().items():
        if files is not None and name in files.file_of and files.find(name).shape != tuple(tensor.shape):
            stored = files.find(name).shape
            return f"{name} has the shape {stored} in the files, but config.json makes it {tuple(tensor.shape)}."
    return ""
