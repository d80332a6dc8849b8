"""Replace quantised down-projections of a loaded model by dense ones, so that they can be edited.

The library of a scheme runs the model with packed weights. The down-projections of the layers up to the last edited
one are read from the files instead, and each is compared with the library's own module on random keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.io.dtypes import is_supported
from rocr.model.architecture import find_architecture
from rocr.model.load import LoadedModel
from rocr.model.load_partial import empty_model
from rocr.model.matrix import is_matrix
from rocr.model.quantised.checkpoint import Quantisation, QuantisedWeight, find_quantisation
from rocr.model.stored_names import stored_names
from rocr.model.stored_weights import find_weights

PROBE_KEYS = 8
LARGEST_DIFFERENCE = 0.3
"""Largest relative difference of the outputs of a dense weight from those of the library. Libraries that quantise the
keys to 4 bits too differ by about a tenth; a weight that is read wrongly differs by 1."""


def open_down_projections(loaded: LoadedModel, last_layer: int) -> list[str]:
    """Replace the quantised down-projections of the layers 0 to `last_layer` by dense ones, in place.

    All of them, since the fingerprint of a model leaves out the down-projections that can be edited. A model without
    quantised down-projections stays as it is.

    Args:
        loaded: The model.
        last_layer: The last layer that is edited, or whose keys are read.

    Returns:
        The names of the replaced modules.

    Raises:
        InputError: A weight cannot be read, or the library computes other outputs with it.
    """
    files = find_weights(loaded.source)
    quantisation = None if files is None else find_quantisation(files.folder)
    if files is None or quantisation is None or loaded.architecture.depth <= last_layer:
        return []
    if any(parameter.device.type == "meta" for parameter in loaded.model.parameters()):
        return []  # loaded in part: rocr read plain weights
    if quantisation.scheme.runs_first:
        _run(loaded.model)
    packed = [layer for layer in range(last_layer + 1) if _is_packed(loaded, layer)]
    inside = [name for layer in range(last_layer + 1) for name in _packed_in_mixture(loaded, layer)]
    if not packed and not inside:
        return []
    skeleton = find_architecture(empty_model(loaded.source, trust_remote_code=False))
    names = stored_names(files, skeleton.model)
    projections = [skeleton.down_projection(layer) for layer in packed]
    wanted = [projection.name for projection in projections if not projection.transposed] + inside
    opened = []
    for name in wanted:
        weight = names.quantised.get(f"{name}.weight")
        if weight is not None:
            shape = tuple(skeleton.model.get_parameter(f"{name}.weight").shape)
            _replace(loaded.model, name, weight, shape, quantisation)
            opened.append(name)
    return opened


def _is_packed(loaded: LoadedModel, layer: int) -> bool:
    """Return whether a layer has no dense down-projection, or one whose library quantises its weight or keys."""
    if loaded.architecture.mixture(layer) is not None:
        return False
    try:
        projection = loaded.architecture.down_projection(layer)
    except InputError:
        return True
    return hasattr(projection.module, "quantization_scheme")


def _packed_in_mixture(loaded: LoadedModel, layer: int) -> list[str]:
    """Return the names of the quantised modules in a layer's mixture, such as the matrices of a shared expert.

    All of them, since it is known only when the mixture runs which of them are down-projections.
    """
    mixture = loaded.architecture.mixture(layer)
    if mixture is None:
        return []
    found = []
    for name, module in mixture[1].named_modules():
        weight = getattr(module, "weight", None)
        is_packed = is_matrix(module) and not (isinstance(weight, Tensor) and is_supported(weight.dtype))
        if is_packed or hasattr(module, "quantization_scheme"):
            found.append(f"{mixture[0]}.{name}")
    return found


@torch.no_grad()
def _run(model: nn.Module) -> None:
    """Run a model on one token."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with calling("The quantised model, run on one token,"):
        model(torch.zeros((1, 1), dtype=torch.long, device=device))


@torch.no_grad()
def _replace(
    model: nn.Module, name: str, weight: QuantisedWeight, shape: tuple[int, ...], quantisation: Quantisation
) -> None:
    """Replace one module by a dense one with the values of the files."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"The loaded model has no module {name}, which {weight.name} in the files is for.") from None
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    dtype = _computes_in(model, quantisation)
    values = weight.read(shape).to(device, dtype)
    bias = getattr(module, "bias", None)
    dense = nn.Linear(shape[1], shape[0], bias=isinstance(bias, Tensor), device="meta")
    dense.weight = nn.Parameter(values, requires_grad=False)
    if isinstance(bias, Tensor):
        dense.bias = nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    dense.eval()
    _check_same(name, module, dense, weight)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, dense)


def _computes_in(model: nn.Module, quantisation: Quantisation) -> torch.dtype:
    """Return the dtype of a model's states: that of its embedding, or of its configuration."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    dtype: torch.dtype = embedding.dtype
    return dtype if is_supported(dtype) else quantisation.dtype


def _check_same(name: str, module: nn.Module, dense: nn.Linear, weight: QuantisedWeight) -> None:
    """Raise InputError unless a library's module and a dense one have similar outputs at random keys."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, PROBE_KEYS, dense.in_features, generator=generator).to(dense.weight)
    with calling(f"{name}, a {type(module).__name__} of the quantised model, run alone"):
        theirs = module(keys)
    mine = dense(keys).double()
    difference = float((theirs.double() - mine).norm() / mine.norm().clamp(min=1e-30))
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"{name} is read from the files as {weight.scheme.label}, and its outputs differ from those of the loaded "
            f"{type(module).__name__} by {difference:.2g} of their norm, above the limit of {LARGEST_DIFFERENCE:g}: "
            "rocr does not read this variant of the scheme."
        )
