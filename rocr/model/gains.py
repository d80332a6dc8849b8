"""Measure the gain from a down-projection's output to its layer's output, and invert it.

A decoder layer may scale the output of its down-projection before the output of the layer, with norms, multipliers or
scalars. The gain is measured, without knowledge of the layer's code: the layer is run again with a small change of the
down-projection's output. An update must be divided by the gain to move the layer's output by the residual.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.architecture import Architecture
from rocr.model.blocks import layer_blocks
from rocr.model.capture import as_sequence, as_states, first_tensor, not_called, run_through
from rocr.model.hooks import evaluating, hooked
from rocr.model.wrappers import uncompiled

PROBES = 4
"""Number of directions of change. One suffices if channels do not mix; more average the contributions of others."""
PROBED_TOKENS = 8
DAMPING = 0.1
"""The gain, relative to the mean gain, at which a channel is moved half of the way. No channel is moved by more than
1 / (2 * DAMPING) = 5 times what a channel of the mean gain is: one with almost no gain cannot carry a residual."""
MAX_MIXED_SHARE = 0.5
"""Limit of the share of the change in a channel, median over the channels, that comes from other channels. It is below
0.02 for norms and factors, 0.4 for a branch after the MLP as in Gemma 4, and 0.7 for a matrix."""
UNIT_GAIN_TOLERANCE = 1e-3
"""Largest distance from 1 at which a gain counts as 1."""


@dataclass
class LayerCall:
    """The arguments of a call of a decoder layer, to run the layer again without the model.

    Attributes:
        name: The layer's name, for messages.
        layer: The decoder layer.
        projection: The layer's down-projection, or its mixture of experts.
        arguments: The positional arguments of the call.
        options: The keyword arguments of the call.
        streams_first: See `rocr.model.capture.as_states`.
    """

    name: str
    layer: nn.Module
    projection: nn.Module
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    streams_first: bool | None = None

    @classmethod
    def of(cls, architecture: Architecture, layer: int) -> LayerCall:
        """Return an object that can record a call of a model's decoder layer."""
        name = f"{architecture.layers_name}.{layer}"
        return cls(name, architecture.layers[layer], layer_blocks(architecture, layer).module)

    def record(self, _layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Record the arguments of a call; a forward pre-hook with keyword arguments."""
        # Copies are needed: a layer may change its input in place, in this pass and when it is run again.
        self.arguments, self.options = _copied(arguments), _copied(options)

    def forget(self) -> None:
        """Delete the arguments, to free their memory."""
        self.arguments, self.options = (), {}

    def run(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the layer, with its hooks and a change of the down-projection's output, and return the layer's output.

        Args:
            change: A function from the down-projection's output to the changed output.

        Raises:
            InputError: The layer does not call its down-projection.
        """
        changed: list[Tensor] = []

        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            states = output if isinstance(output, Tensor) else output[0]
            changed.append(change(states))
            return changed[-1] if isinstance(output, Tensor) else (changed[-1], *output[1:])

        handle = self.projection.register_forward_hook(replace)
        try:
            with uncompiled():
                output = self.layer(*_copied(self.arguments), **_copied(self.options))
        finally:
            handle.remove()
        if not changed:
            raise InputError(not_called(f"the down-projection of {self.name}"))
        return first_tensor(output)


def _copied(values: Any) -> Any:
    """Copy the tensors in the arguments of a call."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, tuple):
        return tuple(map(_copied, values))
    if isinstance(values, dict):
        return {name: _copied(value) for name, value in values.items()}
    return values


def recording(stack: ExitStack, call: LayerCall) -> None:
    """Record the arguments of a layer's call until the stack is closed."""
    # Run before the other hooks, which are called again when the layer is run again.
    register = partial(call.layer.register_forward_pre_hook, with_kwargs=True, prepend=True)
    stack.enter_context(hooked(register, call.record))


def layers_with_gain(architecture: Architecture, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers whose gain from the down-projection's output to the layer's output is not 1.

    Args:
        architecture: The architecture of the model.
        layers: The layers to look at.

    Raises:
        InputError: The states of a layer have another shape than (batch, tokens, width), a gain is zero, or a layer
            mixes the channels.
    """
    calls = {layer: LayerCall.of(architecture, layer) for layer in layers}
    rows = int(architecture.embedding.weight.shape[0])  # type: ignore[index, union-attr, operator]
    tokens = (torch.arange(PROBED_TOKENS) % rows)[None]
    with ExitStack() as stack:
        for call in calls.values():
            recording(stack, call)
        run_through(architecture, max(layers), tokens)
    measured = {
        layer: call for layer, call in calls.items() if not _has_unit_gain(architecture.model, call, tokens.shape)
    }
    for call in measured.values():
        _check_channels(architecture.model, call, tokens.shape)
    return tuple(measured)


def measure_gains(model: nn.Module, call: LayerCall, shape: torch.Size) -> Tensor:
    """Measure the gain of each channel: the change of the layer's output per change of the down-projection's output.

    The directions of change are orthogonal to the output itself and to the vector of ones, the two directions that a
    norm removes. The result is then exact for any product of norms, gains and factors.

    Args:
        model: The model of the layer.
        call: The layer's call in a pass.
        shape: (batch, tokens) of that pass.

    Returns:
        The gains, (batch, tokens, width) float32; (batch, tokens, streams * width) with several residual streams.

    Raises:
        InputError: The layer's output has another shape than (batch, tokens, width), it does not depend on the
            down-projection, or the layer cannot be run without the model.
    """
    arrived_by_change, squares = torch.zeros(()), torch.zeros(())
    with evaluating(model), torch.no_grad():
        for probe in range(PROBES):
            change, arrived = _for_each_stream(*_changes(call, shape, probe))
            arrived_by_change = arrived_by_change.to(arrived.device) + change * arrived
            squares = squares.to(change.device) + change.square()
    return arrived_by_change / squares


def divide_by_gains(residuals: Tensor, gains: Tensor, width: int | None = None) -> Tensor:
    """Return the change of a down-projection's output that moves the layer's output by `residuals`, to first order.

    The residuals are multiplied by the damped inverse g / (g² + ε) of the gains g, with ε = (DAMPING · mean |g|)²,
    scaled so that a gain of the mean size is inverted exactly. With several residual streams, the change is the one
    that moves all of them with the least squared error.

    Args:
        residuals: (n, streams * width) changes of the layer's output.
        gains: (n, streams * width) gains, from `measure_gains`.
        width: The number of features of the down-projection's output; None if there is one stream.

    Returns:
        (n, width) changes of the down-projection's output.

    Raises:
        InputError: All gains of a row are zero.
    """
    n, width = len(gains), width or gains.shape[-1]
    moved, squares, sizes = residuals * gains, gains.square(), gains.abs()
    if width < gains.shape[-1]:
        moved, squares = (values.view(n, -1, width).sum(dim=1) for values in (moved, squares))
        sizes = squares.sqrt()
    typical = sizes.mean(dim=-1, keepdim=True)
    if not (typical > 0).all():
        raise InputError(
            "The output of a layer does not depend on its down-projection: all gains are zero, so an edit there has no "
            "effect. Edit other layers (layers, --layers)."
        )
    return moved * (1 + DAMPING**2) / (squares + (DAMPING * typical).square())


def before_output_norm(norm: nn.Module, outputs: Tensor, wanted: Tensor) -> Tensor:
    """Return the change of a norm's inputs that moves its outputs by `wanted`, to first order.

    A norm between a down-projection and the output of its layer, as Gemma 2, Gemma 3 and OLMo 2 have, is inverted as
    in `divide_by_gains`, without the rest of the layer.

    Args:
        norm: The norm.
        outputs: (n, width) outputs of the down-projection, the inputs of the norm.
        wanted: (n, width) changes of the norm's outputs.

    Returns:
        (n, width) float32.

    Raises:
        InputError: The norm's outputs have another shape than its inputs, do not depend on them, or all gains of a
            row are zero.
    """
    through = nn.Identity()
    call = LayerCall(type(norm).__name__, nn.Sequential(through, norm), through, (outputs[None],))
    return divide_by_gains(wanted, measure_gains(norm, call, torch.Size((1, len(outputs))))[0])


def _check_channels(model: nn.Module, call: LayerCall, shape: torch.Size) -> None:
    """Raise InputError if a layer mixes the channels of its down-projection's output: gains cannot describe that."""
    gains = measure_gains(model, call, shape)
    others, squares = torch.zeros(()), torch.zeros(())
    with evaluating(model), torch.no_grad():
        for probe in range(PROBES):
            change, arrived = _for_each_stream(*_changes(call, shape, probe))
            others = others.to(arrived.device) + (arrived - gains * change).square().sum(dim=(0, 1))
            squares = squares.to(arrived.device) + arrived.square().sum(dim=(0, 1))
    share = float((others / squares.clamp(min=1e-30)).median())
    if share > MAX_MIXED_SHARE:
        raise InputError(
            f"The layer {call.name} mixes the channels of its down-projection's output, as another matrix after it "
            f"does: {share:.0%} of the change of a channel comes from others. rocr cannot edit this layer."
        )


def _has_unit_gain(model: nn.Module, call: LayerCall, shape: torch.Size) -> bool:
    with evaluating(model), torch.no_grad():
        change, arrived = _changes(call, shape, 0)
    if arrived.shape != change.shape:
        return False
    return bool(((arrived - change).abs() <= UNIT_GAIN_TOLERANCE * change.abs()).all())


def _changes(call: LayerCall, shape: torch.Size, probe: int) -> tuple[Tensor, Tensor]:
    """Return a change of the down-projection's output and the resulting change of the layer's output, float32.

    The second is (batch, tokens, streams * width) if the layer returns several residual streams.
    """
    with calling(f"Decoder layer {call.name}, run alone to measure the gain of its down-projection's output,"):
        try:
            change, arrived = _by_dual_numbers(call, probe)
        except RuntimeError:  # an operation without a forward derivative
            arrived = None
        if arrived is None or not arrived.any():  # no derivative if the layer detaches its tensors
            change, arrived = _by_differences(call, probe)
    if not arrived.any():
        raise InputError(
            f"The output of the layer {call.name} does not depend on its down-projection, so an edit there has no "
            "effect. Edit other layers (layers, --layers)."
        )
    change = as_sequence(change, shape, f"The output of the down-projection of {call.name}").float()
    arrived = as_states(arrived, shape, f"The output of decoder layer {call.name}", call.streams_first).float()
    if arrived.shape[-1] % change.shape[-1]:
        raise InputError(
            f"Decoder layer {call.name} returns {arrived.shape[-1]} features, and its down-projection "
            f"{change.shape[-1]}: rocr cannot edit such layers."
        )
    return change, arrived


def _for_each_stream(change: Tensor, arrived: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the change for each residual stream that the layer returns."""
    streams = arrived.shape[-1] // change.shape[-1]
    return change.repeat(1, 1, streams) if streams > 1 else change, arrived


def _by_dual_numbers(call: LayerCall, probe: int) -> tuple[Tensor, Tensor | None]:
    """Compute the changes by forward-mode differentiation, which is exact up to rounding in the layer's dtype."""
    changes: list[Tensor] = []

    def change(output: Tensor) -> Tensor:
        changes.append(_direction(output, probe))
        dual: Tensor = forward_ad.make_dual(output, changes[-1])  # type: ignore[no-untyped-call]
        return dual

    with forward_ad.dual_level():
        arrived = forward_ad.unpack_dual(call.run(change)).tangent  # type: ignore[no-untyped-call]
        return changes[-1], None if arrived is None else arrived.clone()


def _by_differences(call: LayerCall, probe: int) -> tuple[Tensor, Tensor]:
    """Compute the changes by the difference of two runs, with a step at which rounding and curvature are balanced."""
    changes: list[Tensor] = []

    def change(sign: float, output: Tensor) -> Tensor:
        step = torch.finfo(output.dtype).eps ** (1 / 3)
        scale = step * output.float().square().mean(dim=-1, keepdim=True).sqrt().to(output.dtype)
        changes.append(_direction(output, probe) * scale)
        return output + sign * changes[-1]

    plus, minus = (call.run(partial(change, sign)).float() for sign in (1.0, -1.0))
    return changes[-1], (plus - minus) / 2


def _direction(output: Tensor, probe: int) -> Tensor:
    """Return random signs, the same at every token, made orthogonal to the output and to the vector of ones."""
    generator = torch.Generator().manual_seed(probe)
    signs = torch.randint(0, 2, output.shape[-1:], generator=generator).to(output.device).float() * 2 - 1
    signs = signs - signs.mean()
    centred = output.detach().float()
    centred = centred - centred.mean(dim=-1, keepdim=True)
    along = (centred * signs).sum(dim=-1, keepdim=True) / centred.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return (signs - along * centred).to(output.dtype)
