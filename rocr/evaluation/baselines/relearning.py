"""How much of what was forgotten stays forgotten when the unlearned model is trained on ordinary questions.

A LoRA adapter is trained for a number of steps, usually 32, on questions about other subjects with their answers:
cross-entropy, AdamW with a rate of 2e-4, one question a step. Facts about the target are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from rocr.evaluation.baselines.layer_outputs import answer_nll
from rocr.evaluation.baselines.low_rank import low_rank_adapter
from rocr.evaluation.baselines.training import Schedule, optimise, trainable
from rocr.evaluation.lora_training import Example
from rocr.evaluation.scores import Evaluation, mean
from rocr.progress import ProgressCallback, silent

STEPS = 32
SCHEDULE = Schedule(2e-4, batch=1, epochs=1, warmup=0)
LEAST_FORGOTTEN = 0.05
"""Share of what was known that must be forgotten: of less, the share that is kept is noise."""


@contextmanager
def tuned(
    model: nn.Module, examples: Sequence[Example], steps: int, seed: int = 0, progress: ProgressCallback = silent
) -> Iterator[None]:
    """Train an adapter on questions with their answers; leaving the context removes it.

    Args:
        model: The unlearned model.
        examples: The questions.
        steps: Number of optimiser steps.
        seed: Seed of the adapter and of the order of questions.
        progress: Called after every step.

    Raises:
        InputError: The model has no query and value projections, or was loaded in inference mode.
        RocrError: A loss is not a finite number.
    """
    schedule = replace(SCHEDULE, seed=seed, steps=steps)
    with low_rank_adapter(model, seed) as parameters:
        with trainable(model):

            def terms(index: int) -> Iterator[Tensor]:
                yield answer_nll(model, examples[index])

            optimise(parameters, len(examples), terms, schedule, progress)
        yield


def knowledge(evaluation: Evaluation) -> float:
    """Return the mean over forms of the score of the forget set above chance, at least 0 in each form."""
    found = []
    for form in evaluation.forms:
        score = evaluation.form_score(form, "forget")
        if score is not None:
            found.append(max(0.0, score.score - (score.chance or 0.0)))
    return mean(found)


def kept_share(before: float, unlearned: float, relearned: float) -> float | None:
    """Return (before − relearned)/(before − unlearned); None if less than 5% of `before` was forgotten.

    Args:
        before: `knowledge` of the unedited model.
        unlearned: That of the unlearned model.
        relearned: That of the unlearned model after training.
    """
    forgotten = before - unlearned
    return (before - relearned) / forgotten if before > 0 and forgotten >= LEAST_FORGOTTEN * before else None
