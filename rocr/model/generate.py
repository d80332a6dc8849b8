"""Generate answers of a model to questions, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import check_text
from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.chat import render_chats
from rocr.model.forward import cache_of, forward, input_device, is_of_transformers, logits_of
from rocr.model.hooks import evaluating
from rocr.model.prefix_cache import MIN_SHARED_TOKENS, common_prefix, filled_cache, may_pad_after_prefix
from rocr.model.tokenizer import calling_tokenizer, tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic
from rocr.ops.wide_products import wide_products
from rocr.progress import Progress, ProgressCallback

MAX_QUESTION = 2_000
"""Limit of the characters of a question."""


@dataclass(frozen=True)
class Written:
    """What a model writes after a prompt.

    Attributes:
        tokens: Token ids, each the most likely one; the last one may end the text.
        log_probabilities: The log-probability of each token, in nats.
    """

    tokens: list[int]
    log_probabilities: list[float]


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
    written = continue_greedily(model, tokenizer, prompts, max_tokens, always)
    return _decoded(tokenizer, [answer.tokens for answer in written])


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
    (written,) = continue_greedily(model, tokenizer, [prompt], max_tokens, always=True, watch=watch)
    return _decoded(tokenizer, [written.tokens])[0].strip()


def _decoded(tokenizer: Any, written: Sequence[list[int]]) -> list[str]:
    """Return the texts of tokens, without special tokens."""
    with calling_tokenizer(tokenizer):
        answers: Any = tokenizer.batch_decode(written, skip_special_tokens=True)
    if not isinstance(answers, list) or list(map(type, answers)) != [str] * len(written):
        raise InputError(
            f"The tokenizer ({type(tokenizer).__name__}) does not decode {len(written)} answers to as many texts."
        )
    return answers


@plain_arithmetic()
def continue_greedily(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    always: bool = False,
    watch: Watch | None = None,
) -> list[Written]:
    """Return the most likely tokens after each prompt, at most `max_tokens` of them, one after another.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer, which gives the end-of-text token if the model does not.
        prompts: Token ids, with opening tokens. What all of them begin with runs only once.
        max_tokens: The largest number of tokens.
        always: Whether a model whose `generate` fails is run token by token.
        watch: Called with the tokens after the first prompt; it may end the generation of all. A model that is run
            token by token answers one prompt after another, and each is followed.

    Raises:
        InputError: The model's own code fails.
    """
    ends = _end_tokens(model) or tokenizer.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    if is_of_transformers(model):
        try:
            return _generate(model, prompts, stops, max_tokens, watch)
        except InputError:
            if not always:
                raise
    return [_greedy(model, prompt, stops, max_tokens, watch) for prompt in prompts]


def _generate(
    model: nn.Module, prompts: Sequence[list[int]], stops: Collection[int], max_tokens: int, watch: Watch | None
) -> list[Written]:
    """Generate the tokens after each prompt with transformers' `generate`, in one batch."""
    longest = max(map(len, prompts))
    # The last token of a prompt predicts the first one after it, so it is not part of the shared prefix.
    shared = common_prefix([prompt[:-1] for prompt in prompts])
    if len(prompts) == 1 or shared < MIN_SHARED_TOKENS or not may_pad_after_prefix(model, longest + max_tokens):
        shared = 0
    # Generation appends on the right, so the padding is on the left of what a prompt has for itself, masked.
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    rows = [[*prompt[:shared], *pad, *prompt[shared:]] for prompt, pad in zip(prompts, padding, strict=True)]
    masks = [[1] * shared + pad + [1] * (len(prompt) - shared) for prompt, pad in zip(prompts, padding, strict=True)]
    device = input_device(model)
    # Finished rows are padded with an end token.
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0),
    )
    generating = calling(
        f"generate of {type(model).__name__}", "Do not generate: use --no-answers, without --generate."
    )
    recorded = _Recorded()
    arguments: dict[str, Any] = {"logits_processor": LogitsProcessorList([recorded])}
    if watch is not None:
        arguments["stopping_criteria"] = StoppingCriteriaList([_Watched(watch, longest)])
    with generating, _default_generation_config(model), wide_products():
        if shared:
            arguments["past_key_values"] = filled_cache(model, prompts[0][:shared])
            arguments["past_key_values"].batch_repeat_interleave(len(prompts))
        written = model.generate(  # type: ignore[operator]
            torch.tensor(rows).to(device),
            attention_mask=torch.tensor(masks).to(device),
            generation_config=settings,
            **arguments,
        )
        found: list[list[int]] = written[:, longest:].tolist()
        values: list[list[float]] = torch.stack(recorded.steps, dim=1).tolist()
    return [_up_to_end(tokens, row, stops) for tokens, row in zip(found, values, strict=True)]


def _up_to_end(tokens: list[int], values: list[float], stops: Collection[int]) -> Written:
    """Return tokens and their log-probabilities up to the first end token."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return Written(tokens[:length], values[:length])


class _Recorded(LogitsProcessor):  # type: ignore[misc]
    """Keep the largest log-probability of each row after each step: that of the token which is written.

    Attributes:
        steps: (rows,) float32 for each step.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits (rows, vocabulary) as they are."""
        self.steps.append(scores.float().log_softmax(dim=-1).amax(dim=-1).cpu())
        return scores


class _Watched(StoppingCriteria):  # type: ignore[misc]
    """Give the tokens of one row after each step to a function, which may end the generation."""

    def __init__(self, watch: Watch, start: int) -> None:
        self._watch, self._start = watch, start

    def __call__(self, input_ids: Tensor, scores: Any, **_more: Any) -> Tensor:
        """Return whether each row is done."""
        done = not self._watch(input_ids[0, self._start :].tolist())
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


def _greedy(
    model: nn.Module, prompt: list[int], stops: Collection[int], max_tokens: int, watch: Watch | None = None
) -> Written:
    """Generate the tokens after a prompt with a model's own code, which may not work with `generate`."""
    written = Written([], [])
    ends = [[token] for token in stops]
    state = None
    with evaluating(model):
        while len(written.tokens) < max_tokens and written.tokens[-1:] not in ends:
            # A model without a cache reads the whole text again.
            fresh = [*prompt, *written.tokens] if state is None else written.tokens[-1:]
            output = forward(model, torch.tensor([fresh]), past_key_values=state, use_cache=True)
            state = cache_of(model, output)
            value, token = logits_of(output)[0, -1].float().log_softmax(dim=-1).max(dim=-1)
            written.tokens.append(int(token))
            written.log_probabilities.append(float(value))
            if watch is not None and not watch(written.tokens):
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
