"""Score answers after prompts in batches; tokens that all rows of a batch begin with run through the model once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rocr.errors import InputError, RocrError
from rocr.model.forward import accepts, forward, input_device, is_of_transformers, logits_of
from rocr.model.tokenizer import opening_tokens, tokenize
from rocr.ops.arithmetic import plain_arithmetic

TOKEN_BUDGET = 2048
MIN_SHARED_TOKENS = 8
"""A shorter common prefix costs more in a separate forward pass than it saves."""


@dataclass(frozen=True)
class Question:
    """A tokenised prompt and the tokenised answers to score after it.

    Attributes:
        prompt: Token ids of the prompt, with the tokenizer's opening tokens.
        answers: Token ids of each answer; every answer has at least one token.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AnswerScore:
    """The scores of one answer.

    Attributes:
        nll: Mean negative log-likelihood of the answer's tokens, in nats.
        accuracy: Share of the answer's tokens with the highest logit, each token given the true tokens before it.
        extraction: Extraction strength (Carlini et al., arXiv 2012.07805): 1 - k/T, where T is the number of tokens
            of the answer and k is the length of the shortest prefix after which greedy decoding gives the rest of the
            answer; 0 if even the last token is not predicted.
    """

    nll: float
    accuracy: float
    extraction: float


@dataclass(frozen=True)
class _Row:
    """A token sequence to run.

    Attributes:
        question: Index of the question.
        tokens: Token ids of the prompt and of an answer without its last token.
        prompt_length: Number of tokens of the prompt.
        answers: Indices of the question's answers that are scored with the logits of this row.
    """

    question: int
    tokens: tuple[int, ...]
    prompt_length: int
    answers: tuple[int, ...]


def tokenize_questions(tokenizer: Any, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Question]:
    """Tokenise prompts and their answers.

    The tokenizer's opening tokens, such as BOS, precede every prompt once; answers have none.

    Args:
        tokenizer: Tokenizer of the model.
        texts: Prompts.
        answers: Answers to each prompt.

    Raises:
        InputError: If the tokenizer fails, or gives no token for an answer.
    """
    if not texts:
        return []
    flat = [answer for group in answers for answer in group]
    opening = opening_tokens(tokenizer, texts[0])
    prompts, tokens = tokenize(tokenizer, texts), [tuple(ids) for ids in tokenize(tokenizer, flat)]
    if (len(prompts), len(tokens)) != (len(texts), len(flat)):
        raise InputError(
            f"The tokenizer returns {len(prompts) + len(tokens)} token sequences for {len(texts) + len(flat)} texts; "
            "it must return one for each text."
        )
    questions, rest = [], iter(tokens)
    for prompt, group in zip(prompts, answers, strict=True):
        found = tuple(next(rest) for _ in group)
        if not all(found):
            raise InputError(f"The tokenizer gives no token for an answer among {list(group)}; change the answer.")
        questions.append(Question((*opening, *prompt), found))
    return questions


@plain_arithmetic()
def score_answers(
    model: nn.Module,
    questions: Sequence[Question],
    receive: Callable[[int, list[AnswerScore]], None],
    token_budget: int = TOKEN_BUDGET,
) -> None:
    """Score the answers of every question, in batches of similar length.

    Args:
        model: Causal language model of transformers.
        questions: Prompts and answers.
        receive: Function that is called once for each question, with its index and the scores of its answers.
        token_budget: Maximum number of tokens in a batch, padding included.

    Raises:
        InputError: If the model fails on a question.
        RocrError: If a score is not a finite number.
    """
    training = model.training
    model.eval()
    try:
        found: dict[int, dict[int, AnswerScore]] = {}
        for batch in _batches(_rows(questions), token_budget):
            for row, logits in zip(batch, _answer_logits(model, batch), strict=True):
                scores = found.setdefault(row.question, {})
                for answer in row.answers:
                    scores[answer] = _score(questions[row.question].answers[answer], logits)
                if len(scores) == len(questions[row.question].answers):
                    receive(row.question, [scores[i] for i in range(len(scores))])
                    del found[row.question]
    finally:
        model.train(training)


