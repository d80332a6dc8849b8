"""Cut a reading's prompts into batches: of one shared prefix each, of similar length, no longer than is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.keys.plan import Reading
from rocr.keys.prompts import Prompt

MIN_SAVED_TOKENS = 256
"""Tokens that sharing a prefix must save: below, one batch of whole prompts is faster than several of their ends."""


@dataclass(frozen=True)
class Batch:
    """Prompts to run together.

    Attributes:
        prompts: their indices in the reading.
        tokens: (prompts, t) int64, each without the prefix and padded on the right, where causal attention never
            looks back at padding.
        mask: (prompts, prefix and t), 1 for tokens and 0 for padding; None where there is no padding.
        prefix: the tokens before all of them; empty where they are whole.
    """

    prompts: list[int]
    tokens: Tensor
    mask: Tensor | None
    prefix: tuple[int, ...] = ()


def batches(reading: Reading, token_budget: int, share: bool = True) -> Iterator[Batch]:
    """Batches of a reading, those of one prefix one after the other.

    A prompt ends at the last position that is read: causal attention makes all that follows it immaterial.

    Args:
        reading: what is read where.
        token_budget: tokens of a batch, padding included and prefix not; a longer prompt is a batch of its own.
        share: whether prefixes may be left out.
    """
    first, end = _read_range(reading)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(reading.prompts):
        prefix = prompt.tokens[: prompt.shared] if share and prompt.shared <= first[i] else ()
        groups.setdefault(prefix, []).append(i)
    whole = groups.pop((), [])
    for prefix, members in groups.items():
        if len(prefix) * (len(members) - 1) < MIN_SAVED_TOKENS:
            whole += members
        else:
            yield from _cut(reading.prompts, members, end, prefix, token_budget)
    yield from _cut(reading.prompts, whole, end, (), token_budget)


def _read_range(reading: Reading) -> tuple[list[int], list[int]]:
    """For each prompt the first position that is read and the one after the last."""
    first = [len(prompt.tokens) for prompt in reading.prompts]
    end = [1] * len(reading.prompts)
    for prompt, position in zip(reading.prompt_of, reading.position_of, strict=True):
        first[prompt] = min(first[prompt], position)
        end[prompt] = max(end[prompt], position + 1)
    return first, end


def _cut(
    prompts: Sequence[Prompt], members: Sequence[int], end: Sequence[int], prefix: tuple[int, ...], token_budget: int
) -> Iterator[Batch]:
    """Batches of prompts with one prefix, of ascending length, so that the newest is the longest of its batch."""
    start = len(prefix)
    batch: list[int] = []
    for i in sorted(members, key=lambda i: end[i]):
        if batch and (len(batch) + 1) * (end[i] - start) > token_budget:
            yield _padded(batch, [prompts[j].tokens[start : end[j]] for j in batch], prefix)
            batch = []
        batch.append(i)
    if batch:
        yield _padded(batch, [prompts[j].tokens[start : end[j]] for j in batch], prefix)


def _padded(batch: list[int], rows: Sequence[tuple[int, ...]], prefix: tuple[int, ...]) -> Batch:
    longest = max(map(len, rows))
    tokens = torch.tensor([row + (0,) * (longest - len(row)) for row in rows])
    if min(map(len, rows)) == longest:
        return Batch(batch, tokens, None, prefix)
    lengths = torch.tensor([len(prefix) + len(row) for row in rows])
    mask = (torch.arange(len(prefix) + longest) < lengths[:, None]).long()
    return Batch(batch, tokens, mask, prefix)
