"""What running modules with hooks needs: the mode they run in, hooks that end with a context, and a call's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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
def hooked(register: Callable[..., RemovableHandle], hook: Callable[..., None]) -> Iterator[None]:
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


def input_of(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The first argument of a module's call, which may be named, as in `linear(input=states)`."""
    found: Tensor = (*inputs, *named.values())[0]
    return found
