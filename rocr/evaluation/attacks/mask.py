"""A mask over the edited weights: which single weights to set to zero is trained on some concepts, tested on others.

A mask that restores concepts that it was not trained on shows that edits lie in common places (arXiv 2605.28839).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rocr.errors import RocrError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, halves, invented, scores_of
from rocr.evaluation.attacks.restoring import put, restored, trainable
from rocr.evaluation.lora_training import Example, answer_nll
from rocr.io.boundary import calling
from rocr.model.hooks import evaluating
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

START = 1.0
"""The value that every entry of a mask starts with; a weight is kept while its entry is above 0."""
RATE = 0.1
"""Learning rate of Adam, whose step moves an entry by about as much: ten steps in one direction remove a weight."""
BATCH = 4


@plain_arithmetic()
def trained_masks(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    steps: int,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> list[Tensor]:
    """Train one binary mask for each parameter, so that the model with the masked parameters gives the answers.

    The forward pass uses the binary mask of the positive entries; the gradient of an entry is that of its sigmoid
    (straight-through).

    Args:
        model: Causal language model of transformers; its weights are restored after each step.
        parameters: Parameters of the model.
        examples: Prompts with the answers to give.
        steps: Optimiser steps, each on BATCH examples drawn without replacement.
        seed: Seed of the draws.
        progress: Called after every step.

    Returns:
        A boolean tensor of the shape of each parameter: False where the weight is removed.

    Raises:
        InputError: The model was loaded in inference mode, or fails.
        RocrError: The loss is not a finite number.
    """
    weights = [parameter.data for parameter in parameters]
    originals = [weight.clone() for weight in weights]
    entries = [torch.full_like(weight, START, dtype=torch.float32) for weight in weights]
    optimizer = torch.optim.Adam(entries, lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randperm(len(examples), generator=draw)[:BATCH].tolist()
        with masked(parameters, [entry > 0 for entry in entries]), trainable(model, parameters), evaluating(model):
            gradients = _gradients(model, parameters, [examples[index] for index in chosen])
        for entry, weight, gradient in zip(entries, originals, gradients, strict=True):
            slope = torch.sigmoid(entry)
            entry.grad = gradient.float() * weight.float() * slope * (1 - slope)
        optimizer.step()
        progress(Progress("mask", step + 1, steps, "steps"))
    return [entry > 0 for entry in entries]


def _gradients(model: nn.Module, parameters: Sequence[nn.Parameter], examples: Sequence[Example]) -> list[Tensor]:
    """Return the gradients of the mean negative log-likelihood of a token of the answers."""
    for example in examples:
        with torch.enable_grad():
            loss = answer_nll(model, example.prompt, example.answer) / (len(example.answer) * len(examples))
            if not torch.isfinite(loss):
                raise RocrError("The loss of a mask is not a finite number; load the model in float32 or bfloat16.")
            with calling("The model's backward pass"):
                loss.backward()  # type: ignore[no-untyped-call]
    # A parameter that no example uses, such as that of an expert, has no gradient.
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@contextmanager
def masked(parameters: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> Iterator[None]:
    """Set the weights that masks remove to zero inside the context."""
    stored = [parameter.data for parameter in parameters]
    with restored(stored):
        put(stored, [values * mask for values, mask in zip(stored, masks, strict=True)])
        yield


def mask(target: Target) -> Iterator[Outcome]:
    """Train the mask on every other concept and ask about those between them."""
    limits = target.limits
    learned, asked = halves(target.named)
    never = invented(asked)
    parameters = list({id(block.parameter): block.parameter for block in target.blocks}.values())
    examples = target.examples(learned)

    def train() -> list[Tensor]:
        return trained_masks(target.model, parameters, examples, limits.mask_steps, limits.seed, target.progress)

    before, after = target.plain(asked)
    never_plain = scores_of(target.ask(never))
    masks = train()
    with masked(parameters, masks):
        found, luck = target.ask(asked), scores_of(target.ask(never))
    with target.without_edit(), masked(parameters, train()):
        control = scores_of(target.ask(asked))
    removed = sum(int((~each).sum()) for each in masks) / sum(each.numel() for each in masks)
    yield Outcome(
        *("mask", f"{limits.mask_steps} steps", before, after, scores_of(found), control, luck, never_plain),
        questions=len(asked),
        evaluation=found,
        details={"removed": removed, "trained on": len(examples)},
    )


MASK = Attack(
    "trains which of the edited weights to set to zero on some concepts, and asks about others",
    "gradient steps over the edited weights; questions and answers about other concepts of the edit",
    "a mask trained in the same way on the unedited model, and invented names with the mask",
    mask,
)
