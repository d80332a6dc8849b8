"""Change weights for the time of an attack, and restore them bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from rocr.errors import InputError
from rocr.ops.arithmetic import plain_arithmetic, writing


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of tensors when the context ends, also after an exception or an interruption."""
    originals = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        put(tensors, originals)


def put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into tensors of the same shapes; values of another dtype are rounded once."""
    with plain_arithmetic(), writing(*tensors):
        for tensor, value in zip(tensors, values, strict=True):
            tensor.detach().copy_(value)


@contextmanager
def trainable(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Compute gradients of the given parameters only, inside the context; restore all flags and gradients after it.

    Raises:
        InputError: The model was loaded in inference mode.
    """
    every = list(model.parameters())
    if any(parameter.is_inference() for parameter in every):
        raise InputError(
            "The model was loaded inside torch.inference_mode(), so attacks that need gradients cannot run; load it "
            "outside of this context."
        )
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter in every:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
