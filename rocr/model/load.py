"""Load a model with its tokenizer from a folder, a GGUF file or a hub id, and save it as a plain folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rocr.errors import InputError, RocrError
from rocr.io.disk_space import check_space
from rocr.io.safetensors_layout import read_layout
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder
from rocr.model.check_tokenizer import check_token_ids
from rocr.model.diagnosis import check_memory, naming_the_field, set_settings
from rocr.model.forward import input_embedding
from rocr.model.gguf_layout import read_gguf_layout
from rocr.model.hub import Loading, loading, offline
from rocr.model.model_class import writes_from_left_to_right
from rocr.model.quantised.checkpoint import (
    Quantisation,
    check_packages,
    check_scales,
    dequantise_experts,
    find_quantisation,
)
from rocr.model.source import ModelSource, find_model
from rocr.model.weight_files import find_weight_files, stored_dtype

__all__ = ["LoadedModel", "ModelSource", "find_model", "load_model", "load_tokenizer", "save_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and where they come from.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        source: Where they come from.
        own_settings: The stored values of fields of the configuration that loading replaced; see `set_settings`.
    """

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    own_settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of the model.

        Raises:
            InputError: rocr cannot edit models of this structure; see `find_architecture`.
        """
        return find_architecture(self.model)


def load_model(
    source: ModelSource,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model, as the class that its config.json names, and its tokenizer.

    Args:
        source: The source, from `find_model`.
        dtype: The dtype of the weights; None for the one that most values of the files' matrices are stored in,
            whatever config.json says, and for float32 if the source is a GGUF file.
        device: A device such as "cuda:0", or "auto" to spread the layers over all devices; None for the CPU.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        InputError: The files are not those of a model that reads text and that transformers can load.
    """
    quantisation = None
    if source.checkpoint_folder is not None:
        check_model_folder(source.checkpoint_folder)
        quantisation = find_quantisation(source.checkpoint_folder)
        if quantisation is not None:
            check_packages(quantisation, source.name)
    with loading(source, trust_remote_code) as library:
        with naming_the_field(source, trust_remote_code):
            config = library.config()
            own_settings = set_settings(config)
            check_memory(library, config)
            files = find_weight_files(source.checkpoint_folder)
            if quantisation is not None and files is not None:
                check_scales(quantisation, files)
                dequantise_experts(quantisation, files, config)
        tokenizer = library.tokenizer()
        chosen = dtype or (torch.float32 if source.gguf else _stored_dtype(source)) or "auto"
        with naming_the_field(source, trust_remote_code):
            model, found = _load(library, config, chosen, None if device in (None, "cpu") else device)
    _check_complete(source, found, quantisation)
    if getattr(model.config, "is_encoder_decoder", False) and writes_from_left_to_right(model):
        raise InputError(
            f"{source.name} is not a causal language model: is_encoder_decoder of its configuration is true."
        )
    check_token_ids(tokenizer, embedding_rows(model), source.name)
    model.eval()
    return LoadedModel(_without_quantizer(model), tokenizer, source, own_settings)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer without the model.

    Raises:
        InputError: transformers cannot load the tokenizer.
    """
    with loading(source, trust_remote_code) as library:
        return library.tokenizer()


def embedding_rows(model: nn.Module) -> int:
    """Return the number of rows of a model's embedding."""
    return int(input_embedding(model).weight.shape[0])


def _stored_dtype(source: ModelSource) -> torch.dtype | None:
    """Return the dtype that a model is stored in; None if there are no safetensors files."""
    files = find_weight_files(source.checkpoint_folder)
    return None if files is None else stored_dtype(files)


def _check_complete(source: ModelSource, found: dict[str, Any], quantisation: Quantisation | None) -> None:
    """Raise InputError if tensors are missing or have other shapes: transformers fills them with random values."""
    missing = sorted(map(str, found.get("missing_keys") or ()))
    if missing:
        advice = _about_experts(source)
        if quantisation is not None:
            advice = (
                f" transformers may not read them in {quantisation.scheme.label}; rocr can read the first layers "
                "itself: give --partial, with --text or --statistics."
            )
        raise InputError(
            f"{source.name} lacks {len(missing)} of the model's tensors, such as {missing[0][:100]}.{advice}"
        )
    if found.get("mismatched_keys"):
        raise InputError(f"{source.name} holds tensors whose shapes differ from those of its config.json.")


def _load(
    library: Loading, config: Any, dtype: torch.dtype | str, device: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return library.model(config, dtype, device)
    except InputError as error:
        advice = _about_experts(library.source)
        if not advice:
            raise
        raise InputError(f"{error}{advice}") from error


def _about_experts(source: ModelSource) -> str:
    """Return a sentence on experts of a GGUF file: transformers loads those of some architectures only."""
    if source.folder is None or source.gguf is None:
        return ""
    layout = read_gguf_layout(source.folder / source.gguf)
    expert = next((name for name in layout.tensors if "_exps." in name), None)
    if expert is None:
        return ""
    return (
        f" The file holds experts ({expert}). transformers loads those of a few architectures from GGUF files, and "
        f"this one is {layout.architecture[:60]!r}: edit the model's Hugging Face folder instead."
    )


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write the model and the tokenizer into an existing folder, as files that transformers, vLLM and others load.

    Raises:
        InputError: The disk has too little free space.
        RocrError: The files cannot be written.
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
    """Give a configuration the values that the model was stored with, inside the context."""
    loaded = {name: getattr(config, name) for name in own}
    for name, value in own.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in loaded.items():
            setattr(config, name, value)


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights in files, where tied weights are stored once."""
    return sum(parameter.nbytes for parameter in model.parameters()) + sum(buffer.nbytes for buffer in model.buffers())


def _write_index(folder: Path) -> None:
    """Write an index for a single weight file: loaders that glob *.safetensors would read the edit file as weights."""
    single = folder / SINGLE_FILE
    if not single.is_file() or (folder / INDEX_FILE).exists():
        return
    names = sorted(read_layout(single))
    index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(names, SINGLE_FILE)}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _without_quantizer(model: nn.Module) -> nn.Module:
    """Remove the quantizer of a model from a GGUF file: its weights are dense now, and save_pretrained needs that."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and "gguf" in type(quantizer).__name__.lower():
        model.hf_quantizer = None  # type: ignore[assignment]
        config: Any = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return model
