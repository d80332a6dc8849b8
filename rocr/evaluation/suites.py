"""Run standard benchmarks with lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from rocr.errors import InputError, RocrError
from rocr.io.boundary import calling
from rocr.model.hub import offline


def suite_scores(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch: int = 8,
    download: bool = False,
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded model on tasks of lm-evaluation-harness.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        names: Tasks and groups of tasks of the harness, such as "mmlu" or "truthfulqa_mc1".
        folder: Folder with definitions of further tasks, as YAML files of the harness.
        limit: Number of questions of each task, taken from its start; None asks all.
        batch: Questions that run together.
        download: Allow network access; without it, only downloaded questions are used.

    Returns:
        The value of each metric of each task and group, without standard errors.

    Raises:
        InputError: If the harness is not installed, does not know a task, or cannot get the questions of a task.
        RocrError: If a score is not a finite number.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"Suites need lm-evaluation-harness ({error}): pip install 'rocr[harness]'.") from None
    with calling("Listing the tasks of lm-evaluation-harness"), offline(unless=download):
        manager = TaskManager(include_path=str(folder) if folder is not None else None)
        unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise InputError(
            f"lm-evaluation-harness has no task {', '.join(unknown) or 'without a name'}; `lm-eval ls tasks` lists its "
            "tasks."
        )
    advice = "" if download else "Without --download only downloaded questions are used."
    training = model.training
    model.eval()
    try:
        with calling(f"Running the suites {', '.join(names)}", advice), offline(unless=download):
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            found = simple_evaluate(harness, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    finally:
        model.train(training)
    return {task: _numbers(task, values) for task, values in {**found["results"], **found.get("groups", {})}.items()}


def _numbers(task: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a task: "acc,none" is named "acc"; a filter other than "none" stays in the name."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or isinstance(value, str):
            continue
        if not math.isfinite(value):
            raise RocrError(f"The score {metric} of {task} is not a finite number: {value}.")
        numbers[metric if name == "none" else f"{metric} ({name})"] = float(value)
    return numbers
