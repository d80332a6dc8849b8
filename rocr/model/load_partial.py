"""Load the embedding and the first decoder layers of a model, and leave the other layers on the disk.

Keys and states of layers 0 to L do not depend on later layers. If even these layers take much of the memory, their
weights are memory-mapped: a model that is larger than the memory can be edited.
"""

from __future__ import annotations

import os
import re

import torch
from torch import nn

from rocr.errors import InputError
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.architecture import Architecture, find_architecture, text_config
from rocr.model.check_tokenizer import check_token_ids
from rocr.model.diagnosis import check_memory, naming_the_field, set_settings
from rocr.model.hub import loading
from rocr.model.load import LoadedModel, embedding_rows, load_tokenizer
from rocr.model.quantised.checkpoint import check_scales, find_quantisation
from rocr.model.source import ModelSource
from rocr.model.stored_names import StoredNames, stored_names
from rocr.model.weight_files import WeightFiles, find_weight_files, stored_dtype

MEMORY_SHARE = 0.5
"""Share of the free memory: a larger model is loaded in part, and a part that is larger is memory-mapped."""


def can_load_partially(source: ModelSource, last_layer: int = 0) -> bool:
    """Return whether rocr can read each parameter up to a layer from safetensors files.

    Args:
        source: Where the model comes from.
        last_layer: The last decoder layer to load. The layers of one model may be stored in different ways.

    Raises:
        InputError: The files are damaged.
    """
    return partial_model(source, last_layer) is not None


def partial_model(source: ModelSource, last_layer: int = 0) -> nn.Module | None:
    """Return the model without its weights (`empty_model`) if `can_load_partially` holds for it, else None.

    Raises:
        InputError: The files are damaged.
    """
    files = find_weight_files(source.checkpoint_folder)
    if files is None:
        return None
    try:
        model = empty_model(source)
        architecture = find_architecture(model)
    except InputError:
        return None
    is_quantised = getattr(text_config(model), "quantization_config", None) is not None
    if is_quantised and find_quantisation(files.folder) is None:
        return None
    names = stored_names(files, model)
    return model if all(name in names.readable for name in _needed(architecture, last_layer, names)) else None


def is_large(source: ModelSource) -> bool:
    """Return whether a model's weight files take more than `MEMORY_SHARE` of the free memory."""
    files = find_weight_files(source.checkpoint_folder)
    return files is not None and files.size > MEMORY_SHARE * free_memory()


def free_memory() -> int:
    """Return the bytes of memory that are available without swapping."""
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
    empty: nn.Module | None = None,
) -> LoadedModel:
    """Load a model's embedding and decoder layers 0 to `last_layer`.

    Later layers stay on the meta device and cannot be run. Tensors of another dtype, such as norms in float32, are
    cast as `load_model` casts them, since modules compute in one dtype.

    Args:
        source: A folder with safetensors files.
        last_layer: The last decoder layer to load.
        device: The device to load to; None for the CPU.
        trust_remote_code: Whether code that comes with the model may run.
        mapped: Whether weights are memory-mapped (`StoredTensor.map`) instead of read; the files must then not be
            changed while the model is used. None: map them if they take more than `MEMORY_SHARE` of the free memory.
        dtype: The dtype of the weights; None for the one that most of them are stored in.
        empty: The model without its weights, from `partial_model`, which receives them; None to build it. Not used
            where `trust_remote_code` is given, since `partial_model` runs no code of the model.

    Raises:
        InputError: A tensor is missing, or its shape is not that of the model's parameter.
    """
    files = find_weight_files(source.checkpoint_folder)
    if files is None:
        raise InputError(f"{source.name} cannot be loaded in part: it has no safetensors files.")
    quantisation = find_quantisation(files.folder)
    if quantisation is not None:
        check_scales(quantisation, files)
    model = empty_model(source, trust_remote_code) if empty is None or trust_remote_code else empty
    architecture = find_architecture(model)
    if architecture.mixture(last_layer) is None:
        architecture.down_projection(last_layer)
    if mapped is None:
        mapped = must_map(files, architecture, last_layer, device)
    names = stored_names(files, model)
    needed = _needed(architecture, last_layer, names)
    dtype = dtype or _dtype(files, names, needed)
    _check_memory(model, names, needed, dtype, source)
    for name in needed:
        if name in names.plain:
            _set(model, name, files.find(names.of(name)), dtype, device, mapped)
        else:
            _set_values(model, name, _made_values(model, name, files, names, dtype), device)
    model.tie_weights()  # type: ignore[operator]
    decoder_first(architecture)
    if device is not None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    tokenizer = load_tokenizer(source, trust_remote_code)
    check_token_ids(tokenizer, embedding_rows(model), source.name)
    return LoadedModel(model.eval(), tokenizer, source)


def decoder_first(architecture: Architecture) -> None:
    """Register the decoder before its siblings, such as a vision tower, in each module that contains it.

    `device` of a model of transformers is that of its first parameter, and some models move their input to it. In a
    model that is loaded in part, it must not be the meta device.
    """
    module: nn.Module = architecture.model
    for part in architecture.layers_name.split(".")[:-1]:
        module._modules = {part: module._modules[part]} | module._modules
        module = module.get_submodule(part)


def empty_model(source: ModelSource, trust_remote_code: bool = False) -> nn.Module:
    """Build a model without its weights: parameters on the meta device, buffers with the values that code computes.

    Raises:
        InputError: The configuration is not one of a causal language model, or describes tensors that the weight
            files cannot fill.
    """
    with naming_the_field(source, trust_remote_code), loading(source, trust_remote_code) as library:
        config = library.config()
        set_settings(config)
        check_memory(library, config)
        model = library.skeleton(config, with_buffers=True)
    model.config.name_or_path = source.place  # type: ignore[union-attr]
    return model


