"""Read and change the outputs of modules with gradients, by hooks that end with a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.evaluation.lora_training import Example
from rocr.evaluation.scoring import check_vocabulary
from rocr.model.architecture import Architecture
from rocr.model.capture import first_tensor, not_called
from rocr.model.forward import forward, logits_of


class _Stop(BaseException):
    """Ends a forward pass after the wanted layer. Not an Exception, which the code of a model may catch."""


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Any, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Replace each output of a module by `change(output, inputs)` inside the context.

    If removing the hook is interrupted, it stays registered but does nothing.
    """
    active = [True]

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return change(output, inputs) if active else None

    handle = None
    try:
        handle = module.register_forward_hook(hook)
        yield
    finally:
        active.clear()
        if handle is not None:
            handle.remove()


@contextmanager
def changed_states(architecture: Architecture, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the states (batch, tokens, d_out) that a decoder layer returns by `change(states)` inside the context."""

    def changed(output: Any, _inputs: tuple[Any, ...]) -> Any:
        states = change(first_tensor(output))
        return states if isinstance(output, Tensor) else (states, *output[1:])

    with changed_output(architecture.layers[layer], changed):
        yield


def states_after(architecture: Architecture, layer: int, tokens: Sequence[int]) -> Tensor:
    """Return the states (tokens, d_out) after a decoder layer, with gradients; later layers are not run.

    Raises:
        InputError: The model's code raises an exception, or the layer is not called as a module.
    """
    found: list[Tensor] = []

    def stop(output: Any, _inputs: tuple[Any, ...]) -> Any:
        found.append(first_tensor(output))
        raise _Stop

    with changed_output(architecture.layers[layer], stop):
        try:
            forward(architecture.reader, torch.tensor([list(tokens)]), use_cache=False)
        except _Stop:
            return found[0].squeeze(0)
    raise InputError(not_called(f"decoder layer {architecture.layers_name}.{layer}"))


def answer_log_probabilities(model: nn.Module, example: Example) -> Tensor:
    """Return log-probabilities (answer tokens, vocabulary), float32, at each token of an answer after its prompt."""
    tokens = torch.tensor([[*example.prompt, *example.answer]])
    count = len(example.answer)
    output = forward(model, tokens, use_cache=False, logits_to_keep=count + 1)  # some models return all of them
    logits = logits_of(output)[0, -count - 1 : -1].float()
    check_vocabulary(example.answer, logits)
    return logits.log_softmax(dim=-1)


def answer_nll(model: nn.Module, example: Example) -> Tensor:
    """Return the mean negative log-likelihood of an answer's tokens, in nats."""
    found = answer_log_probabilities(model, example)
    wanted = torch.tensor(example.answer, device=found.device)
    return -found.gather(1, wanted[:, None]).mean()
