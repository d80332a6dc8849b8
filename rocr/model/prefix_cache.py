"""Run the prefix that prompts share once, and reuse its attention keys and values for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rocr.model.architecture import Architecture, text_config
from rocr.model.capture import run_through
from rocr.model.forward import accepts, forward, is_of_transformers, takes

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
MIN_SHARED_TOKENS = 8
"""A shorter common prefix costs more in a separate forward pass than it saves."""


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """A read-only cache layer: the attention keys and values of a prefix, for one layer of a model.

    The states of a batch are not added to it, so one cache serves all batches, and the memory that a batch needs is
    that of one layer. With sliding attention it still holds the whole prefix; the model's own mask hides the tokens
    that are too far back.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Store the states of a prefix.

        Args:
            keys: (1, heads, tokens, features).
            values: (1, heads, tokens, features).
        """
        super().__init__()
        # Set here: versions of transformers call their own initialisation with different arguments.
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the prefix followed by the states of a batch, (batch, heads, tokens, features) each."""
        return _joined(self.keys, key_states), _joined(self.values, value_states)


def _joined(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=-2)


def can_share(architecture: Architecture) -> bool:
    """Return whether all state of a model's layers is attention keys and values in a cache of transformers.

    State-space and linear attention layers have other states, and remote code may store them in another way. Text
    encoders have no cache, and the states of one that reads both ways depend on the text after the prefix.
    """
    model = architecture.model
    return (
        architecture.kind.writes_text
        and type(model).__module__.startswith("transformers.models.")
        and has_attention_only(model)
    )


def has_attention_only(model: nn.Module) -> bool:
    """Return whether the layers of a model of transformers have no state but attention keys and values."""
    kinds = getattr(text_config(model), "layer_types", None) or ()
    return not getattr(model, "_is_stateful", False) and set(kinds) <= ATTENTION_KINDS


def keeps_cache(model: nn.Module) -> bool:
    """Return whether a model stores all of its state in the cache that it is given; remote code may have its own."""
    return is_of_transformers(model) and accepts(model, "past_key_values") and has_attention_only(model)


def may_pad_after_prefix(model: nn.Module, length: int) -> bool:
    """Return whether rows of a batch of `length` tokens may have masked padding between a shared prefix and their own.

    The model must take the positions of its tokens, since those of the padding do not count, and attend to all of the
    tokens. Vision-language models with positions of their own are left out.
    """
    config = text_config(model)
    reach = (getattr(config, name, None) or length for name in ("sliding_window", "attention_chunk_size"))
    return (
        keeps_cache(model)
        and takes(model, "position_ids")
        and not getattr(config, "is_encoder_decoder", False)
        and not any("rope_deltas" in vars(module) for module in model.modules())
        and length <= min(reach)
    )


def filled_cache(model: nn.Module, tokens: Sequence[int]) -> DynamicCache:
    """Return the attention keys and values of tokens, in one row, of a model for which `keeps_cache` is true.

    Raises:
        InputError: The model fails.
    """
    filled = DynamicCache()  # without the configuration, as in `run_prefix`
    forward(model, torch.tensor([tokens]), past_key_values=filled, use_cache=True, logits_to_keep=1)
    return filled


def run_prefix(architecture: Architecture, layer: int, tokens: tuple[int, ...]) -> Cache:
    """Return the cache of a prefix for decoder layers 0 to `layer`, for use with `run_through`.

    Args:
        architecture: The architecture of a model for which `can_share` is true.
        layer: The last decoder layer to run.
        tokens: The token ids of the prefix.
    """
    filled = DynamicCache()  # without the configuration: a sliding layer would drop the beginning of the prefix
    run_through(architecture, layer, torch.tensor([tokens]), cache=filled)
    return read_only(filled)


def read_only(filled: DynamicCache) -> Cache:
    """Return a cache of the same attention keys and values of one row, for batches of any number of rows."""
    return Cache(layers=[PrefixLayer(layer.keys, layer.values) for layer in filled.layers])


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all sequences begin with; 0 without sequences."""
    # All others lie between the first and the last in sorted order.
    first, last = min(map(tuple, sequences), default=()), max(map(tuple, sequences), default=())
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return length
