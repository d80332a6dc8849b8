"""Logits of the tokens that continue prompts, in batches; what all rows of a batch begin with runs only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rocr.model.forward import forward, input_device, logits_of
from rocr.model.hooks import evaluating
from rocr.model.prefix_cache import MIN_SHARED_TOKENS, common_prefix, filled_cache, keeps_cache, read_only
from rocr.model.smaller_batches import retry_with_smaller_batch
from rocr.ops.arithmetic import plain_arithmetic

TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Continuation:
    """A token sequence to run.

    Attributes:
        tokens: Token ids of a prompt and of what continues it, without the last token, whose logits are not needed.
        prompt_length: Number of tokens of the prompt, at least 1.
    """

    tokens: tuple[int, ...]
    prompt_length: int


Row = TypeVar("Row", bound=Continuation)


def continuation_batches(rows: Sequence[Row], token_budget: int = TOKEN_BUDGET) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length; rows with the same prompt are not separated.

    Args:
        rows: The sequences.
        token_budget: Maximum number of tokens of a batch, padding included. A longer row is a batch of its own.
    """
    prompts: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        prompts.setdefault(row.tokens[: row.prompt_length], []).append(row)
    alone = [group[0] for group in prompts.values() if len(group) == 1]
    for group in [sorted(alone, key=lambda row: len(row.tokens)), *(g for g in prompts.values() if len(g) > 1)]:
        batch: list[Row] = []
        for row in group:
            if batch and (len(batch) + 1) * max(len(row.tokens), len(batch[0].tokens)) > token_budget:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def continuation_logits(model: nn.Module, batch: Sequence[Continuation]) -> Iterator[Tensor]:
    """Yield for each row the logits (tokens after the prompt + 1, vocabulary), float32, that predict what continues it.

    Args:
        model: A causal language model of transformers.
        batch: The rows.

    Raises:
        InputError: The model fails.
    """
    # The last token of a prompt predicts the first token after it, so it is not part of the shared prefix.
    shared = common_prefix([row.tokens[: row.prompt_length - 1] for row in batch])
    if len(batch) == 1 or shared < MIN_SHARED_TOKENS or not keeps_cache(model):
        shared = 0
    longest = max(len(row.tokens) for row in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(batch):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, : len(row.tokens)] = 1
    # The model returns logits for the same positions of all rows: from the end of the shortest prompt.
    first = min(row.prompt_length for row in batch) - 1 - shared
    arguments: dict[str, Any] = {"attention_mask": mask.to(input_device(model)), "use_cache": bool(shared)}
    if shared:
        arguments["past_key_values"] = read_only(filled_cache(model, batch[0].tokens[:shared]))
    width = longest - shared - first
    logits = logits_of(forward(model, tokens[:, shared:], logits_to_keep=width, **arguments))
    if logits.shape[1] != width:
        logits = logits[:, -width:]
    for i, row in enumerate(batch):
        start = row.prompt_length - 1 - shared - first
        yield logits[i, start : start + len(row.tokens) - row.prompt_length + 1].float()


@dataclass(frozen=True)
class _Answer(Continuation):
    """A prompt with what follows it, and its index among the prompts."""

    index: int


@plain_arithmetic()
def log_probabilities(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    token_budget: int = TOKEN_BUDGET,
    receive: Callable[[int, Tensor], None] | None = None,
) -> list[Tensor]:
    """Return the log-probabilities of the next token after a prompt, and after each token of an answer but the last.

    Args:
        model: A causal language model of transformers.
        prompts: Token ids, at least one for each prompt.
        answers: The token ids that follow each prompt. An answer without tokens gives the first row alone.
        token_budget: Maximum number of tokens of a batch, padding included. It is halved after each CUDA
            out-of-memory error.
        receive: Is called with the index of each prompt and its result, which is then not kept; after such an error
            with those of the first batches again.

    Returns:
        For each prompt (max(1, answer tokens), vocabulary), float32; empty with `receive`.

    Raises:
        InputError: The model fails.
    """
    pairs = enumerate(zip(prompts, answers, strict=True))
    rows = [_Answer((*prompt, *answer[:-1]), len(prompt), index) for index, (prompt, answer) in pairs]
    found: dict[int, Tensor] = {}

    def run(budget: int) -> None:
        for batch in continuation_batches(rows, budget):
            for row, logits in zip(batch, continuation_logits(model, batch), strict=True):
                (receive or found.__setitem__)(row.index, logits.log_softmax(dim=-1))

    with evaluating(model):
        retry_with_smaller_batch(run, token_budget)
    return [found[index] for index in sorted(found)]
