"""Load a model with its tokenizer from a folder, a GGUF file or a hub id, and save it as a plain folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rocr.errors import InputError, RocrError
from rocr.model_folder import INDEX_FILE, SINGLE_FILE, check_model_folder
from rocr.shards import find_weight_files, stored_dtype
from rocr.space import check_space

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what the user called it.
        folder: the folder it lies in; None for a hub id.
        gguf: name of the GGUF file in that folder, where it is one.
        download: whether the network may be used.
    """

    name: str
    folder: Path | None
    gguf: str | None = None
    download: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Paths that must never be written to."""
        if self.folder is None:
            return ()
        return (self.folder / self.gguf,) if self.gguf else (self.folder,)


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and where they come from."""

    model: nn.Module
    tokenizer: Any
    source: ModelSource


def find_model(name: str, download: bool = False) -> ModelSource:
    """Decide what a MODEL argument means, without loading anything.

    Raises:
        InputError: it is a path that holds no model, or not there.
    """
    path = Path(name)
    try:
        path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{name[:100]!r} cannot be examined: {getattr(error, 'strerror', None) or error}.") from None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name} is not there, or not a file.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{name} does not begin like a GGUF file.")
        return ModelSource(name, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is a folder without config.json, so it holds no Hugging Face model.")
        return ModelSource(name, path)
    if path.exists():
        raise InputError(f"{name} is a file, but neither a .gguf file nor a folder with a Hugging Face model.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not there, and is not the id of a model on a hub (owner/name) either.")
    return ModelSource(name, None, download=download)


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
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf is not None:
        _check_gguf_support()
        options["gguf_file"] = source.gguf
        dtype = dtype or torch.float32
    if source.folder is None:
        options["local_files_only"] = not source.download
    elif source.gguf is None:
        check_model_folder(source.folder)
        files = find_weight_files(source.folder)
        dtype = dtype or (None if files is None else stored_dtype(files))
    place = source.name if source.folder is None else str(source.folder)
    try:
        with offline(unless=source.download):
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            if source.gguf is None:
                options["use_safetensors"] = True  # never a pickle
            model, found = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype or "auto",
                device_map=None if device in (None, "cpu") else device,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # tokenizers and configurations of others raise whatever they like
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        hint = "" if source.folder or source.download else " Nothing was downloaded; --download allows it."
        raise InputError(f"{source.name} cannot be loaded: {reason}{hint}") from error
    _check_complete(source, found)
    model.eval()
    return LoadedModel(_without_quantizer(model), tokenizer, source)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer, and nothing else of it.

    Raises:
        InputError: there is none that transformers can load.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf is not None:
        _check_gguf_support()
        options["gguf_file"] = source.gguf
    if source.folder is None:
        options["local_files_only"] = not source.download
    try:
        with offline(unless=source.download):
            return AutoTokenizer.from_pretrained(source.folder or source.name, **options)
    except Exception as error:  # tokenizers of others raise whatever they like
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise InputError(f"The tokenizer of {source.name} cannot be loaded: {reason}") from error


def _check_complete(source: ModelSource, found: dict[str, Any]) -> None:
    """Refuse a model with weights that were made up because the file has none, or others."""
    missing = sorted(map(str, found.get("missing_keys") or ()))
    if missing:
        raise InputError(f"{source.name} lacks {len(missing)} of the model's tensors, such as {missing[0][:100]}.")
    if found.get("mismatched_keys"):
        raise InputError(f"{source.name} holds tensors of other shapes than its config.json says.")


@contextmanager
def offline(unless: bool = False) -> Iterator[None]:
    """No connections to a hub inside: `local_files_only` alone still looks the hub's address up."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not unless
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write model and tokenizer into a folder that exists, as files that transformers, vLLM and others load.

    Raises:
        InputError: the disk is too small.
        RocrError: they cannot be written.
    """
    check_space(folder, saved_bytes(loaded.model))
    try:
        loaded.model.save_pretrained(folder)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise RocrError(f"{folder} cannot be written: {error}.") from error
    _write_index(folder)


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


def _check_gguf_support() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(f"Reading a .gguf file needs {' and '.join(missing)}: pip install 'rocr[gguf]'.")
