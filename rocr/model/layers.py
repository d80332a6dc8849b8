"""Which layers an edit changes, and whether it can."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from rocr.config import OFFICIAL_LAYERS, EditConfig
from rocr.errors import InputError
from rocr.model.architecture import Architecture, DownProjection, authors_layers, default_layers, find_architecture


def resolve_layers(config: EditConfig, model: nn.Module) -> EditConfig:
    """The settings with the layers that will be edited, each known to be editable.

    Raises:
        InputError: a layer is out of range, was never loaded, has no dense down-projection that alone gives its MLP
            its output, or shares it.
    """
    layers = chosen_layers(config, model)
    architecture = find_architecture(model)
    for layer in layers:
        projection = architecture.down_projection(layer)
        _check_own(architecture.model, projection)
        if projection.parameter.device.type == "meta":
            raise InputError(
                f"{projection.parameter_name} is on the meta device: its values were never loaded, or lie on the CPU "
                "or disk until its layer runs (offloading by a device_map). Put the edited layers onto a device."
            )
        architecture.check_down_projection(layer)
    return replace(config, layers=layers)


def _check_own(model: nn.Module, projection: DownProjection) -> None:
    """Refuse a weight that another module holds too, which an edit of this layer would change there as well."""
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if parameter is projection.parameter]
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(names[:3])} are one weight: an edit of layer {projection.layer} would change the others "
            "with it. Leave that layer out (layers, --layers), or give each module its own weight."
        )


def chosen_layers(config: EditConfig, model: nn.Module) -> tuple[int, ...]:
    """The layers that are edited in a model, which need not be loaded.

    Raises:
        InputError: a layer is out of range.
    """
    architecture = find_architecture(model)
    choose = authors_layers if config.layers == OFFICIAL_LAYERS else default_layers
    layers = config.layer_numbers or choose(architecture.depth)
    for layer in layers:
        architecture.down_projection(layer)
    return layers


def check_moments(architecture: Architecture, moments: dict[int, Tensor]) -> None:
    """Refuse second moments of keys of another size than the model's.

    Raises:
        InputError: names the layer and both sizes.
    """
    for layer, moment in moments.items():
        size = architecture.down_projection(layer).weight.shape[1]
        if tuple(moment.shape) != (size, size):
            raise InputError(
                f"The statistics of layer {layer} are of keys of size {moment.shape[0]}, but the model's have {size}."
            )