def _rows(questions: Sequence[Question]) -> list[_Row]:
    """Return the sequences to run: one for each answer of several tokens, with all answers of one token in the first.

    The scores of a one-token answer need only the logits at the end of the prompt, which every row has.
    """
    rows = []
    for index, question in enumerate(questions):
        single = tuple(i for i, answer in enumerate(question.answers) if len(answer) == 1)
        longer = [i for i, answer in enumerate(question.answers) if len(answer) > 1]
        groups = [(longer[0], *single), *((i,) for i in longer[1:])] if longer else [single]
        for group in groups:
            # The last token of an answer is left out: the logits after it are not scored.
            tokens = (*question.prompt, *question.answers[group[0]][:-1])
            rows.append(_Row(index, tokens, len(question.prompt), group))
    return rows


def _batches(rows: Sequence[_Row], token_budget: int) -> Iterator[list[_Row]]:
    """Yield batches of rows of similar length; rows with the same prompt are not separated."""
    prompts: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        prompts.setdefault((row.question, row.prompt_length), []).append(row)
    alone = [group[0] for group in prompts.values() if len(group) == 1]
    for group in [sorted(alone, key=lambda row: len(row.tokens)), *(g for g in prompts.values() if len(g) > 1)]:
        batch: list[_Row] = []
        for row in group:
            if batch and (len(batch) + 1) * max(len(row.tokens), len(batch[0].tokens)) > token_budget:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def _answer_logits(model: nn.Module, batch: Sequence[_Row]) -> Iterator[Tensor]:
    """Yield the logits (answer tokens, vocabulary), float32, that predict the answer of each row."""
    # The last token of a prompt predicts the first token of its answer, so it is not part of the shared prefix.
    shared = _common_prefix([row.tokens[: row.prompt_length - 1] for row in batch])
    if len(batch) == 1 or shared < MIN_SHARED_TOKENS or not _keeps_cache(model):
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
        arguments["past_key_values"] = _run_prefix(model, tokens[:1, :shared], len(batch))
    width = longest - shared - first
    logits = logits_of(forward(model, tokens[:, shared:], logits_to_keep=width, **arguments))
    if logits.shape[1] != width:
        logits = logits[:, -width:]
    for i, row in enumerate(batch):
        start = row.prompt_length - 1 - shared - first
        yield logits[i, start : start + len(row.tokens) - row.prompt_length + 1].float()


def _run_prefix(model: nn.Module, tokens: Tensor, rows: int) -> DynamicCache:
    """Return the attention cache of a prefix that all rows share, repeated for each row."""
    cache = DynamicCache(config=model.config)
    forward(model, tokens, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    return cache


def check_vocabulary(answer: Sequence[int], logits: Tensor) -> None:
    """Raise InputError unless every token of an answer has a logit.

    The last token of an answer is never an input of the model, so the model does not check it.
    """
    if max(answer) >= logits.shape[-1]:
        raise InputError(
            f"The tokenizer gives token {max(answer):,}, but the model has {logits.shape[-1]:,} tokens; use the "
            "tokenizer of this model."
        )


def _score(answer: Sequence[int], logits: Tensor) -> AnswerScore:
    """Score an answer from the logits (>= answer tokens, vocabulary) that predict its tokens."""
    check_vocabulary(answer, logits)
    wanted = torch.tensor(answer, device=logits.device)
    logits = logits[: len(answer)]
    nll = float(nn.functional.cross_entropy(logits.double(), wanted))
    if nll != nll or nll == float("inf"):
        raise RocrError(
            "A score is not a finite number, because the model's logits are not finite; load the model in float32 or "
            "bfloat16."
        )
    right = (logits.argmax(dim=-1) == wanted).tolist()
    return AnswerScore(nll, sum(right) / len(right), extraction_strength(right))


def extraction_strength(right: Sequence[bool]) -> float:
    """Return the extraction strength 1 - k/T of an answer of T tokens; see `AnswerScore`.

    Args:
        right: For each token of the answer, whether it has the highest logit.
    """
    needed = max((i + 1 for i, ok in enumerate(right) if not ok), default=0)
    return 1 - needed / len(right)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))  # all others lie between in sorted order
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return length


def _keeps_cache(model: nn.Module) -> bool:
    """Return whether a model fills the cache that it is given; code that is not of transformers may ignore it."""
    return is_of_transformers(model) and accepts(model, "past_key_values")
