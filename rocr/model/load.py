"""Load a model with its tokenizer from a folder, a GGUF file or a hub id, and save it as a plain folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rocr.errors import InputError, RocrError
from rocr.io.disk_space import check_space
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder
from rocr.model.check_tokenizer import check_token_ids
from rocr.model.diagnosis import check_memory, naming_the_field, set_settings
from rocr.model.forward import input_embedding
from rocr.model.hub import loading, offline
from rocr.model.source import ModelSource, find_model
from rocr.model.weight_files import find_weight_files, stored_dtype

__all__ = ["LoadedModel", "ModelSource", "find_model", "load_model", "load_tokenizer", "save_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and where they come from.

    Attributes:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        source: where they come from.
        own_settings: fields of the configuration that rocr's passes do not allow, as they are stored.
    """

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    own_settings: dict[str, Any] = field(default_factory=dict)


def load_model(
    source: ModelSource,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: from `find_model`.
        dtype: of the weights; None: the one that most values of the files' matrices are stored in, whatever
            config.json says, and float32 for a GGUF file.
        device: such as "cpu", "cuda:0", or "auto" to spread the layers over all devices; None: the CPU.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: the files are not those of a causal language model that transformers can load.
    """
    if source.folder is not None and source.gguf is None:
        check_model_folder(source.folder)
    with loading(source, trust_remote_code) as library:
        with naming_the_field(source, trust_remote_code):
            config = library.config()
            own_settings = set_settings(config)
            check_memory(library, config)
        tokenizer = library.tokenizer()
        chosen = dtype or (torch.float32 if source.gguf else _stored_dtype(source)) or "auto"
        with naming_the_field(source, trust_remote_code):
            model, found = library.model(config, chosen, None if device in (None, "cpu") else device)
    _check_complete(source, found)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{source.name} says is_encoder_decoder true: it is no causal language model.")
    check_token_ids(tokenizer, embedding_rows(model), source.name)
    model.eval()
    return LoadedModel(_without_quantizer(model), tokenizer, source, own_settings)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer, and nothing else of it.

    Raises:
        InputError: there is none that transformers can load.
    """
    with loading(source, trust_remote_code) as library:
        return library.tokenizer()


def embedding_rows(model: nn.Module) -> int:
    """How many tokens a model's embedding has rows for."""
    return int(input_embedding(model).weight.shape[0])


def _stored_dtype(source: ModelSource) -> torch.dtype | None:
    """The dtype that a model's files store it in; None where there are no such files."""
    files = None if source.folder is None else find_weight_files(source.folder)
    return None if files is None else stored_dtype(files)


def _check_complete(source: ModelSource, found: dict[str, Any]) -> None:
    """Refuse a model with weights that were made up because the file has none, or others."""
    missing = sorted(map(str, found.get("missing_keys") or ()))
    if missing:
        raise InputError(f"{source.name} lacks {len(missing)} of the model's tensors, such as {missing[0][:100]}.")
    if found.get("mismatched_keys"):
        raise InputError(f"{source.name} holds tensors of other shapes than its config.json says.")


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write model and tokenizer into a folder that exists, as files that transformers, vLLM and others load.

    Raises:
        InputError: the disk is too small.
        RocrError: they cannot be written.
    """
    check_space(folder, saved_bytes(loaded.model))
    try:
        with offline(), _settings(loaded.model.config, loaded.own_settings):
            loaded.model.save_pretrained(folder)  # type: ignore[operator]
            loaded.tokenizer.save_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise RocrError(f"{folder} cannot be written: {error}.") from error
    _write_index(folder)


@contextmanager
def _settings(config: Any, own: dict[str, Any]) -> Iterator[None]:
    """Within the context, a configuration has the fields that the model came with."""
    loaded = {name: getattr(config, name) for name in own}
    for name, value in own.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in loaded.items():
            setattr(config, name, value)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in files; tied ones are stored once."""
    return sum(parameter.nbytes for parameter in model.parameters()) + sum(buffer.nbytes for buffer in model.buffers())


def _write_index(folder: Path) -> None:
    """Name the one weight file in an index too: loaders that glob *.safetensors would take the edit for weights."""
    single = folder / SINGLE_FILE
    if not single.is_file() or (folder / INDEX_FILE).exists():
        return
    from safetensors import safe_open

    with safe_open(single, framework="pt") as file:
        names = list(file.keys())
    index = {"metadata": {"total_size": os.path.getsize(single)}, "weight_map": dict.fromkeys(names, SINGLE_FILE)}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _without_quantizer(model: nn.Module) -> nn.Module:
    """Forget that a GGUF's weights were quantised: they are dense now, and save_pretrained refuses otherwise."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and "gguf" in type(quantizer).__name__.lower():
        model.hf_quantizer = None  # type: ignore[assignment]
        config: Any = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return model
