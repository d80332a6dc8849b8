"""Load the embedding and the first decoder layers of a model, and leave the rest on the disk.

Keys and states of layers 0 to L need nothing after layer L. Where even this beginning takes much of the memory, its
weights stay in the pages of their files: a model larger than the memory can be edited whatever its size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rocr.errors import InputError
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.architecture import Architecture, find_architecture, text_config
from rocr.model.check_tokenizer import check_token_ids
from rocr.model.diagnosis import check_memory, naming_the_field, set_settings
from rocr.model.hub import loading
from rocr.model.load import LoadedModel, ModelSource, embedding_rows, load_tokenizer
from rocr.model.stored_weights import StoredNames, stored_names
from rocr.model.weight_files import WeightFiles, find_weight_files, stored_dtype

MEMORY_SHARE = 0.5
"""Share of the free memory that a whole model may take before only its beginning is loaded, and that this beginning
may take before it stays in its files."""


def can_load_partially(source: ModelSource, last_layer: int = 0) -> bool:
    """Whether a model lies in safetensors files that hold each parameter up to a layer as a tensor of its own.

    Args:
        source: of the model.
        last_layer: the last decoder layer to load. In a mixture of experts, layers may be stored in different ways.

    Raises:
        InputError: the files are damaged.
    """
    files = None if source.folder is None or source.gguf else find_weight_files(source.folder)
    if files is None:
        return False
    try:
        architecture = find_architecture(empty_model(source))
    except InputError:
        return False
    if getattr(text_config(architecture.model), "quantization_config", None) is not None:
        return False
    names = stored_names(files, architecture.model)
    return all(name in names.plain for name in _needed(architecture, last_layer, names))


def is_large(source: ModelSource) -> bool:
    """Whether a model's files take more than half of the free memory."""
    files = None if source.folder is None or source.gguf else find_weight_files(source.folder)
    return files is not None and files.size > MEMORY_SHARE * free_memory()


def free_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_partial(
    source: ModelSource,
    last_layer: int,
    device: str | None = None,
    trust_remote_code: bool = False,
    mapped: bool | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model's embedding and decoder layers 0 to `last_layer`.

    What comes after is on the meta device: it cannot be run. Tensors of another dtype, such as norms in float32, are
    cast as `load_model` casts them, since modules compute in one dtype.

    Args:
        source: a folder with safetensors files.
        last_layer: the last decoder layer to load.
        device: where to put them; None: the CPU.
        trust_remote_code: whether code that comes with the model may run.
        mapped: whether weights stay in the pages of their files (`StoredTensor.map`), which must not be changed
            meanwhile, instead of being read into memory of their own; None: where they take too much of it.
        dtype: of the weights; None: the one that most of them are stored in.

    Raises:
        InputError: a tensor is missing, or its shape is not the model's.
    """
    files = None if source.folder is None or source.gguf else find_weight_files(source.folder)
    if files is None:
        raise InputError(f"{source.name} has no safetensors files: only such a model can be loaded in part.")
    model = empty_model(source, trust_remote_code)
    architecture = find_architecture(model)
    architecture.down_projection(last_layer)
    if mapped is None:
        mapped = stays_in_files(files, architecture, last_layer, device)
    names = stored_names(files, model)
    needed = _needed(architecture, last_layer, names)
    dtype = dtype or stored_dtype(files, [names.of(name) for name in needed])
    for name in needed:
        _set(model, name, files.find(names.of(name)), dtype, device, mapped)
    model.tie_weights()  # type: ignore[operator]
    if device is not None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    tokenizer = load_tokenizer(source, trust_remote_code)
    check_token_ids(tokenizer, embedding_rows(model), source.name)
    return LoadedModel(model.eval(), tokenizer, source)


def empty_model(source: ModelSource, trust_remote_code: bool = False) -> nn.Module:
    """A model's structure: its buffers are there, as they are first computed, its parameters on the meta device.

    Raises:
        InputError: the configuration is not one of a causal language model.
    """
    with naming_the_field(source, trust_remote_code), loading(source, trust_remote_code) as library:
        config = library.config()
        set_settings(config)
        check_memory(library, config)
        with parameters_on_meta():
            model = library.structure(config)
    model.config.name_or_path = source.place  # type: ignore[union-attr]
    return model


def needed_tensors(files: WeightFiles, architecture: Architecture, last_layer: int) -> list[StoredTensor]:
    """What `load_partial` reads."""
    names = stored_names(files, architecture.model)
    return [files.find(names.of(name)) for name in _needed(architecture, last_layer, names)]


def stays_in_files(files: WeightFiles, architecture: Architecture, last_layer: int, device: str | None) -> bool:
    """Whether the beginning of a model takes so much of the free memory that it is left in its files."""
    size = sum(stored.size for stored in needed_tensors(files, architecture, last_layer))
    return device in (None, "cpu") and size > MEMORY_SHARE * free_memory()


def _needed(architecture: Architecture, last_layer: int, names: StoredNames) -> list[str]:
    """Parameters of the decoder but for later layers, and those of its buffers that are stored, as scalars of a layer.

    What stands around the layers is small or needed.
    """
    decoder = architecture.layers_name.rpartition(".")[0]
    prefix, layers = f"{decoder}." if decoder else "", f"{architecture.layers_name}."
    found = []
    stored_buffers = (
        name
        for name, value in architecture.model.state_dict(keep_vars=True).items()
        if not isinstance(value, nn.Parameter) and name in names.plain
    )
    for name in (*(name for name, _ in architecture.model.named_parameters()), *stored_buffers):
        in_layers = name.startswith(layers)
        if name.startswith(prefix) and (not in_layers or int(name[len(layers) :].split(".")[0]) <= last_layer):
            found.append(name)
    embedding = architecture.embedding
    return found + [
        name
        for name, parameter in architecture.model.named_parameters()
        if name not in found and any(parameter is own for own in embedding.parameters())
    ]


def _set(
    model: nn.Module, name: str, stored: StoredTensor, dtype: torch.dtype | None, device: str | None, mapped: bool
) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    expected = tuple(parameter.shape)
    if stored.shape != expected:
        raise InputError(f"{stored.file}: {stored.name} has the shape {stored.shape}, but the model's is {expected}.")
    values = stored.map() if mapped else stored.read()
    if dtype is not None and parameter.is_floating_point():
        values = values.to(_loaded_dtype(model, name, parameter, dtype))
    values = values.to(device) if device else values
    if leaf in module._buffers:
        module._buffers[leaf] = values
    else:
        module._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def _loaded_dtype(model: nn.Module, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers loads a parameter in: the model's, but for those that the class itself keeps."""
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return kept
    made_in = getattr(model.config, "dtype", None) or torch.get_default_dtype()
    return dtype if parameter.dtype == made_in else parameter.dtype


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside hold no memory; buffers, which are computed and not loaded, are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
