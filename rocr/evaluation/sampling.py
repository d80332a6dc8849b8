"""Sample continuations of a prompt from a model, with their log-probabilities."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from rocr.model.forward import forward, logits_of
from rocr.model.hooks import evaluating
from rocr.model.prefix_cache import keeps_cache
from rocr.ops.arithmetic import plain_arithmetic


@dataclass(frozen=True)
class Sample:
    """A continuation that was sampled from a model.

    Attributes:
        tokens: Token ids, one or more; the last one may be an end token.
        log_probability: Sum of the log-probabilities of the tokens, in nats.
    """

    tokens: tuple[int, ...]
    log_probability: float


@plain_arithmetic()
def sample_continuations(
    model: nn.Module, prompt: Sequence[int], count: int, max_tokens: int, ends: Collection[int], seed: int
) -> list[Sample]:
    """Sample continuations from the whole distribution of a model, at temperature 1.

    Args:
        model: A causal language model of transformers.
        prompt: Token ids, with opening tokens.
        count: Number of continuations, which run in one batch.
        max_tokens: Largest number of tokens of a continuation.
        ends: Tokens after which a continuation ends; they belong to it.
        seed: Seed of the samples.

    Raises:
        InputError: The model's own code fails.
    """
    generator = torch.Generator().manual_seed(seed)
    stopping = torch.tensor(sorted(ends), dtype=torch.int64)
    is_kept = keeps_cache(model)
    cache = DynamicCache() if is_kept else None
    text = torch.tensor([list(prompt)])
    values: list[Tensor] = []
    with evaluating(model):
        # The prompt runs once for all continuations.
        output = forward(model, text, past_key_values=cache, use_cache=is_kept, logits_to_keep=1)
        if cache is not None:
            cache.batch_repeat_interleave(count)
        written = torch.zeros(count, 0, dtype=torch.int64)
        done = torch.zeros(count, dtype=torch.bool)
        while True:
            likely = logits_of(output)[:, -1].double().log_softmax(dim=-1).cpu().expand(count, -1)
            chosen = torch.multinomial(likely.exp(), 1, generator=generator)
            values.append(likely.gather(1, chosen).squeeze(1))
            written = torch.cat([written, chosen], dim=1)
            done |= torch.isin(chosen.squeeze(1), stopping)
            if written.shape[1] == max_tokens or bool(done.all()):
                break
            # A model without a cache reads the whole text again.
            fresh = torch.cat([text.expand(count, -1), written], dim=1) if cache is None else chosen
            output = forward(model, fresh, past_key_values=cache, use_cache=is_kept, logits_to_keep=1)
    likelihoods = torch.stack(values, dim=1)
    return [_cut(tokens, likelihoods[i], ends) for i, tokens in enumerate(written.tolist())]


def _cut(tokens: list[int], values: Tensor, ends: Collection[int]) -> Sample:
    """Return a continuation up to its first end token."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return Sample(tuple(tokens[:length]), float(values[:length].sum()))
