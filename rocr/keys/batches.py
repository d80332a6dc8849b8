"""Cut the prompts of a reading into batches of similar length that share one prefix each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.keys.plan import Reading
from rocr.keys.prompts import Prompt
from rocr.model.prefix_cache import common_prefix

MIN_SAVED_TOKENS = 128
"""Minimum number of tokens that sharing a prefix must save; below it, one batch of whole prompts is faster."""

MAX_PADDING = 128
"""Largest number of padding tokens in a batch. On a CPU, more of them take longer than a further batch."""


@dataclass(frozen=True)
class Batch:
    """Prompts that are run together.

    Attributes:
        prompts: The indices of the prompts in the reading.
        tokens: (prompts, t) int64, the tokens after the prefix, padded on the right: with causal attention, no token
            attends to padding behind it, and other attention is masked.
        mask: (prompts, prefix + t) int64, 1 for tokens and 0 for padding. None if there is no padding.
        prefix: The tokens before those of all prompts; empty if no prefix is shared.
    """

    prompts: list[int]
    tokens: Tensor
    mask: Tensor | None
    prefix: tuple[int, ...] = ()


def batches(reading: Reading, token_budget: int, share: bool = True, cut: bool = True) -> Iterator[Batch]:
    """Yield the batches of a reading; batches with the same prefix follow each other.

    Args:
        reading: The tokens to read.
        token_budget: Maximum number of tokens of a batch, with padding but without the prefix. A longer prompt is a
            batch of its own.
        share: Whether a prefix that prompts share is run once for all of them.
        cut: Whether each prompt is cut after its last read position: with causal attention, later tokens cannot change
            a state.
    """
    first, end = _read_range(reading)
    if not cut:
        end = [len(prompt.tokens) for prompt in reading.prompts]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(reading.prompts):
        prefix = prompt.tokens[: prompt.shared] if share and prompt.shared <= first[i] else ()
        groups.setdefault(prefix, []).append(i)
    whole = groups.pop((), [])
    for prefix, members in _with_common_openings(groups).items():
        if len(prefix) * (len(members) - 1) < MIN_SAVED_TOKENS:
            whole += members
        else:
            yield from _cut(reading.prompts, members, end, prefix, token_budget)
    yield from _cut(reading.prompts, whole, end, (), token_budget)


def _with_common_openings(groups: Mapping[tuple[int, ...], list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Join the prompts of templates that begin alike, such as with the opening of a chat, under what they share.

    A template whose own prefix saves enough more is left as it is.
    """
    alike: dict[int, list[tuple[int, ...]]] = {}
    for prefix in groups:
        alike.setdefault(prefix[0], []).append(prefix)
    found: dict[tuple[int, ...], list[int]] = {}
    for prefixes in alike.values():
        opening = prefixes[0][: common_prefix(prefixes)]
        for prefix in prefixes:
            saves_more = (len(prefix) - len(opening)) * (len(groups[prefix]) - 1) >= MIN_SAVED_TOKENS
            found.setdefault(prefix if saves_more else opening, []).extend(groups[prefix])
    return found


def _read_range(reading: Reading) -> tuple[list[int], list[int]]:
    """Return for each prompt the first position that is read, and the one after the last."""
    first = [len(prompt.tokens) for prompt in reading.prompts]
    end = [1] * len(reading.prompts)
    for prompt, position in zip(reading.prompt_of, reading.position_of, strict=True):
        first[prompt] = min(first[prompt], position)
        end[prompt] = max(end[prompt], position + 1)
    return first, end


def _cut(
    prompts: Sequence[Prompt], members: Sequence[int], end: Sequence[int], prefix: tuple[int, ...], token_budget: int
) -> Iterator[Batch]:
    """Yield batches of prompts with one prefix, in ascending order of length."""
    start = len(prefix)
    batch: list[int] = []
    own = 0  # the tokens of the batch without padding
    # In ascending order, the newest prompt is the longest of its batch and determines the padding.
    for i in sorted(members, key=lambda i: end[i]):
        tokens = (len(batch) + 1) * (end[i] - start)
        own += end[i] - start
        if batch and (tokens > token_budget or tokens - own > MAX_PADDING):
            yield _padded(batch, [prompts[j].tokens[start : end[j]] for j in batch], prefix)
            batch, own = [], end[i] - start
        batch.append(i)
    if batch:
        yield _padded(batch, [prompts[j].tokens[start : end[j]] for j in batch], prefix)


def _padded(batch: list[int], rows: Sequence[tuple[int, ...]], prefix: tuple[int, ...]) -> Batch:
    """Return the batch of some rows of tokens, each without the prefix."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + (0,) * (longest - len(row)) for row in rows])
    if min(map(len, rows)) == longest:
        return Batch(batch, tokens, None, prefix)
    lengths = torch.tensor([len(prefix) + len(row) for row in rows])
    mask = (torch.arange(len(prefix) + longest) < lengths[:, None]).long()
    return Batch(batch, tokens, mask, prefix)
