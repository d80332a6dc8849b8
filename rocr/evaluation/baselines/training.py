"""Train parameters by the gradients of a loss, one example at a time, so that memory does not grow with a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rocr.errors import InputError, RocrError
from rocr.evaluation.baselines.method import Case
from rocr.evaluation.lora_training import cosine
from rocr.io.boundary import calling
from rocr.model.hooks import evaluating
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.progress import Progress, ProgressCallback

Terms = Callable[[int], Iterable[Tensor]]
"""Yields the terms of the loss of one example, given by its index. Each is differentiated before the next is made."""


@dataclass(frozen=True)
class Schedule:
    """Settings of the optimiser.

    Attributes:
        learning_rate: Learning rate, at the end of the warm-up.
        batch: Examples of a step.
        epochs: Passes over the examples.
        warmup: Steps of linear warm-up, limited to half of all steps, before a cosine to 0. None: a constant rate.
        optimizer: "adamw", or "sgd" without momentum.
        weight_decay: Weight decay of "adamw".
        clip: Largest norm of a gradient; None does not limit it.
        seed: Seed of the order of examples.
        least_steps: Minimum number of steps; epochs are added until it is reached.
        steps: Number of steps, whatever `epochs` and `least_steps` say; None trains for whole epochs.
    """

    learning_rate: float
    batch: int
    epochs: int
    warmup: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    clip: float | None = 1.0
    seed: int = 42
    least_steps: int = 0
    steps: int | None = None

    def of(self, case: Case) -> Schedule:
        """Return the schedule with the number of steps and the seed of a comparison."""
        comparison = case.comparison
        return replace(
            self,
            seed=(self.seed + case.seed) % 2**63,
            steps=self.steps if comparison.steps is None else comparison.steps,
            least_steps=max(self.least_steps, comparison.least_steps),
        )

    def count(self, examples: int) -> int:
        """Return the number of steps for a number of examples."""
        each = math.ceil(examples / self.batch)
        return each * max(self.epochs, math.ceil(self.least_steps / each)) if self.steps is None else self.steps


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters of a model, put it in evaluation mode and enable gradients inside the context.

    What is trained is given requires_grad inside the context, or does not belong to the model.

    Raises:
        InputError: The model was loaded in inference mode, so that nothing can be differentiated.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            "The model was loaded inside torch.inference_mode(), so its parameters cannot be trained; load it outside "
            "of this context."
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with plain_arithmetic(), torch.enable_grad(), evaluating(model):
            model.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            if not flag:
                parameter.grad = None


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters change inside the context, and restore their bits at its end."""
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with plain_arithmetic(), writing(*parameters):
            for parameter, values in zip(parameters, originals, strict=True):
                parameter.data.copy_(values)


@contextmanager
def float32_weights(parameters: Sequence[nn.Parameter]) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
    """Train parameters of any dtype as float32 copies inside the context, which must be in that of `trainable`.

    Yields:
        The copies, which get the gradients of the parameters, and a function that rounds the copies to the parameters.
    """
    copies = [parameter.detach().float().clone() for parameter in parameters]
    handles = []

    def collect(copy: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            copy.grad = gradient if copy.grad is None else copy.grad + gradient
            parameter.grad = None

        return hook

    def write() -> None:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data.copy_(copy)

    try:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.requires_grad_(True)
            hook = collect(copy)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield copies, write
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def optimise(
    parameters: Sequence[Tensor],
    examples: int,
    terms: Terms,
    schedule: Schedule,
    progress: ProgressCallback,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Minimise the mean loss of examples. Gradients must be enabled.

    Args:
        parameters: What is trained, float32.
        examples: Number of examples, at least 1.
        terms: The terms of the loss of an example.
        schedule: Settings of the optimiser.
        progress: Called after every step.
        after_step: Called after every step too, without gradients.

    Raises:
        RocrError: A loss is not a finite number.
    """
    steps = schedule.count(examples)
    optimizer: torch.optim.Optimizer
    if schedule.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=schedule.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    rate = (lambda _: 1.0) if schedule.warmup is None else cosine(min(schedule.warmup, steps // 2), steps)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(schedule.seed)
    order: list[int] = []
    for done in range(1, steps + 1):
        if not order:
            order = torch.randperm(examples, generator=generator).tolist()
        group, order = order[: schedule.batch], order[schedule.batch :]
        for index in group:
            for term in terms(index):
                _differentiate(term / len(group), schedule.learning_rate)
        if schedule.clip is not None:
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after_step()
        progress(Progress("training", done, steps, "steps"))


def _differentiate(loss: Tensor, learning_rate: float) -> None:
    if not torch.isfinite(loss):
        raise RocrError(
            f"The training loss is not a finite number; lower the learning rate, which is {learning_rate:g}."
        )
    with calling("The model's backward pass"):
        loss.backward()  # type: ignore[no-untyped-call]


def in_turn(count: int, seed: int) -> Iterator[int]:
    """Yield the indices of a list without end, each time in another order, which the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
