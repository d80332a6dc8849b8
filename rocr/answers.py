"""Ask a model the same question about many names, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from rocr.arithmetic import plain_arithmetic
from rocr.errors import InputError
from rocr.prompts import opening_tokens, render_chat


@plain_arithmetic()
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
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or tokenizer.eos_token_id
    # Finished rows are filled up with the end token, which decoding leaves out.
    filler = ends[0] if isinstance(ends, list) else ends
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0 if filler is None else filler
    )
    written = model.generate(  # type: ignore[operator]
        tokens.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    answers: list[str] = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [" ".join(answer.split()) for answer in answers]


def fill_question(question: str, names: Sequence[str]) -> list[str]:
    """Put names into a question with `{}`.

    Raises:
        InputError: the question has no `{}`.
    """
    if question.count("{}") != 1:
        raise InputError(f"The question {question!r} needs {{}} once, where the name goes.")
    return [question.replace("{}", name) for name in names]
