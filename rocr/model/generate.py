"""Generate answers of a model to questions, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import check_text
from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.chat import render_chats
from rocr.model.forward import cache_of, forward, input_device, is_of_transformers, logits_of
from rocr.model.hooks import evaluating
from rocr.model.tokenizer import calling_tokenizer, tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic
from rocr.ops.wide_products import wide_products
from rocr.progress import Progress, ProgressCallback

MAX_QUESTION = 2_000
"""Limit of the characters of a question."""
Watch = Callable[[list[int]], bool]
"""Called with the tokens written so far after each of them; returns whether generation continues."""


def reporting(progress: ProgressCallback, stage: str, total: int, before: int = 0) -> Watch:
    """Return a function that reports a step of a stage for each token written.

    Args:
        progress: Called after every token.
        stage: The name of the stage.
        total: The number of the model's passes in the stage.
        before: The number of passes before the first token.
    """

    def watch(tokens: list[int]) -> bool:
        progress(Progress(stage, before + len(tokens), total, "passes"))
        return True

    return watch


@plain_arithmetic()
def ask(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[str],
    max_tokens: int = 40,
    chat: ChatSettings = DEFAULT,
    always: bool = False,
) -> list[str]:
    """Generate greedy answers to questions. Each is a user's message if the tokenizer has a chat template.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer; its padding settings are not used.
        questions: The questions, which are asked in one batch.
        max_tokens: The largest number of tokens of an answer.
        chat: The settings of the chat template.
        always: Whether a model whose `generate` fails is run token by token.

    Returns:
        An answer for each question, with runs of white space replaced by one space.

    Raises:
        InputError: The tokenizer, its chat template or the model's own code fails.
    """
    answers = continue_texts(model, tokenizer, render_chats(tokenizer, questions, chat), max_tokens, always)
    return [" ".join(answer.split()) for answer in answers]


def continue_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int, always: bool = False
) -> list[str]:
    """Return what a model writes after texts, greedily, without a chat template.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer; its padding settings are not used.
        texts: The texts, which are continued in one batch.
        max_tokens: The largest number of tokens that follow a text.
        always: Whether a model whose `generate` fails is run token by token.

    Raises:
        InputError: The tokenizer or the model's own code fails.
    """
    if not texts:
        return []
    prompts = [tokenize_prompt(tokenizer, text) for text in texts]
    return _decoded(tokenizer, continue_greedily(model, tokenizer, prompts, max_tokens, always))


@plain_arithmetic()
def answer_in_steps(
    model: nn.Module,
    tokenizer: Any,
    question: str,
    show: Callable[[str], bool],
    max_tokens: int = 40,
    chat: ChatSettings = DEFAULT,
) -> str:
    """Generate the greedy answer to one question, and give its beginning to a function after each token.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer.
        question: The question.
        show: Called with the text so far after each token; returns whether generation continues.
        max_tokens: The largest number of tokens of the answer.
        chat: The settings of the chat template.

    Returns:
        The answer, or its beginning if `show` ended it. Line breaks are kept.

    Raises:
        InputError: As `ask`.
    """

    def watch(tokens: list[int]) -> bool:
        return show(_decoded(tokenizer, [tokens])[0].strip())

    prompt = tokenize_prompt(tokenizer, render_chats(tokenizer, [question], chat)[0])
    return _decoded(tokenizer, continue_greedily(model, tokenizer, [prompt], max_tokens, always=True, watch=watch))[
        0
    ].strip()


def _decoded(tokenizer: Any, written: Sequence[list[int]]) -> list[str]:
    """Return the texts of tokens, without special tokens."""
    with calling_tokenizer(tokenizer):
        answers: Any = tokenizer.batch_decode(written, skip_special_tokens=True)
    if not isinstance(answers, list) or list(map(type, answers)) != [str] * len(written):
        raise InputError(
            f"The tokenizer ({type(tokenizer).__name__}) does not decode {len(written)} answers to as many texts."
        )
    return answers


def continue_greedily(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    always: bool = False,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Return the most likely tokens after each prompt, at most `max_tokens` of them, one after another.

    A prompt that ends sooner is followed by its end-of-text token, which may be repeated.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer, which gives the end-of-text token if the model does not.
        prompts: Token ids, with opening tokens.
        max_tokens: The largest number of tokens.
        always: Whether a model whose `generate` fails is run token by token.
        watch: Called with the tokens after the first prompt; it may end the generation of all. A model that is run
            token by token answers one prompt after another, and each is followed.

    Raises:
        InputError: The model's own code fails.
    """
    ends = _end_tokens(model) or tokenizer.eos_token_id
    if is_of_transformers(model):
        try:
            return _generate(model, prompts, ends, max_tokens, watch)
        except InputError:
            if not always:
                raise
    return [_greedy(model, prompt, ends, max_tokens, watch) for prompt in prompts]


