"""Record what flows through a model: the inputs of down-projections and the outputs of decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from rocr.architectures import Architecture
from rocr.arithmetic import plain_arithmetic
from rocr.sharding import whole, whole_input


class _StopForward(Exception):
    """Ends a forward pass once the last wanted layer has run."""


@contextmanager
def input_hook(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, `receive` gets the module's input, (batch, tokens, features)."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        receive(whole_input(module, inputs[0].detach()))

    with _hooked(module.register_forward_pre_hook, hook):
        yield


@contextmanager
def hidden_hook(architecture: Architecture, layer: int, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, `receive` gets the decoder layer's output, (batch, tokens, d_out)."""

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        receive(whole(_first_tensor(output).detach()))

    with _hooked(architecture.layers[layer].register_forward_hook, hook):
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
    with evaluating(architecture.model), _hooked(architecture.layers[layer].register_forward_hook, stop):
        try:
            architecture.model(**arguments)
        except _StopForward:
            return
    raise RuntimeError(f"The forward pass ended without running decoder layer {layer}.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, the modules' own modes restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooked(register: Callable[..., RemovableHandle], hook: Callable[..., None]) -> Iterator[None]:
    """Within the context a module has a hook. An interruption at its end may leave it there, but never at work."""
    active = [True]

    def while_active(*arguments: Any) -> None:
        if active:
            hook(*arguments)

    handle = None
    try:
        handle = register(while_active)
        yield
    finally:
        active.clear()
        if handle is not None:
            handle.remove()


def _first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's output, which is a tensor or a tuple that starts with one."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
