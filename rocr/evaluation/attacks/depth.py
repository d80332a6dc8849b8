"""The depth score UDS: how far the states of every layer have lost the answer, not only the output.

States of the edited model are put into the unedited one, layer by layer. UDS = Σ Δ1 clip(Δ2 / Δ1, 0, 1) / Σ Δ1 over the
layers with Δ1 > 0.05, where Δ is the fall of the answer's log-probability when a layer's states are replaced with those
of a model that never knew (1) or of the edited model (2). It is 0 if nothing is lost, and 1 if as much as by never
knowing. In place of a model that never knew, the unedited model reads the question with an invented name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, invented
from rocr.evaluation.lora_training import answer_nll
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.capture import first_tensor, hidden_hook
from rocr.model.hooks import evaluating, hooked
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress

LEAST_FALL = 0.05
"""Layers whose Δ1, in nats per token, is not larger are left out."""


def depth_score(never: Sequence[float], edited: Sequence[float]) -> float | None:
    """Return UDS from Δ1 and Δ2 of each layer; None if no layer has Δ1 > LEAST_FALL."""
    pairs = [pair for pair in zip(never, edited, strict=True) if pair[0] > LEAST_FALL]
    total = sum(first for first, _ in pairs)
    return sum(first * min(max(second / first, 0.0), 1.0) for first, second in pairs) / total if pairs else None


@plain_arithmetic()
def last_states(architecture: Architecture, prompt: Sequence[int], answer: Sequence[int]) -> list[Tensor]:
    """Return the output (1, answer tokens, d) of each layer where the tokens of the answer are predicted."""
    found: dict[int, Tensor] = {}

    def receive(layer: int, states: Tensor) -> None:
        found[layer] = states[:, len(prompt) - 1 : -1].clone()

    with torch.no_grad(), evaluating(architecture.model), ExitStack() as stack:
        for layer in range(architecture.depth):
            stack.enter_context(hidden_hook(architecture, layer, partial(receive, layer)))
        answer_nll(architecture.model, prompt, answer)
    return [found[layer] for layer in range(architecture.depth)]


@plain_arithmetic()
def patched_falls(
    architecture: Architecture, prompt: Sequence[int], answer: Sequence[int], states: Sequence[Tensor]
) -> list[float]:
    """Return the fall of the mean log-probability of an answer when the states of each layer are replaced, in nats.

    Args:
        architecture: The architecture of the model that reads the prompt.
        prompt: Token ids.
        answer: Token ids.
        states: For each layer the states to put where the tokens of the answer are predicted, see `last_states`.
    """

    def replace(states: Tensor, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        first_tensor(output)[:, len(prompt) - 1 : -1] = states

    def log_probability() -> float:
        return -float(answer_nll(architecture.model, prompt, answer)) / len(answer)

    falls = []
    with torch.no_grad(), evaluating(architecture.model):
        whole = log_probability()
        for layer, given in enumerate(states):
            with hooked(architecture.layers[layer].register_forward_hook, partial(replace, given)):
                falls.append(whole - log_probability())
    return falls


def depth(target: Target) -> Iterator[Outcome]:
    """Measure the depth score of some questions.

    The scores are 1 - UDS, the share of what the layers know that is still there: 1 before the edit by definition.

    Raises:
        InputError: No layer of the unedited model depends on the name in any question.
    """
    probes = target.few(target.named)
    architecture = find_architecture(target.model)
    pairs = target.questions(probes)
    unknown = [question.prompt for _, question in target.questions(invented(probes))]
    answers = [question.answers[0] for _, question in pairs]
    edited = [last_states(architecture, q.prompt, a) for (_, q), a in zip(pairs, answers, strict=True)]
    first = torch.zeros(architecture.depth, dtype=torch.float64)
    second = torch.zeros_like(first)
    with target.without_edit():
        for index, (_, question) in enumerate(pairs):
            answer = answers[index]
            never = last_states(architecture, unknown[index], answer)
            for total, states in ((first, never), (second, edited[index])):
                total += torch.tensor(patched_falls(architecture, question.prompt, answer, states)) / len(pairs)
            target.progress(Progress("depth", index + 1, len(pairs), "questions"))
    score = depth_score(first.tolist(), second.tolist())
    if score is None:
        raise InputError(
            f"The answers to {len(pairs)} questions do not depend on the name in any layer of the unedited model, so "
            "there is no depth score; ask about facts that the model knows."
        )
    yield Outcome(
        *("depth", "1 - UDS", {"qa": 1.0}, {"qa": 0.0}, {"qa": 1.0 - score}),
        measure="1 - UDS",
        questions=len(pairs),
        details={"uds": score, "never by layer": first.tolist(), "edited by layer": second.tolist()},
    )


DEPTH = Attack(
    "puts the states of the edited model into the unedited one, layer by layer: the depth score UDS",
    "two forward passes for each layer and question; needs the unedited model",
    "the states of the unedited model at an invented name",
    depth,
)
