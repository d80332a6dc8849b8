"""Attacks on an edited model: does what was forgotten come back?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rocr.config import DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import ORT_FORMS, PromptStyle, build_items, item_texts
from rocr.evaluation.lora_training import Example, Training, trained
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scores import Evaluation
from rocr.evaluation.scoring import tokenize_questions
from rocr.model.architecture import find_architecture
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.progress import ProgressCallback, silent

ROUNDING_GROUP = 64


@contextmanager
def rounded(model: nn.Module, layers: Sequence[int], bits: int) -> Iterator[nn.Module]:
    """Within the context the edited weights are rounded to `bits` bits: a small edit may be rounded away.

    Symmetric, with one scale for every 64 weights of a row, as in common 4-bit and 8-bit formats.

    Raises:
        InputError: bits is not between 2 and 8.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"bits must be between 2 and 8, not {bits}.")
    architecture = find_architecture(model)
    kept = {layer: architecture.down_projection(layer).parameter.detach().clone() for layer in layers}
    try:
        with plain_arithmetic():
            for layer in layers:
                weight = architecture.down_projection(layer).weight
                with writing(weight):
                    weight.copy_(round_groups(weight, bits))
        yield model
    finally:
        with plain_arithmetic():
            for layer, values in kept.items():
                parameter = architecture.down_projection(layer).parameter.data
                with writing(parameter):
                    parameter.copy_(values)


def round_groups(weight: Tensor, bits: int) -> Tensor:
    """A weight (d_out, d_in) on the grid of its rounding: 2^bits - 1 levels in each group of 64 along a row."""
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
    """Teach some facts of a target again, and ask about others: what comes back was hidden, not gone.

    Args:
        model: the edited model; it is left as it was.
        tokenizer: its tokenizer.
        taught: the facts that an adapter is trained on, as questions and answers.
        asked: other facts, which are evaluated.
        training: how it is trained; its `epochs` is not used.
        epochs: the lengths of training to try, each from the start.
        forms: in which the others are asked.
        progress: told after every step of training, and every question.
        options: how the others are asked; its style is that of what is taught, too.

    Returns:
        For each length of training the evaluation; for 0 that of the model without any.

    Raises:
        InputError: a fact is both taught and asked; or as `trained`.
    """
    both = {(p.subject, p.query) for p in taught} & {(p.subject, p.query) for p in asked}
    if both:
        raise InputError(f"{len(both)} questions are both taught and asked, such as {min(both)[1]!r}.")
    options = options or EvaluateOptions()
    curve = {0: evaluate(model, tokenizer, asked, forms, options=options, progress=progress)}
    examples = question_examples(tokenizer, taught, style=options.style or PromptStyle.of(model), chat=options.chat)
    for count in epochs:
        settings = Training(**{**vars(training), "epochs": count})
        with trained(model, examples, settings, progress) as adapted:
            curve[count] = evaluate(adapted, tokenizer, asked, forms, options=options, progress=progress)
    return curve


def question_examples(
    tokenizer: Any,
    probes: Sequence[Probe],
    answer: Callable[[Probe], str] | None = None,
    style: PromptStyle | None = None,
    chat: ChatSettings = DEFAULT,
) -> list[Example]:
    """Probes as examples of the form "qa", with their own answers or with others; the own one is then lowered."""
    probes = [probe for probe in probes if probe.form == "qa"]
    items = build_items(probes, ["qa"], style)
    texts = item_texts(tokenizer, items, chat)
    answers = [(*item.answers, *((f" {answer(probes[item.probe])}",) if answer else ())) for item in items]
    questions = tokenize_questions(tokenizer, texts, answers)
    return [Example(q.prompt, q.answers[0], q.answers[1] if answer else ()) for q in questions]