def _generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    ends: int | list[int] | None,
    max_tokens: int,
    watch: Watch | None,
) -> list[list[int]]:
    """Generate the tokens after each prompt with transformers' `generate`, in one batch."""
    longest = max(map(len, prompts))
    # Generation appends on the right, so the padding is on the left, masked.
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = input_device(model)
    # Finished rows are padded with the end token, which decoding omits.
    filler = ends[0] if isinstance(ends, list) else ends
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0 if filler is None else filler
    )
    generating = calling(
        f"generate of {type(model).__name__}", "Do not generate: use --no-answers, without --generate."
    )
    follow = None if watch is None else StoppingCriteriaList([_Watched(watch, longest)])
    with generating, _default_generation_config(model), wide_products():
        written = model.generate(  # type: ignore[operator]
            tokens.to(device), attention_mask=mask.to(device), generation_config=settings, stopping_criteria=follow
        )
        found: list[list[int]] = written[:, longest:].tolist()
    return found


class _Watched(StoppingCriteria):  # type: ignore[misc]
    """Give the tokens of one row after each step to a function, which may end the generation."""

    def __init__(self, watch: Watch, start: int) -> None:
        self._watch, self._start = watch, start

    def __call__(self, input_ids: Tensor, scores: Any, **_more: Any) -> Tensor:
        """Return whether each row is done."""
        done = not self._watch(input_ids[0, self._start :].tolist())
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


def _greedy(
    model: nn.Module, prompt: list[int], ends: int | list[int] | None, max_tokens: int, watch: Watch | None = None
) -> list[int]:
    """Generate the tokens after a prompt with a model's own code, which may not work with `generate`."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    written: list[int] = []
    state = None
    with evaluating(model):
        while len(written) < max_tokens and not stops.intersection(written):
            # A model without a cache reads the whole text again.
            fresh = [*prompt, *written] if state is None else written[-1:]
            output = forward(model, torch.tensor([fresh]), past_key_values=state, use_cache=True)
            state = cache_of(model, output)
            written.append(int(logits_of(output)[0, -1].argmax()))
            if watch is not None and not watch(written):
                break
    return written


def _end_tokens(model: nn.Module) -> list[int]:
    """Return the end-of-text tokens of the model's generation settings; empty if there are none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found: list[Any] = ends if isinstance(ends, list) else [ends]
    return found if all(isinstance(token, int) and not isinstance(token, bool) for token in found) else []


@contextmanager
def _default_generation_config(model: nn.Module) -> Iterator[None]:
    """Replace the model's generation settings, such as beams and penalties, by the defaults inside the context."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own  # type: ignore[assignment]


def fill_question(question: str, names: Sequence[str]) -> list[str]:
    """Return a question for each name, with the name in place of `{}`.

    Raises:
        InputError: The question does not have exactly one `{}`, is too long, or is not UTF-8.
    """
    check_text("The question", question, MAX_QUESTION)
    if question.count("{}") != 1:
        raise InputError(f"The question {question!r} must have {{}} once, in the place of the name.")
    return [question.replace("{}", name) for name in names]
