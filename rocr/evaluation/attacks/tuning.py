"""Fine-tuning of the edited model, on other forgotten facts (RTT, arXiv 2410.08827) or on harmless questions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import nn

from rocr.errors import InputError, RocrError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, halves, invented, scores_of
from rocr.evaluation.attacks.restoring import put, restored, trainable
from rocr.evaluation.lora_training import Example, answer_nll
from rocr.evaluation.probes.probe import Probe
from rocr.io.boundary import calling
from rocr.model.architecture import find_architecture
from rocr.model.hooks import evaluating
from rocr.progress import Progress, ProgressCallback, silent

BATCH = 4


def tuned(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    steps: Sequence[int],
    rate: float,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Generator[int, None, None]:
    """Train parameters on examples, and yield at each number of steps; the model is restored at the end.

    Use it with `contextlib.closing`, so that the model is also restored after an exception.

    Args:
        model: Causal language model of transformers.
        parameters: The parameters to train, with AdamW without weight decay, in float32.
        examples: Prompts with the answers to learn.
        steps: Numbers of optimiser steps, each on BATCH examples, after which the model is yielded.
        rate: Learning rate, the same in every step.
        seed: Seed of the order of the examples.
        progress: Called after every step.

    Yields:
        The number of steps done.

    Raises:
        InputError: There are no examples or parameters, or the model was loaded in inference mode.
        RocrError: The loss is not a finite number.
    """
    if not examples or not parameters:
        raise InputError(f"Fine-tuning needs examples and parameters, not {len(examples)} and {len(parameters)}.")
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    with restored([parameter.data for parameter in parameters]):
        # Steps are smaller than the resolution of 16-bit weights, so that they are summed in float32.
        sums = [nn.Parameter(parameter.detach().float().clone()) for parameter in parameters]
        optimizer = torch.optim.AdamW(sums, lr=rate, weight_decay=0.0)
        for step in range(1, max(steps, default=0) + 1):
            while len(order) < BATCH:
                order += torch.randperm(len(examples), generator=draw).tolist()
            chosen, order = order[:BATCH], order[BATCH:]
            with trainable(model, parameters), evaluating(model), torch.enable_grad():
                for index in chosen:
                    example = examples[index]
                    loss = answer_nll(model, example.prompt, example.answer) / (len(example.answer) * BATCH)
                    if not torch.isfinite(loss):
                        raise RocrError(f"The training loss is not a finite number; lower the rate, which is {rate:g}.")
                    with calling("The model's backward pass"):
                        loss.backward()  # type: ignore[no-untyped-call]
                for total, parameter in zip(sums, parameters, strict=True):
                    total.grad = None if parameter.grad is None else parameter.grad.float()
                nn.utils.clip_grad_norm_(sums, 1.0)
                optimizer.step()
            put([parameter.data for parameter in parameters], [total.data for total in sums])
            progress(Progress("fine-tuning", step, max(steps), "steps"))
            if step in steps:
                yield step


def _curve(
    target: Target, attack: str, parameters: Sequence[nn.Parameter], taught: Sequence[Probe], asked: Sequence[Probe]
) -> Iterator[Outcome]:
    """Yield an outcome for each number of steps, with the unedited model and invented names as controls."""
    limits = target.limits
    examples, never = target.examples(taught), invented(asked)

    def train() -> Generator[int, None, None]:
        given = (examples, limits.tuning_steps, limits.tuning_rate, limits.seed, target.progress)
        return tuned(target.model, parameters, *given)

    before, after = target.plain(asked)
    never_plain = scores_of(target.ask(never))
    with target.without_edit(), closing(train()) as training:
        control = {step: scores_of(target.ask(asked)) for step in training}
    with closing(train()) as training:
        for step in training:
            found, luck = target.ask(asked), scores_of(target.ask(never))
            yield Outcome(
                *(attack, f"{step} steps", before, after, scores_of(found), control[step], luck, never_plain),
                questions=len(asked),
                evaluation=found,
                details={"trained on": len(examples)},
            )


def _decoder(target: Target) -> list[nn.Parameter]:
    """Return the floating-point parameters of all decoder layers."""
    layers = find_architecture(target.model).layers
    found = (parameter for layer in layers for parameter in layer.parameters())
    return [parameter for parameter in found if parameter.is_floating_point()]


def retrain(target: Target) -> Iterator[Outcome]:
    """Train all decoder layers on some forgotten concepts, and ask about others."""
    learned, asked = halves(target.named)
    yield from _curve(target, "retrain", _decoder(target), learned, asked)


def benign(target: Target) -> Iterator[Outcome]:
    """Train all decoder layers on questions about others, and ask about the forgotten concepts.

    Raises:
        InputError: There are no questions about others.
    """
    others = [probe for probe in target.retain if probe.form == "qa"]
    if not others:
        raise InputError("Fine-tuning on harmless questions needs plain questions about others than the concepts.")
    yield from _curve(target, "benign", _decoder(target), others, target.named)


def edited_layers(target: Target) -> Iterator[Outcome]:
    """Train the edited weights alone on some forgotten concepts, and ask about others."""
    learned, asked = halves(target.named)
    parameters = list({id(block.parameter): block.parameter for block in target.blocks}.values())
    yield from _curve(target, "edited-layers", parameters, learned, asked)


_CONTROL = "the unedited model with the same training, and invented names after the training"
RETRAIN = Attack(
    "trains all decoder layers on some forgotten concepts, and asks about others",
    "gradient steps over all decoder layers; questions and answers about other concepts of the edit",
    _CONTROL,
    retrain,
)
BENIGN = Attack(
    "trains all decoder layers on questions about others, and asks about the forgotten concepts",
    "gradient steps over all decoder layers; harmless questions and answers",
    _CONTROL,
    benign,
)
EDITED_LAYERS = Attack(
    "trains the edited weights alone on some forgotten concepts, and asks about others",
    "gradient steps over the edited weights; questions and answers about other concepts of the edit",
    _CONTROL,
    edited_layers,
)
