"""What lies between a down-projection and the residual stream, measured: norms, multipliers, scalars of a layer.

A decoder layer may change what its down-projection returns before that reaches the layer's output. Nothing is known
of it by name here: a layer is run again with a small change of the down-projection's output, and what arrives says
by how much an update must be larger or smaller to move the layer's output as wanted.
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
from rocr.model.capture import as_sequence, first_tensor, not_called, run_through
from rocr.model.hooks import evaluating, hooked
from rocr.model.wrappers import uncompiled

PROBES = 4
"""Directions of change. One is enough where every channel is changed by itself; more average what others add."""
PROBED_TOKENS = 8
DAMPING = 0.1
"""Gain, as a share of the mean gain, at which a channel is moved half of the way. No channel is moved by more than
1 / (2 * DAMPING) = 5 times what a channel of the mean gain is: one that a norm scales away cannot carry a residual."""
MIXED = 0.5
"""Share of what arrives, median over the channels, from which on it is not that of the same channel. Norms and factors
leave less than 0.02, a branch behind the MLP as in Gemma 4 0.4, and a matrix 0.7."""
UNCHANGED = 1e-3
"""Distance from 1 up to which a gain that was measured by finite differences counts as 1."""


@dataclass
class LayerCall:
    """How a decoder layer was called in a pass: enough to run it again by itself.

    Attributes:
        name: the layer's name, for messages.
        layer: the decoder layer.
        projection: its down-projection.
        arguments: the positional arguments of the call.
        options: the named arguments of the call.
    """

    name: str
    layer: nn.Module
    projection: nn.Module
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, architecture: Architecture, layer: int) -> LayerCall:
        """The call, yet to be seen, of a model's decoder layer."""
        name = f"{architecture.layers_name}.{layer}"
        return cls(name, architecture.layers[layer], architecture.down_projection(layer).module)

    def record(self, _layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Take the arguments of a call: a forward pre-hook with options."""
        # Copies: a layer may add to its input in place, in this pass and whenever it is run again.
        self.arguments, self.options = _copied(arguments), _copied(options)

    def forget(self) -> None:
        """Let go of the arguments and their memory."""
        self.arguments, self.options = (), {}

    def run(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output, hooks included, where the down-projection's output is changed first.

        Raises:
            InputError: the layer does not call its down-projection.
        """
        changed: list[Tensor] = []

        def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            changed.append(change(output))
            return changed[-1]

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
    """Arguments with copies of the tensors among them."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, tuple):
        return tuple(map(_copied, values))
    if isinstance(values, dict):
        return {name: _copied(value) for name, value in values.items()}
    return values


def recording(stack: ExitStack, call: LayerCall) -> None:
    """Record the arguments of a layer's call until the stack is closed."""
    # Before other hooks, which change the arguments again when the layer is run again.
    register = partial(call.layer.register_forward_pre_hook, with_kwargs=True, prepend=True)
    stack.enter_context(hooked(register, call.record))


def measured_layers(architecture: Architecture, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The layers at whose output something else arrives than what their down-projection returns.

    Raises:
        InputError: a layer's states are no (batch, tokens, width) tensor, or nothing arrives, or in other channels.
    """
    calls = {layer: LayerCall.of(architecture, layer) for layer in layers}
    rows = int(architecture.embedding.weight.shape[0])  # type: ignore[index, union-attr, operator]
    tokens = (torch.arange(PROBED_TOKENS) % rows)[None]
    with ExitStack() as stack:
        for call in calls.values():
            recording(stack, call)
        run_through(architecture, max(layers), tokens)
    measured = {
        layer: call for layer, call in calls.items() if not _is_unchanged(architecture.model, call, tokens.shape)
    }
    for call in measured.values():
        _check_channels(architecture.model, call, tokens.shape)
    return tuple(measured)


def measure_gains(model: nn.Module, call: LayerCall, shape: torch.Size) -> Tensor:
    """By how much each channel of a small change of the down-projection's output is scaled at the layer's output.

    The directions of change are orthogonal to the output itself and to the vector of ones, the two that a norm
    removes: what is measured is then exact for any product of norms, gains and factors.

    Args:
        model: the model of the layer.
        call: the layer's call in a pass.
        shape: (batch, tokens) of that pass.

    Returns:
        (batch, tokens, width) float32.

    Raises:
        InputError: the layer's output is no (batch, tokens, width) tensor, nothing arrives there, or the layer cannot
            be run by itself.
    """
    arrived_by_change, squares = torch.zeros(()), torch.zeros(())
    with evaluating(model), torch.no_grad():
        for probe in range(PROBES):
            change, arrived = _arrived(call, shape, probe)
            arrived_by_change = arrived_by_change.to(arrived.device) + change * arrived
            squares = squares.to(change.device) + change.square()
    return arrived_by_change / squares


def before_passage(gains: Tensor, residuals: Tensor) -> Tensor:
    """What to add to a down-projection's output so that the layer's output moves by `residuals`, to first order.

    The damped inverse g / (g² + ε) of the gains g, with ε = (DAMPING · mean |g|)², scaled so that a gain of the mean
    size is inverted exactly.

    Args:
        gains: (n, width) as `measure_gains` finds them.
        residuals: (n, width) wanted changes of the layer's output.

    Raises:
        InputError: all gains of a row are zero: nothing of the down-projection arrives.
    """
    typical = gains.abs().mean(dim=-1, keepdim=True)
    if not (typical > 0).all():
        raise InputError("Nothing of a down-projection's output arrives at its layer's output: its gains are zero.")
    return residuals * gains * (1 + DAMPING**2) / (gains.square() + (DAMPING * typical).square())


def _check_channels(model: nn.Module, call: LayerCall, shape: torch.Size) -> None:
    """Refuse a layer that mixes the channels of what its down-projection returns: no gains say what arrives."""
    gains = measure_gains(model, call, shape)
    others, squares = torch.zeros(()), torch.zeros(())
    with evaluating(model), torch.no_grad():
        for probe in range(PROBES):
            change, arrived = _arrived(call, shape, probe)
            others = others.to(arrived.device) + (arrived - gains * change).square().sum(dim=(0, 1))
            squares = squares.to(arrived.device) + arrived.square().sum(dim=(0, 1))
    share = float((others / squares.clamp(min=1e-30)).median())
    if share > MIXED:
        raise InputError(
            f"What the down-projection of {call.name} returns arrives at the layer's output in other channels "
            f"({share:.0%} of it), as behind another matrix: that is no down-projection that rocr can edit."
        )


def _is_unchanged(model: nn.Module, call: LayerCall, shape: torch.Size) -> bool:
    with evaluating(model), torch.no_grad():
        change, arrived = _arrived(call, shape, 0)
    return bool(((arrived - change).abs() <= UNCHANGED * change.abs()).all())


def _arrived(call: LayerCall, shape: torch.Size, probe: int) -> tuple[Tensor, Tensor]:
    """A change of the down-projection's output and the change of the layer's output that it makes, float32."""
    with calling(f"Decoder layer {call.name}, run by itself to measure what arrives from its down-projection,"):
        try:
            change, arrived = _by_dual_numbers(call, probe)
        except RuntimeError:  # an operation without a forward derivative
            arrived = None
        if arrived is None or not arrived.any():  # also code that detaches its tensors
            change, arrived = _by_differences(call, probe)
    if not arrived.any():
        raise InputError(
            f"What the down-projection of {call.name} returns does not arrive at the layer's output, so that an edit "
            "there changes nothing. rocr cannot edit this layer."
        )
    what = f"The output of decoder layer {call.name}"
    return tuple(as_sequence(values, shape, what).float() for values in (change, arrived))  # type: ignore[return-value]


def _by_dual_numbers(call: LayerCall, probe: int) -> tuple[Tensor, Tensor | None]:
    """By forward-mode differentiation, which is exact to the rounding of the layer's own dtype."""
    changes: list[Tensor] = []

    def change(output: Tensor) -> Tensor:
        changes.append(_direction(output, probe))
        dual: Tensor = forward_ad.make_dual(output, changes[-1])  # type: ignore[no-untyped-call]
        return dual

    with forward_ad.dual_level():
        arrived = forward_ad.unpack_dual(call.run(change)).tangent  # type: ignore[no-untyped-call]
        return changes[-1], None if arrived is None else arrived.clone()


def _by_differences(call: LayerCall, probe: int) -> tuple[Tensor, Tensor]:
    """By the difference of two runs, at the distance where rounding and curvature cost alike."""
    changes: list[Tensor] = []

    def change(sign: float, output: Tensor) -> Tensor:
        step = torch.finfo(output.dtype).eps ** (1 / 3)
        scale = step * output.float().square().mean(dim=-1, keepdim=True).sqrt().to(output.dtype)
        changes.append(_direction(output, probe) * scale)
        return output + sign * changes[-1]

    ahead, behind = (call.run(partial(change, sign)).float() for sign in (1.0, -1.0))
    return changes[-1], (ahead - behind) / 2


def _direction(output: Tensor, probe: int) -> Tensor:
    """Signs drawn at random, the same at every token, without their parts along the output and the ones."""
    generator = torch.Generator().manual_seed(probe)
    signs = torch.randint(0, 2, output.shape[-1:], generator=generator).to(output.device).float() * 2 - 1
    signs = signs - signs.mean()
    centred = output.detach().float()
    centred = centred - centred.mean(dim=-1, keepdim=True)
    along = (centred * signs).sum(dim=-1, keepdim=True) / centred.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return (signs - along * centred).to(output.dtype)
