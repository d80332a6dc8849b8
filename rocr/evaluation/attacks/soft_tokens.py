"""Soft tokens: vectors before the question, trained so that the model gives the right answer (arXiv 2502.15836).

They elicit answers from models that never knew them, so that the control of invented names is what counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Scores, Target, invented, mean_by_subject
from rocr.evaluation.attacks.restoring import trainable
from rocr.evaluation.lora_training import answer_nll
from rocr.evaluation.probes.probe import Probe
from rocr.io.boundary import calling
from rocr.model.forward import input_embedding
from rocr.model.hooks import evaluating, hooked
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress

RATE = 0.3
"""Learning rate of Adam as a share of the root mean square of an entry of the token embedding."""


@contextmanager
def embedded(model: nn.Module, start: int, vectors: Tensor) -> Iterator[None]:
    """Put vectors (tokens, d) in the place of the embeddings of the tokens from `start`, inside the context."""

    def replace(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        output[:, start : start + len(vectors)] = vectors.to(output.dtype)

    with hooked(input_embedding(model).register_forward_hook, replace):
        yield


@plain_arithmetic()
def trained_vectors(
    model: nn.Module, prompt: Sequence[int], answer: Sequence[int], start: int, count: int, steps: int, seed: int = 0
) -> tuple[Tensor, list[float]]:
    """Train vectors that stand in a prompt so that the answer becomes likely.

    Args:
        model: Causal language model of transformers; it does not change.
        prompt: Token ids.
        answer: Token ids.
        start: Number of tokens of the prompt before the vectors.
        count: Number of vectors. They start as the embeddings of random tokens.
        steps: Optimiser steps.
        seed: Seed of the random tokens.

    Returns:
        The best vectors (count, d), and the mean log-probability of the answer before each step and after the last.

    Raises:
        InputError: `count` is not at least 1, or the model was loaded in inference mode or fails.
    """
    if count < 1:
        raise InputError(f"The number of soft tokens must be at least 1, not {count}.")
    weight = input_embedding(model).weight.detach()
    drawn = torch.randint(len(weight), (count,), generator=torch.Generator().manual_seed(seed))
    vectors = weight[drawn.to(weight.device)].float().clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=RATE * float(weight.float().pow(2).mean().sqrt()))
    tokens = (*prompt[:start], *[prompt[start]] * count, *prompt[start:])
    curve: list[float] = []
    best = vectors.detach().clone()
    with trainable(model), evaluating(model), torch.enable_grad():
        for step in range(steps + 1):
            with embedded(model, start, vectors):
                loss = answer_nll(model, tokens, answer) / len(answer)
            curve.append(-loss.item())
            if curve[-1] >= max(curve):
                best = vectors.detach().clone()
            if step < steps:
                optimizer.zero_grad()
                with calling("The model's backward pass"):
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return best, curve


def soft_tokens(target: Target) -> Iterator[Outcome]:
    """Train the vectors for each question by itself; the controls get vectors of their own."""
    limits, probes = target.limits, target.few(target.named)

    def elicit(asked: Sequence[Probe]) -> tuple[Scores, Scores]:
        pairs, plain, found = target.questions(asked), [], []
        start = 1 if len({question.prompt[0] for _, question in pairs}) == 1 else 0
        for index, (probe, question) in enumerate(pairs):
            given = (question.prompt, question.answers[0], start, limits.soft_tokens, limits.soft_steps, limits.seed)
            _, curve = trained_vectors(target.model, *given)
            with torch.no_grad(), evaluating(target.model):
                nll = float(answer_nll(target.model, question.prompt, question.answers[0]))
            plain.append((probe, torch.tensor(-nll / len(question.answers[0])).exp().item()))
            found.append((probe, torch.tensor(max(curve)).exp().item()))
            target.progress(Progress("soft tokens", index + 1, len(pairs), "questions"))
        return {"qa": mean_by_subject(plain)}, {"qa": mean_by_subject(found)}

    after, attacked = elicit(probes)
    never_plain, luck = elicit(invented(probes))
    with target.without_edit():
        before, control = elicit(probes)
    name = f"{limits.soft_tokens} vectors, {limits.soft_steps} steps"
    yield Outcome("soft-tokens", name, before, after, attacked, control, luck, never_plain, questions=len(probes))


SOFT_TOKENS = Attack(
    "trains vectors before each question so that the right answer becomes likely",
    "gradient steps for each question; the attacker knows the answer",
    "invented names with vectors of their own, and the unedited model",
    soft_tokens,
)
