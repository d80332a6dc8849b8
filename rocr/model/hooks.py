"""Helpers to run modules with hooks: evaluation mode, hooks that end with a context, and the input of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside the context, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(register: Callable[..., RemovableHandle], hook: Callable[..., None]) -> Iterator[None]:
    """Register a hook inside the context. If removing it is interrupted, the hook stays registered but does nothing."""
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


def input_of(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Return the first argument of a module's call, which may be a keyword argument, as in `linear(input=states)`."""
    found: Tensor = (*inputs, *named.values())[0]
    return found