def needed_tensors(files: WeightFiles, architecture: Architecture, last_layer: int) -> list[StoredTensor]:
    """Return the stored tensors that `load_partial` reads."""
    names = stored_names(files, architecture.model)
    return [place for name in _needed(architecture, last_layer, names) for place in names.places(files, name)]


def must_map(files: WeightFiles, architecture: Architecture, last_layer: int, device: str | None) -> bool:
    """Return whether `load_partial` memory-maps the layers 0 to `last_layer`: if they take much of the free memory."""
    size = sum(stored.size for stored in needed_tensors(files, architecture, last_layer))
    return device in (None, "cpu") and size > MEMORY_SHARE * free_memory()


def bytes_in_memory(files: WeightFiles, architecture: Architecture, last_layer: int) -> int:
    """Return the bytes of the weights that `load_partial` loads, in the dtype that they have then."""
    names = stored_names(files, architecture.model)
    needed = _needed(architecture, last_layer, names)
    stored = sum(files.find(names.of(name)).size for name in needed if name in names.plain)
    return stored + _made_bytes(architecture.model, names, needed, _dtype(files, names, needed))


def _made_bytes(model: nn.Module, names: StoredNames, needed: list[str], dtype: torch.dtype | None) -> int:
    """Return the bytes of the parameters that are dequantised or joined, and so cannot be memory-mapped."""
    made = [model.get_parameter(name) for name in needed if name not in names.plain]
    return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in made)


def _check_memory(
    model: nn.Module, names: StoredNames, needed: list[str], dtype: torch.dtype | None, source: ModelSource
) -> None:
    """Raise InputError if parameters that cannot be memory-mapped do not fit into the free memory."""
    size, free = _made_bytes(model, names, needed, dtype), free_memory()
    if size > free:
        raise InputError(
            f"{source.name} cannot be loaded in part: the weights of its first layers that are dequantised or stacked "
            f"take {size:,} bytes of memory, and {free:,} are free. Edit earlier layers (--layers), or use a machine "
            "with more memory."
        )


def _needed(architecture: Architecture, last_layer: int, names: StoredNames) -> list[str]:
    """Return the names of the parameters and stored buffers of the decoder, except those of later layers.

    Parameters outside the layers are the embedding, which is needed, and norms, which are small. The decoder is the
    innermost module around layers and embedding: BERT's layers are in a module of their own.
    """
    decoder = _around(architecture)
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


def _around(architecture: Architecture) -> str:
    """Return the name of the innermost module that contains the layers and, if one does, the embedding."""
    decoder = inner = architecture.layers_name.rpartition(".")[0]
    while decoder:
        if any(module is architecture.embedding for module in architecture.model.get_submodule(decoder).modules()):
            return decoder
        decoder = decoder.rpartition(".")[0]
    return inner


def _set(
    model: nn.Module, name: str, stored: StoredTensor, dtype: torch.dtype | None, device: str | None, mapped: bool
) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    expected = tuple(parameter.shape)
    if stored.shape != expected:
        raise InputError(
            f"{stored.name} in {stored.file} has the shape {stored.shape}, but the model's parameter has {expected}."
        )
    values = stored.map() if mapped else stored.read()
    if dtype is not None and parameter.is_floating_point():
        values = values.to(_loaded_dtype(model, name, parameter, dtype))
    _set_values(model, name, values, device)


def _made_values(
    model: nn.Module, name: str, files: WeightFiles, names: StoredNames, dtype: torch.dtype | None
) -> torch.Tensor:
    """Return the values of a parameter that is quantised, or joined, split or transposed from stored tensors.

    Raises:
        InputError: The values have another shape than the parameter, or cannot be read.
    """
    parameter = model.get_parameter(name)
    dtype = None if dtype is None else _loaded_dtype(model, name, parameter, dtype)

    def read(stored: str) -> torch.Tensor:
        weight = names.packed.get(stored)
        if weight is None:
            values = files.find(stored).map()
            return values if dtype is None or not values.is_floating_point() else values.to(dtype)
        assert dtype is not None, "quantised weights have one"
        return weight.read(None).to(dtype)

    if name in names.quantised:
        assert dtype is not None, "quantised weights have one"
        return names.quantised[name].load(tuple(parameter.shape), dtype)
    if name not in names.converted:
        raise InputError(f"{files.folder} does not hold {name}.")
    values = names.converted[name].values(name, model, read)
    if values.shape != parameter.shape:
        stored_names = names.converted[name].names
        raise InputError(
            f"{name} is made of {len(stored_names)} stored tensors such as {stored_names[0]}, which give the shape "
            f"{tuple(values.shape)}, but the model's parameter has {tuple(parameter.shape)}."
        )
    return values.contiguous()


def _set_values(model: nn.Module, name: str, values: torch.Tensor, device: str | None) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    values = values.to(device) if device else values
    if leaf in module._buffers:
        module._buffers[leaf] = values
    else:
        module._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def _dtype(files: WeightFiles, names: StoredNames, needed: list[str]) -> torch.dtype | None:
    """Return the dtype to load in; see `stored_dtype`. For a quantised model, it is that of config.json."""
    quantisation = find_quantisation(files.folder)
    if quantisation is not None:
        return quantisation.dtype
    return stored_dtype(files, [tensor.name for name in needed for tensor in names.places(files, name)])


def _loaded_dtype(model: nn.Module, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that transformers loads a parameter in: `dtype`, unless the model's class keeps another."""
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return kept
    made_in = getattr(model.config, "dtype", None) or torch.get_default_dtype()
    return dtype if parameter.dtype == made_in else parameter.dtype
