"""Text that a model writes itself: statistics without any corpus, and so without a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rocr.config import DEFAULT, ChatSettings
from rocr.model.architecture import positions_of
from rocr.model.chat import find_chat_format
from rocr.model.forward import cache_of, forward, logits_of
from rocr.model.hooks import evaluating
from rocr.model.tokenizer import opening_tokens, tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

SEQUENCES = 128
"""Many short texts rather than few long ones: a step costs about the same for one as for a hundred."""


@plain_arithmetic()
def sample_sequences(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    seed: int,
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
) -> list[list[int]]:
    """Let a model write `tokens` tokens or a few more at temperature 1, the same ones for the same seed.

    Half of the sequences begin with nothing but the text's opening, half with the opening of a user's message
    where there is a chat template: a model tuned on chats then writes the question and the answer.

    Raises:
        InputError: the tokenizer, its chat template or the model's own code fails.
    """
    starts = _starts(model, tokenizer, chat)
    rows, length = _shape(model, starts, tokens)
    generator = torch.Generator().manual_seed(seed)
    sequences: list[list[int]] = []
    with evaluating(model):
        for start in starts:
            written = torch.tensor([start] * rows)
            state = None
            for step in range(length):
                # A model that keeps nothing of its text reads all of it again.
                fresh = written if state is None else written[:, -1:]
                output = forward(model, fresh, past_key_values=state, use_cache=True, logits_to_keep=1)
                state = cache_of(model, output)
                written = torch.cat([written, _draw(logits_of(output)[:, -1], generator)], dim=1)
                done = len(sequences) * length + rows * (step + 1)
                progress(Progress("text by the model itself", min(done, tokens), tokens, "tokens"))
            sequences += written.tolist()
    return sequences


def _shape(model: nn.Module, starts: list[list[int]], tokens: int) -> tuple[int, int]:
    """How many sequences to write from each start, and how many tokens of each: no more than there are positions."""
    share = -(-tokens // len(starts))
    positions = positions_of(model) or share
    longest = max(1, positions - max(map(len, starts)))
    length = min(longest, -(-share // max(1, min(SEQUENCES, tokens) // len(starts))))
    return -(-share // length), length


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row of logits (rows, vocabulary), by inverting the cumulative distribution."""
    cumulative = logits.cpu().double().softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[-1] - 1)


def _starts(model: nn.Module, tokenizer: Any, chat: ChatSettings) -> list[list[int]]:
    """The beginnings to write on from, at least one token each."""
    opening = opening_tokens(tokenizer, "")
    if not opening:
        config = getattr(model, "config", None)
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(config, "bos_token_id", None), 0)
        opening = [next(token for token in candidates if token is not None)]
    starts = [opening]
    chat_format = find_chat_format(tokenizer, chat)
    if chat_format is not None:
        # A template may write nothing before the message.
        starts.append(tokenize_prompt(tokenizer, chat_format.parts("{}")[0]) or opening)
    return starts
