"""Choose the layers that an edit changes, and check that they can be edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from rocr.config import OFFICIAL_LAYERS, EditConfig
from rocr.errors import InputError
from rocr.model.architecture import Architecture, Block, authors_layers, default_layers
from rocr.model.blocks import LayerBlocks, find_blocks, layer_blocks

BEST_RANK = 2
"""The rank of a layer that has an MLP or experts of its own."""


def resolve_layers(config: EditConfig, architecture: Architecture) -> EditConfig:
    """Return the settings with the layers to edit filled in, after a check that each of them can be edited.

    Raises:
        InputError: A layer is out of range, is not loaded, has no dense down-projection whose output is the output of
            its MLP, or shares the weight with another module.
    """
    layers = chosen_layers(config, architecture)
    for blocks in check_blocks(architecture, layers).values():
        _check_own(architecture.model, blocks)
    return replace(config, layers=layers)


def check_blocks(architecture: Architecture, layers: Iterable[int]) -> Mapping[int, LayerBlocks]:
    """Return the blocks of some layers, after a check that they can be edited.

    Raises:
        InputError: A layer is out of range, is not loaded, or has neither a dense MLP whose output is that of its
            down-projection nor a mixture whose experts can be read.
    """
    layers = tuple(layers)
    for layer in layers:
        if architecture.mixture(layer) is None:
            _check_loaded(architecture.down_projection(layer))
            architecture.check_down_projection(layer)
    found = find_blocks(architecture, layers)
    for blocks in found.values():
        for block in blocks.blocks:
            _check_loaded(block)
    return found


def _check_loaded(block: Block) -> None:
    if block.parameter.device.type == "meta":
        raise InputError(
            f"{block.parameter_name} is on the meta device: it is not loaded, or a device_map offloads it to the CPU "
            "or disk until its layer runs. Load the edited layers onto a device."
        )


def _check_own(model: nn.Module, blocks: LayerBlocks) -> None:
    """Raise InputError if another module shares a weight: an edit would change that module as well."""
    edited = {id(parameter) for parameter in blocks.parameters}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in edited:
            names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1:
            raise InputError(
                f"{' and '.join(shared[:3])} are the same weight: an edit of layer {blocks.layer} would change all of "
                "them. Leave that layer out (layers, --layers), or give each module its own weight."
            )


def chosen_layers(config: EditConfig, architecture: Architecture) -> tuple[int, ...]:
    """Return the layers to edit: those of the settings, or the default ones. The model may be on the meta device.

    Raises:
        InputError: A layer is out of range, or has no dense down-projection.
    """
    is_official = config.layers == OFFICIAL_LAYERS
    layers = config.layer_numbers or (
        authors_layers(architecture.depth) if is_official else layers_by_default(architecture)
    )
    for layer in layers:
        if architecture.mixture(layer) is None:
            architecture.down_projection(layer)
    return layers


def layers_by_default(architecture: Architecture) -> tuple[int, ...]:
    """Return the default layers of a model: those of its depth, or the nearest ones with a better block.

    In a hybrid, layers with an MLP are preferred to layers with a mixer only. Layers that cannot be edited, such as
    layers that attend to images or that share their weights, are left out.
    """
    wanted = default_layers(architecture.depth)
    if all(_rank(architecture, layer) == BEST_RANK for layer in wanted):
        return wanted
    ranks = [_rank(architecture, layer) for layer in range(architecture.depth)]
    best = max(ranks)
    last = max(wanted[-1], architecture.depth - 2)
    chosen: set[int] = set()
    for layer in wanted:
        free = [other for other in range(last + 1) if ranks[other] == best and other not in chosen]
        chosen |= set(sorted(free, key=lambda other: (abs(other - layer), -other))[:1])
    return tuple(sorted(chosen)) if best else wanted


def _rank(architecture: Architecture, layer: int) -> int:
    """Return 2 for a layer with an MLP or experts, 1 for one with a mixer only, 0 for one that cannot be edited."""
    if architecture.mixture(layer) is not None:
        return BEST_RANK
    try:
        _check_own(architecture.model, layer_blocks(architecture, layer))
    except InputError:
        return 0
    return BEST_RANK if architecture.has_mlp(layer) else BEST_RANK - 1


def check_moments(architecture: Architecture, moments: Mapping[int, Sequence[Tensor]]) -> None:
    """Raise InputError unless second moments have the size of the model's keys.

    Args:
        architecture: The architecture of the model.
        moments: For each layer the second moment (d_in, d_in) of each block.

    Raises:
        InputError: The numbers of blocks or the sizes differ; the message names the layer and both.
    """
    for layer, blocks in find_blocks(architecture, moments).items():
        if len(moments[layer]) != len(blocks.blocks):
            raise InputError(
                f"The statistics of layer {layer} are of {len(moments[layer])} weights, but the model's layer has "
                f"{len(blocks.blocks)}. Collect statistics of this model."
            )
        for moment, size in zip(moments[layer], blocks.widths, strict=True):
            if tuple(moment.shape) != (size, size):
                raise InputError(
                    f"The statistics of layer {layer} are of keys of size {moment.shape[0]}, but the model's have size "
                    f"{size}. Collect statistics of this model."
                )
