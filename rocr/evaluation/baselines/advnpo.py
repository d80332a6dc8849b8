"""AdvNPO: negative preference against a latent adversary that brings answers back (Yuan et al., arXiv 2408.10682)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rocr.evaluation.baselines.layer_outputs import answer_nll, changed_states
from rocr.evaluation.baselines.low_rank import adapted_modules, low_rank_adapter
from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.baselines.training import Schedule, optimise, trainable
from rocr.evaluation.lora_training import NEGATIVE_PREFERENCE, Example
from rocr.model.architecture import Architecture, find_architecture

LAYER = 4
RADIUS, ATTACK_STEPS = 8.0, 3
SCHEDULE = Schedule(NEGATIVE_PREFERENCE.learning_rate, NEGATIVE_PREFERENCE.batch, epochs=5, warmup=20)
BETA = NEGATIVE_PREFERENCE.beta


@contextmanager
def _unlearned(case: Case) -> Iterator[Unlearned]:
    """Train an adapter to lower answers even if the states of a layer are shifted towards them.

    With h the states (tokens, d) after layer 4, NLL(δ) the negative log-likelihood of an answer of T tokens with h + δ
    in their place, and NLL⁰ that of the unedited model:

        attack   δ = argmin NLL(δ)/T over |δ| ≤ ε, in k steps of ε/k against the normalised gradient; the entries of
                 h + δ stay between the smallest and the largest of h
        defence  loss = −(2/β) log sigmoid(β (NLL(δ) − NLL⁰))

    Source:
        arXiv 2408.10682, the min-max problem of LAU and AdvNPO; the perturbed layer 4 and ε = 8 (the norm over all
        tokens of a text) are those of the authors' script for Llama-3.1-8B; k = 3 is that of their script for AdvRMU,
        since none is public for AdvNPO.

    What is chosen here: the authors train all weights with a rate of 1e-6. Here a LoRA adapter is trained with the
    settings of "negative preference", so that the two differ in the perturbation alone: rate 5e-5, batch 16, 5 epochs,
    β = 0.0275. A model of four layers or fewer is perturbed after the last but one. The variants with a loss on retain
    texts are left out.
    """
    architecture = find_architecture(case.model)
    layer = max(0, min(LAYER, architecture.depth - 2))
    examples = case.forget()
    schedule = SCHEDULE.of(case)
    with low_rank_adapter(case.model, schedule.seed) as parameters:
        with trainable(case.model):
            with torch.no_grad():  # the adapter is zero before training
                reference = [float(_nll(case.model, example)) for example in examples]

            def terms(index: int) -> Iterator[Tensor]:
                example = examples[index]
                shift = attack(architecture, case.model, layer, example)
                with changed_states(architecture, layer, lambda states: states + shift.to(states.dtype)):
                    lowered = _nll(case.model, example) - reference[index]
                yield preference_loss(lowered)

            optimise(parameters, len(examples), terms, schedule, case.progress)
        yield Unlearned(case.model)


def preference_loss(lowered: Tensor) -> Tensor:
    """Return −(2/β) log sigmoid(β x) for the increase x of a negative log-likelihood."""
    return -(2 / BETA) * nn.functional.logsigmoid(BETA * lowered)


def attack(
    architecture: Architecture,
    model: nn.Module,
    layer: int,
    example: Example,
    radius: float = RADIUS,
    steps: int = ATTACK_STEPS,
) -> Tensor:
    """Return the shift δ (1, tokens, d) of the states after a layer that makes an answer likelier.

    Gradients must be enabled; those of parameters stay as they are.

    Args:
        architecture: The architecture of the model.
        model: The model to attack.
        layer: The decoder layer.
        example: Prompt and answer.
        radius: ε, the largest norm of δ over all tokens.
        steps: Number of steps.
    """
    seen: list[Tensor] = []

    def look(states: Tensor) -> Tensor:
        seen.append(states.detach().float())
        return states

    with torch.no_grad(), changed_states(architecture, layer, look):
        answer_nll(model, example)
    plain = seen[0]
    low, high = plain.min(), plain.max()
    shift = torch.zeros_like(plain)
    for _ in range(steps):
        leaf = shift.clone().requires_grad_(True)

        def shifted(states: Tensor, leaf: Tensor = leaf) -> Tensor:
            return states.detach() + leaf.to(states.dtype)

        with changed_states(architecture, layer, shifted):
            loss = answer_nll(model, example)
        (gradient,) = torch.autograd.grad(loss, leaf)
        shift = shift - radius / steps * gradient / (gradient.norm() + 1e-6)
        shift = shift * (radius / shift.norm().clamp(min=1e-12)).clamp(max=1.0)
        shift = (plain + shift).clamp(low, high) - plain
    return shift.detach()


def _nll(model: nn.Module, example: Example) -> Tensor:
    """Return the sum of the negative log-likelihoods of an answer's tokens, in nats."""
    return answer_nll(model, example) * len(example.answer)


ADVNPO = Method("AdvNPO", _unlearned, check=adapted_modules)
