"""Run a model with those arguments that its own forward takes: code that comes with a model may take few of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.boundary import calling


def forward(model: nn.Module, tokens: Tensor, **arguments: Any) -> Any:
    """The output of a model's forward, called with as many of the arguments as it takes.

    Args:
        model: a causal language model of transformers.
        tokens: (batch, tokens) int64, on any device.
        arguments: further arguments, such as `use_cache`; those that the model does not take are left out.

    Raises:
        InputError: the model's code raises an exception.
    """
    with calling(f"The forward pass of {type(model).__name__}"):
        return model(input_ids=tokens.to(input_device(model)), **taken(model, arguments))


def logits_of(output: Any) -> Tensor:
    """The logits (batch, tokens, vocabulary) of a model's output: an object, a mapping, or a tuple that begins so."""
    with calling("The search for logits in a model's output"):
        if isinstance(output, Mapping):
            found = output["logits"]
        else:
            found = output.logits if hasattr(output, "logits") else output[0]
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise TypeError(f"{type(found).__name__} instead of a tensor of three dimensions")
    return found


def cache_of(model: nn.Module, output: Any) -> Any:
    """What a model remembers of its text, for its next call; None: nothing that it would take again."""
    return getattr(output, "past_key_values", None) if takes(model, "past_key_values") else None


def taken(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a model's forward takes."""
    return {name: value for name, value in arguments.items() if takes(model, name)}


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward takes an argument, by its name or among any others."""
    parameters = inspect.signature(_inner(model).forward).parameters
    return argument in parameters or any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in parameters.values())


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model's code is that of transformers, whose caches are known, and not code of its own."""
    return type(_inner(model)).__module__.startswith("transformers.models.")


def input_device(model: nn.Module) -> Any:
    """Where a model wants its tokens."""
    return input_embedding(model).weight.device


def input_embedding(model: nn.Module) -> Any:
    """The module that holds a model's token embedding as its weight.

    Raises:
        InputError: the model's own code does not give it.
    """
    with calling(f"The call of get_input_embeddings of {type(model).__name__}"):
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(found, "weight", None), Tensor) or found.weight.dim() < 2:
        raise InputError(
            f"get_input_embeddings of {type(model).__name__} gives {type(found).__name__}, which has no matrix as its "
            "weight: rocr reads the token embedding there."
        )
    return found


def _inner(model: nn.Module) -> nn.Module:
    """The model inside an adapter of peft, which passes any argument on."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
