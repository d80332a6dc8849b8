"""Call a model with the arguments that its `forward` accepts: code that comes with a model may accept only few."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.ops.wide_products import wide_products


def forward(model: nn.Module, tokens: Tensor, **arguments: Any) -> Any:
    """Call a model and return its output.

    Args:
        model: A causal language model of transformers.
        tokens: (batch, tokens) int64 token ids, on any device.
        arguments: Further arguments, such as `use_cache`; those that the model does not accept are omitted.

    Raises:
        InputError: The model's code raises an exception.
    """
    with without_image_offset(model), wide_products(), calling(f"The forward pass of {type(model).__name__}"):
        return model(input_ids=tokens.to(input_device(model)), **accepted(model, arguments))


@contextmanager
def without_image_offset(model: nn.Module) -> Iterator[None]:
    """Hide the offset of positions that a vision-language model keeps from its last prompt, inside the context.

    Qwen2-VL and others store how much an image shifts the positions after it, and add it in a call with a cache that
    is not empty. `generate` stores it for prompts without an image too, with one row for each prompt.
    """
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    for module, _ in kept:
        module.rope_deltas = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, offset in kept:
            module.rope_deltas = offset


def logits_of(output: Any) -> Tensor:
    """Return the logits (batch, tokens, vocabulary) of a model's output.

    The output is an object or a mapping with `logits`, or a tuple that starts with them.

    Raises:
        InputError: The output holds no such logits.
    """
    with calling("The search for logits in a model's output"):
        if isinstance(output, Mapping):
            found = output["logits"]
        else:
            found = output.logits if hasattr(output, "logits") else output[0]
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise TypeError(f"{type(found).__name__} instead of a tensor of three dimensions")
    return found


def cache_of(model: nn.Module, output: Any) -> Any:
    """Return the cache in a model's output, for the next call; None if the model accepts no cache."""
    return getattr(output, "past_key_values", None) if accepts(model, "past_key_values") else None


def accepted(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a model's `forward` accepts."""
    return {name: value for name, value in arguments.items() if accepts(model, name)}


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether a model's `forward` accepts an argument, by its name or as one of `**kwargs`."""
    parameters = inspect.signature(_inner(model).forward).parameters.values()
    return takes(model, argument) or any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in parameters)


def takes(model: nn.Module, argument: str) -> bool:
    """Return whether a model's `forward` names an argument."""
    return argument in inspect.signature(_inner(model).forward).parameters


def needs_more_than_text(model: nn.Module) -> bool:
    """Return whether a model's `forward` has arguments without a default besides the token ids, such as an image."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(_inner(model).forward).parameters
    needed = {name for name, kind in parameters.items() if kind.kind in kinds and kind.default is kind.empty}
    return bool(needed - {"input_ids"})


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model's code is part of transformers, whose caches are known, instead of its own."""
    return type(_inner(model)).__module__.startswith("transformers.models.")


def input_device(model: nn.Module) -> Any:
    """Return the device of a model's token embedding, where its input must be."""
    return input_embedding(model).weight.device


def input_embedding(model: nn.Module) -> Any:
    """Return the module that holds a model's token embedding as its weight.

    Raises:
        InputError: `get_input_embeddings` of the model fails or returns something else.
    """
    with calling(f"The call of get_input_embeddings of {type(model).__name__}"):
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(found, "weight", None), Tensor) or found.weight.dim() < 2:
        raise InputError(
            f"get_input_embeddings of {type(model).__name__} returns {type(found).__name__}, whose weight is not a "
            "matrix: rocr needs the token embedding there."
        )
    return found


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside an adapter of peft, whose own `forward` accepts any argument."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
