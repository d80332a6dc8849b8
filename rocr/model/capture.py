"""Record the inputs of down-projections and the outputs of decoder layers during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.architecture import Architecture
from rocr.model.forward import accepted, without_image_offset
from rocr.model.hooks import evaluating, hooked, input_of
from rocr.model.tensor_parallel import whole, whole_input
from rocr.model.wrappers import uncompiled
from rocr.ops.arithmetic import plain_arithmetic
from rocr.ops.wide_products import wide_products


class _StopForward(BaseException):
    """Ends a forward pass after the last wanted layer. Not an Exception, which the code of a model may catch."""


@contextmanager
def input_hook(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `receive` with each input of a module, (batch, tokens, features), inside the context."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        receive(whole_input(module, input_of(inputs, named).detach()))

    with hooked(partial(module.register_forward_pre_hook, with_kwargs=True), hook):
        yield


@contextmanager
def hidden_hook(architecture: Architecture, layer: int, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `receive` with each output of a decoder layer, (batch, tokens, d_out), inside the context."""

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        receive(whole(first_tensor(output).detach()))

    with hooked(architecture.layers[layer].register_forward_hook, hook):
        yield


@plain_arithmetic()
def run_through(
    architecture: Architecture, layer: int, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None
) -> None:
    """Run the embedding and the decoder layers 0 to `layer`, without later layers and logits.

    Args:
        architecture: The architecture of the model to run.
        layer: The last layer to run.
        tokens: (batch, tokens) int64 token ids, padded on the right.
        mask: (batch, cached and given tokens), 1 for tokens and 0 for padding; None if there is no padding.
        cache: Attention keys and values of the tokens before these, which the layers read and extend; None for none.

    Raises:
        InputError: The model's code raises an exception, or the layer is not called as a module.
    """

    def stop(_module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        raise _StopForward

    device = architecture.embedding.weight.device
    assert isinstance(device, torch.device)
    arguments: dict[str, Any] = {"input_ids": tokens.to(device), "use_cache": cache is not None}
    if cache is not None:
        arguments["past_key_values"] = cache
    if mask is not None:
        arguments["attention_mask"] = mask.to(device)
    # The hook that stops must be the layer's last one, so that the recording hooks run before it.
    stopping = hooked(architecture.layers[layer].register_forward_hook, stop)
    reader = architecture.reader
    with uncompiled(), evaluating(reader), without_image_offset(architecture.model), wide_products(), stopping:
        try:
            with calling(f"The forward pass of {type(reader).__name__}"):
                reader(**accepted(reader, arguments))
        except _StopForward:
            is_stopped = True
        else:
            is_stopped = False
    if not is_stopped:
        raise InputError(not_called(f"decoder layer {architecture.layers_name}.{layer}"))


def check_called(found: Collection[object], modules: Mapping[Any, str]) -> None:
    """Raise InputError unless a forward pass has called every module that is recorded.

    Args:
        found: The keys of the modules whose values were received.
        modules: A description of each recorded module, by its key.

    Raises:
        InputError: A module was not called; the message names it.
    """
    for key, module in modules.items():
        if key not in found:
            raise InputError(not_called(module))


def not_called(module: str) -> str:
    """Return the error message for a module that a forward pass did not call."""
    return (
        f"The forward pass did not call {module}, so its values cannot be read. A fused kernel or compiled code "
        "probably uses its weight directly: load the model without them (use_kernels=False, no torch.compile)."
    )


def as_sequence(states: Tensor, shape: torch.Size, what: str) -> Tensor:
    """Return states as (batch, tokens, width). Some modules return them as (batch * tokens, width).

    Args:
        states: The states.
        shape: (batch, tokens) of the pass.
        what: A description of the states for the error message.

    Raises:
        InputError: The states have another shape.
    """
    if states.ndim == 2 and states.shape[0] == shape.numel():
        states = states.view(*shape, -1)
    if states.ndim != 3 or states.shape[:2] != shape:
        raise InputError(
            f"{what} has the shape {tuple(states.shape)} for (batch, tokens) = {tuple(shape)}, not (batch, tokens, "
            "width): rocr cannot edit such layers."
        )
    return states


def as_states(states: Tensor, shape: torch.Size, what: str, streams_first: bool | None = None) -> Tensor:
    """Return the output of a decoder layer as (batch, tokens, features), the streams of a token one after another.

    Some models carry several residual streams: Gemma 3n returns (streams, batch, tokens, width), models with
    hyper-connections (batch, tokens, streams, width).

    Args:
        states: The output of the layer.
        shape: (batch, tokens) of the pass.
        what: A description of the states for the error message.
        streams_first: Whether the streams are the first dimension; None reads it from the shape.

    Raises:
        InputError: The states have another shape.
    """
    if streams_first is None:
        streams_first = states.shape[1:3] == shape
    if states.ndim != 4 or states.shape[0 if streams_first else 2] == 1:
        return as_sequence(states, shape, what)
    return as_sequence((states.movedim(0, 2) if streams_first else states).flatten(2), shape, what)


def puts_streams_first(architecture: Architecture, layer: int, states: Tensor, shape: torch.Size) -> bool | None:
    """Return whether the streams are the first dimension of a decoder layer's output; None if it has one stream.

    If the shape does not tell, because the pass has as many rows and tokens as there are streams, another pass does.

    Args:
        architecture: The architecture of the model.
        layer: The decoder layer.
        states: The output of the layer.
        shape: (batch, tokens) of the pass.
    """
    if states.ndim != 4:
        return None
    if states.shape[:2] != shape or states.shape[1:3] != shape:
        return states.shape[1:3] == shape
    found: list[Tensor] = []
    tokens = torch.zeros(1, states.shape[0] + 1, dtype=torch.int64)
    with hidden_hook(architecture, layer, found.append):
        run_through(architecture, layer, tokens)
    return found[0].shape[1:3] == tokens.shape


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states of a layer's output, which is a tensor or a tuple that starts with one.

    Raises:
        InputError: The output is neither.
    """
    found = output
    while isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise InputError(
            f"A decoder layer returns {type(output).__name__}, not a tensor or a tuple that starts with one: rocr "
            "cannot edit such layers."
        )
    return found
