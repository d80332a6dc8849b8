"""Text that a model writes itself, for statistics without a corpus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.model.architecture import positions_of
from rocr.model.chat import find_chat_format
from rocr.model.forward import cache_of, forward, logits_of
from rocr.model.hooks import evaluating
from rocr.model.tokenizer import opening_tokens, tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

SEQUENCES = 128
"""Number of sequences. Many short ones are faster than few long ones: a step takes about as long for 100 as for 1."""


@plain_arithmetic()
def sample_sequences(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    seed: int,
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
) -> list[list[int]]:
    """Sample at least `tokens` tokens from a model at temperature 1, deterministically for a seed.

    Half of the sequences start with the tokenizer's opening tokens. If there is a chat template, the other half starts
    with the opening of a user's message; a chat model then writes the question and the answer.

    Args:
        model: A causal language model of transformers.
        tokenizer: The tokenizer of the model.
        tokens: Number of tokens to write; a few more may be written.
        seed: Seed of the random generator.
        progress: Called after every step.
        chat: Inputs of the chat template.

    Returns:
        The token ids of each sequence.

    Raises:
        InputError: The tokenizer, its chat template or the model's own code fails.
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
                # A model without a cache reads the whole text again.
                fresh = written if state is None else written[:, -1:]
                output = forward(model, fresh, past_key_values=state, use_cache=True, logits_to_keep=1)
                state = cache_of(model, output)
                written = torch.cat([written, _draw(logits_of(output)[:, -1], generator)], dim=1)
                done = len(sequences) * length + rows * (step + 1)
                progress(Progress("text by the model itself", min(done, tokens), tokens, "tokens"))
            sequences += written.tolist()
    return sequences


def _shape(model: nn.Module, starts: list[list[int]], tokens: int) -> tuple[int, int]:
    """Return the number of sequences for each start and the number of tokens of each, limited by the positions."""
    share = -(-tokens // len(starts))
    positions = positions_of(model) or share
    longest = max(1, positions - max(map(len, starts)))
    length = min(longest, -(-share // max(1, min(SEQUENCES, tokens) // len(starts))))
    return -(-share // length), length


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one token for each row of logits (rows, vocabulary), by inversion of the cumulative distribution."""
    cumulative = logits.cpu().double().softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[-1] - 1)


def _starts(model: nn.Module, tokenizer: Any, chat: ChatSettings) -> list[list[int]]:
    """Return the beginnings of the sequences, of at least one token each."""
    opening = opening_tokens(tokenizer, "")
    if not opening:
        config = getattr(model, "config", None)
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(config, "bos_token_id", None), 0)
        opening = [next(token for token in candidates if token is not None)]
    starts = [opening]
    chat_format = find_chat_format(tokenizer, chat)
    if chat_format is not None:
        # The text before the message may be empty.
        starts.append(tokenize_prompt(tokenizer, chat_format.parts("{}")[0]) or opening)
    return starts
