"""Choose the layers that an edit changes, and check that they can be edited."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from rocr.config import OFFICIAL_LAYERS, EditConfig
from rocr.errors import InputError
from rocr.model.architecture import Architecture, Block, authors_layers, default_layers


def resolve_layers(config: EditConfig, architecture: Architecture) -> EditConfig:
    """Return the settings with the layers to edit filled in, after a check that each of them can be edited.

    Raises:
        InputError: A layer is out of range, is not loaded, has no dense down-projection whose output is the output of
            its MLP, or shares the weight with another module.
    """
    layers = chosen_layers(config, architecture)
    for layer in layers:
        projection = architecture.down_projection(layer)
        _check_own(architecture.model, projection)
        if projection.parameter.device.type == "meta":
            raise InputError(
                f"{projection.parameter_name} is on the meta device: it is not loaded, or a device_map offloads it to "
                "the CPU or disk until its layer runs. Load the edited layers onto a device."
            )
        architecture.check_down_projection(layer)
    return replace(config, layers=layers)


def _check_own(model: nn.Module, projection: Block) -> None:
    """Raise InputError if another module shares the weight: an edit would change that module as well."""
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if parameter is projection.parameter]
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(names[:3])} are the same weight: an edit of layer {projection.layer} would change all of "
            "them. Leave that layer out (layers, --layers), or give each module its own weight."
        )


def chosen_layers(config: EditConfig, architecture: Architecture) -> tuple[int, ...]:
    """Return the layers to edit: those of the settings, or the default ones. The model may be on the meta device.

    Raises:
        InputError: A layer is out of range, or has no dense down-projection.
    """
    layers = wanted_layers(config, architecture)
    for layer in layers:
        architecture.down_projection(layer)
    return layers


def wanted_layers(config: EditConfig, architecture: Architecture) -> tuple[int, ...]:
    """Return the layers to edit as `chosen_layers`, without a check that they can be edited."""
    choose = authors_layers if config.layers == OFFICIAL_LAYERS else default_layers
    return config.layer_numbers or choose(architecture.depth)


def check_moments(architecture: Architecture, moments: dict[int, Tensor]) -> None:
    """Raise InputError unless second moments have the size of the model's keys.

    Args:
        architecture: The architecture of the model.
        moments: For each layer the second moment (d_in, d_in).

    Raises:
        InputError: The sizes differ; the message names the layer and both sizes.
    """
    for layer, moment in moments.items():
        size = architecture.down_projection(layer).weight.shape[1]
        if tuple(moment.shape) != (size, size):
            raise InputError(
                f"The statistics of layer {layer} are of keys of size {moment.shape[0]}, but the model's have size "
                f"{size}. Collect statistics of this model."
            )
