"""Record what flows through a model: the inputs of down-projections and the outputs of decoder layers."""

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
from rocr.model.forward import taken
from rocr.model.hooks import evaluating, hooked, input_of
from rocr.model.tensor_parallel import whole, whole_input
from rocr.model.wrappers import uncompiled
from rocr.ops.arithmetic import plain_arithmetic


class _StopForward(BaseException):
    """Ends a forward pass once the last wanted layer has run. No Exception: a model's own code may catch those."""


@contextmanager
def input_hook(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, `receive` gets the module's input, (batch, tokens, features)."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        receive(whole_input(module, input_of(inputs, named).detach()))

    with hooked(partial(module.register_forward_pre_hook, with_kwargs=True), hook):
        yield


@contextmanager
def hidden_hook(architecture: Architecture, layer: int, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, `receive` gets the decoder layer's output, (batch, tokens, d_out)."""

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        receive(whole(first_tensor(output).detach()))

    with hooked(architecture.layers[layer].register_forward_hook, hook):
        yield


@plain_arithmetic()
def run_through(
    architecture: Architecture, layer: int, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None
) -> None:
    """Run the embedding and the decoder layers 0 to `layer`, and nothing after them: no logits.

    Args:
        architecture: of the model to run.
        layer: the last layer to run.
        tokens: (batch, tokens) int64 token ids, padded on the right.
        mask: (batch, cached and given tokens), 1 for tokens and 0 for padding; None where there is no padding.
        cache: attention keys and values of the tokens before these, which the layers read and write.

    Raises:
        InputError: the model's code raises an exception, or the layer does not run as a module.
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
    # The stop must be the layer's last hook, so that recording hooks have run before it.
    stopping = hooked(architecture.layers[layer].register_forward_hook, stop)
    with uncompiled(), evaluating(architecture.model), stopping:
        try:
            with calling(f"The forward pass of {type(architecture.model).__name__}"):
                architecture.model(**taken(architecture.model, arguments))
        except _StopForward:
            is_stopped = True
        else:
            is_stopped = False
    if not is_stopped:
        raise InputError(unseen(f"decoder layer {architecture.layers_name}.{layer}"))


def check_seen(found: Collection[object], wanted: Mapping[Any, str]) -> None:
    """Make sure that a pass has shown everything that it was to show.

    Args:
        found: what was received, by name.
        wanted: what is to be received: for each name the module in words.

    Raises:
        InputError: something is missing; names the module.
    """
    for name, module in wanted.items():
        if name not in found:
            raise InputError(unseen(module))


def unseen(module: str) -> str:
    """Say that a pass did not call a module."""
    return (
        f"The forward pass ended without a call of {module}, so that nothing can be read there. Its weight is probably "
        "used directly, by a fused kernel or by compiled code: load the model without them (use_kernels=False, no "
        "torch.compile)."
    )


def as_sequence(states: Tensor, shape: torch.Size, what: str) -> Tensor:
    """States as (batch, tokens, width), which modules that flatten the tokens return as (batch * tokens, width).

    Args:
        states: the states.
        shape: (batch, tokens) of the pass.
        what: what they are, for the message.

    Raises:
        InputError: they have another shape.
    """
    if states.ndim == 2 and states.shape[0] == shape.numel():
        states = states.view(*shape, -1)
    if states.ndim != 3 or states.shape[:2] != shape:
        raise InputError(
            f"{what} has the shape {tuple(states.shape)} for (batch, tokens) = {tuple(shape)}, not (batch, tokens, "
            "width): rocr cannot edit models of such layers."
        )
    return states


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's output, which is a tensor or a tuple that starts with one.

    Raises:
        InputError: it is neither.
    """
    found = output
    while isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise InputError(f"A decoder layer returns {type(output).__name__}, not a tensor or a tuple with one first.")
    return found
