"""Ask a model the same question about many names, in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from rocr.errors import InputError
from rocr.prompts import opening_tokens, render_chat


@torch.no_grad()
def ask(model: nn.Module, tokenizer: Any, questions: Sequence[str], max_tokens: int = 40) -> list[str]:
    """Greedy answers to questions, each asked as a user's message where the tokenizer has a chat template.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; its own padding settings are not used.
        questions: the questions, all in one batch.
        max_tokens: of an answer.
    """
    if not questions:
        return []
    texts = [render_chat(tokenizer, q) if getattr(tokenizer, "chat_template", None) else q for q in questions]
    prompts = [opening_tokens(tokenizer, t) + tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    longest = max(map(len, prompts))
    # Generation appends on the right, so padding stands on the left, masked.
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    ends = _end_tokens(model) or tokenizer.eos_token_id
    # Finished rows are filled up with the end token, which decoding leaves out.
    filler = ends[0] if isinstance(ends, list) else ends
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0 if filler is None else filler
    )
    with _no_settings_of_its_own(model):
        written = model.generate(  # type: ignore[operator]
            tokens.to(device), attention_mask=mask.to(device), generation_config=settings
        )
    answers: list[str] = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [" ".join(answer.split()) for answer in answers]


def _end_tokens(model: nn.Module) -> list[int]:
    """The tokens that end an answer, by the model's generation settings; empty where these name none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found: list[Any] = ends if isinstance(ends, list) else [ends]
    return found if all(isinstance(token, int) and not isinstance(token, bool) for token in found) else []


@contextmanager
def _no_settings_of_its_own(model: nn.Module) -> Iterator[None]:
    """Within the context, generation takes nothing from the model's own settings, such as beams, penalties or texts."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own  # type: ignore[assignment]


def fill_question(question: str, names: Sequence[str]) -> list[str]:
    """Put names into a question with `{}`.

    Raises:
        InputError: the question has no `{}`.
    """
    if question.count("{}") != 1:
        raise InputError(f"The question {question!r} needs {{}} once, where the name goes.")
    return [question.replace("{}", name) for name in names]
