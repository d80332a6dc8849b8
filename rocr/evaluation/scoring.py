"""Score answers after prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError, RocrError
from rocr.keys.continuations import TOKEN_BUDGET, Continuation, continuation_batches, continuation_logits
from rocr.model.tokenizer import opening_tokens, tokenize
from rocr.ops.arithmetic import plain_arithmetic


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
class _Row(Continuation):
    """The sequence of a question's prompt and an answer.

    Attributes:
        question: Index of the question.
        answers: Indices of the question's answers that are scored with the logits of this row.
    """

    question: int
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
        for batch in continuation_batches(_rows(questions), token_budget):
            for row, logits in zip(batch, continuation_logits(model, batch), strict=True):
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
            rows.append(_Row(tokens, len(question.prompt), index, group))
    return rows


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
