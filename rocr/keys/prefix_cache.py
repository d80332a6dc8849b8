"""The beginning that the prompts of a template share, run once: its attention keys and values serve all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rocr.model.architecture import Architecture, text_config
from rocr.model.capture import run_through

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


class PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's attention keys and values of a prefix: every row of every batch reads them, none adds to them.

    Nothing is kept of a batch, so one cache serves all, and memory is that of one layer of one batch. It holds the
    whole prefix also where attention slides: the model's own mask then hides what is too far back.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: (1, heads, tokens, features)."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prefix followed by a batch's own states, each (batch, heads, tokens, features)."""
        return _joined(self.keys, key_states), _joined(self.values, value_states)


def _joined(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=-2)


def can_share(architecture: Architecture) -> bool:
    """Whether a model's layers remember a text by attention keys and values alone, kept in a cache of transformers.

    State-space and linear attention layers do not, and code that comes with a model may keep them in its own way.
    """
    model = architecture.model
    kinds = getattr(text_config(model), "layer_types", None) or ()
    is_known = type(model).__module__.startswith("transformers.models.")
    return is_known and not getattr(model, "_is_stateful", False) and set(kinds) <= ATTENTION_KINDS


def run_prefix(architecture: Architecture, layer: int, tokens: tuple[int, ...]) -> Cache:
    """A cache of a prefix for decoder layers 0 to `layer`, for `run_through` of what follows it.

    Args:
        architecture: of a model that can share.
        layer: the last layer that will run.
        tokens: of the prefix.
    """
    grown = DynamicCache()
    run_through(architecture, layer, torch.tensor([tokens]), cache=grown)
    return Cache(layers=[PrefixLayer(kept.keys, kept.values) for kept in grown.layers])
