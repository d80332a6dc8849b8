"""Attacks that change weights: rounding the edited ones, and training on facts of the target (relearning)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rocr.concepts import folded
from rocr.errors import InputError
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import ORT_FORMS, PromptStyle
from rocr.evaluation.lora_training import Training, question_examples, trained
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scores import Evaluation
from rocr.model.architecture import find_architecture
from rocr.model.blocks import find_blocks
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.progress import ProgressCallback, silent

ROUNDING_GROUP = 64


@contextmanager
def rounded(model: nn.Module, layers: Sequence[int], bits: int) -> Iterator[nn.Module]:
    """Round the down-projections of layers to `bits` bits inside the context; rounding can remove a small edit.

    Rounding is symmetric, with one scale for every 64 weights of a row, as in common 4-bit and 8-bit formats.

    Raises:
        InputError: If `bits` is not from 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"bits must be between 2 and 8, not {bits}.")
    architecture = find_architecture(model)
    blocks = [block for layer in find_blocks(architecture, layers).values() for block in layer.blocks]
    originals = [block.stored.detach().clone() for block in blocks]
    try:
        with plain_arithmetic():
            for block in blocks:
                with writing(block.weight):
                    block.weight.copy_(round_groups(block.weight, bits))
        yield model
    finally:
        with plain_arithmetic():
            for block, values in zip(blocks, originals, strict=True):
                with writing(block.stored):
                    block.stored.copy_(values)


def round_groups(weight: Tensor, bits: int) -> Tensor:
    """Round a weight (d_out, d_in) to 2^bits - 1 levels in each group of 64 numbers along a row."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % ROUNDING_GROUP)).view(rows, -1, ROUNDING_GROUP)
    levels = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / levels
    rounded_weight: Tensor = ((padded / scale).round() * scale).view(rows, -1)[:, :columns].to(weight.dtype)
    return rounded_weight


@plain_arithmetic()
def relearning_curve(
    model: nn.Module,
    tokenizer: Any,
    taught: Sequence[Probe],
    asked: Sequence[Probe],
    training: Training,
    epochs: Sequence[int] = (1, 3, 10),
    forms: Sequence[str] = ORT_FORMS,
    progress: ProgressCallback = silent,
    options: EvaluateOptions | None = None,
) -> dict[int, Evaluation]:
    """Train on some facts of a target, and ask about other facts: those that come back were hidden, not removed.

    Args:
        model: The edited model; it is unchanged after the call.
        tokenizer: Its tokenizer.
        taught: Facts that an adapter is trained on, as questions and answers.
        asked: Other facts, which are evaluated.
        training: Training of the adapter; its `epochs` is not used.
        epochs: Numbers of epochs to try, each with a new adapter.
        forms: Forms in which `asked` is evaluated.
        progress: Function that is called after every step of training and every item.
        options: Settings of the evaluation; its style is also that of the taught questions.

    Returns:
        The evaluation for each number of epochs; 0 is the model without training.

    Raises:
        InputError: If a fact is both taught and asked, or as `trained`.
    """
    both = {(p.subject, p.query) for p in taught} & {(p.subject, p.query) for p in asked}
    if both:
        raise InputError(
            f"{len(both)} questions are both taught and asked, such as {min(both)[1]!r}; leave them out of one list."
        )
    options = options or EvaluateOptions()
    curve = {0: evaluate(model, tokenizer, asked, forms, options=options, progress=progress)}
    examples = question_examples(tokenizer, taught, style=options.style or PromptStyle.of(model), chat=options.chat)
    for count in epochs:
        with trained(model, examples, replace(training, epochs=count), progress) as adapted:
            curve[count] = evaluate(adapted, tokenizer, asked, forms, options=options, progress=progress)
    return curve


def split_taught(probes: Sequence[Probe], count: int) -> tuple[list[Probe], list[Probe]]:
    """Split probes into those to teach (at most `count` questions of each subject, never all) and those to ask.

    Only probes of the form "qa" are taught.

    Raises:
        InputError: If no subject has two probes of the form "qa".
    """
    questions: dict[str, list[Probe]] = {}
    for probe in probes:
        if probe.form == "qa":
            questions.setdefault(folded(probe.subject), []).append(probe)
    taught = [probe for facts in questions.values() for probe in facts[: min(count, len(facts) - 1)]]
    if not taught:
        raise InputError(
            "Relearning needs two plain questions (probes of the form qa) about a target: one to teach and one to ask."
        )
    shown = {id(probe) for probe in taught}
    return taught, [probe for probe in probes if id(probe) not in shown]
