"""Measures on ordinary text: perplexity, divergence from the model before, entropy of what is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError, RocrError
from rocr.model.forward import forward, logits_of
from rocr.ops.arithmetic import plain_arithmetic
from rocr.statistics.corpus import pack_tokens

NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


@dataclass(frozen=True)
class TextSample:
    """Token sequences of one length, (sequences, tokens) int64."""

    tokens: Tensor

    @classmethod
    @plain_arithmetic()
    def take(cls, texts: Iterable[str], tokenizer: Any, tokens: int = 8192, length: int = 512) -> TextSample:
        """Cut `tokens` tokens, rounded up to whole sequences, from the beginning of texts.

        Raises:
            InputError: the texts do not fill one sequence.
        """
        wanted = -(-tokens // length)
        full = (s for s in pack_tokens(texts, tokenizer, length) if len(s) == length)
        sequences = list(islice(full, wanted))
        if not sequences:
            raise InputError(f"The text has fewer than {length} tokens, which one sequence needs.")
        return cls(torch.tensor(sequences))


@plain_arithmetic()
def perplexity(model: nn.Module, sample: TextSample, batch: int = 4) -> float:
    """The exponential of the mean negative log-likelihood of every token but the first of each sequence.

    Raises:
        RocrError: it is not a number.
    """
    total, count = 0.0, 0
    for tokens in torch.split(sample.tokens, batch):
        logits = logits_of(forward(model, tokens, use_cache=False))[:, :-1].float()
        tokens = tokens.to(logits.device)
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens[:, 1:].numel()
    if not math.isfinite(total):
        raise RocrError("The perplexity is not a number: the model's logits are not finite.")
    return math.exp(total / count)


@plain_arithmetic()
def divergence(
    model: nn.Module, sample: TextSample, before: Callable[[], AbstractContextManager[Any]], batch: int = 4
) -> float:
    """Mean KL divergence of the next-token distributions, KL(before ‖ now), in nats per token.

    Args:
        model: the model as it is now.
        sample: the text.
        before: gives a context in which the model is as it was before; entered once for every batch.
        batch: sequences that run together.

    Raises:
        RocrError: it is not a number.
    """
    total = sum(_divergences(model, sample, before, batch))
    if not math.isfinite(total):
        raise RocrError("The divergence is not a number: the model's logits are not finite.")
    return total / sample.tokens.numel()


def _divergences(
    model: nn.Module, sample: TextSample, before: Callable[[], AbstractContextManager[Any]], batch: int
) -> Iterable[float]:
    for tokens in torch.split(sample.tokens, batch):
        now = logits_of(forward(model, tokens, use_cache=False)).float().log_softmax(dim=-1)
        with before():
            then = logits_of(forward(model, tokens, use_cache=False)).float().log_softmax(dim=-1)
        yield float(nn.functional.kl_div(now, then, reduction="sum", log_target=True))


def ngram_entropy(tokens: Sequence[Any]) -> float:
    """Weighted mean of the entropies of 2-grams and 3-grams, in bits: low where a text repeats itself.

    The weights are those of ROME (arXiv 2202.05262) and RWKU's fluency: 2/3 and 4/3, over their number.
    """
    weighted = 0.0
    for size, weight in NGRAM_WEIGHTS.items():
        counts = Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
        total = sum(counts.values())
        weighted -= weight * sum(c / total * math.log2(c / total) for c in counts.values())
    return weighted / len(NGRAM_WEIGHTS)
