"""Standard suites of questions, asked by lm-evaluation-harness and not written again here."""

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
    """The scores of lm-evaluation-harness for a model that is loaded already.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        names: of tasks and groups that the harness knows, such as "mmlu" or "truthfulqa_mc1".
        folder: further tasks, as YAML files of the harness.
        limit: of each task ask the first questions only, so many.
        batch: questions that run together.
        download: allow the network; without it, questions that were downloaded before are used.

    Returns:
        For each task and group its numbers by metric, without their standard errors.

    Raises:
        InputError: the harness is missing, does not know a task, or cannot get the task's questions.
        RocrError: a score is not a number.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"Suites need lm-evaluation-harness ({error}): pip install 'rocr[harness]'.") from None
    with calling("lm-evaluation-harness, looking for its tasks,"), offline(unless=download):
        manager = TaskManager(include_path=str(folder) if folder is not None else None)
        unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise InputError(
            f"lm-evaluation-harness knows no task {', '.join(unknown) or 'without a name'}; "
            "`lm-eval ls tasks` lists those it knows."
        )
    advice = "" if download else "Without --download only questions that were downloaded before are used."
    training = model.training
    model.eval()
    try:
        with calling(f"Asking the suites {', '.join(names)}", advice), offline(unless=download):
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            found = simple_evaluate(harness, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    finally:
        model.train(training)
    return {task: _numbers(task, values) for task, values in {**found["results"], **found.get("groups", {})}.items()}


def _numbers(task: str, values: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task: "acc,none" becomes "acc"; a filter other than "none" stays in the name."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or isinstance(value, str):
            continue
        if not math.isfinite(value):
            raise RocrError(f"The score {metric} of {task} is not a number.")
        numbers[metric if name == "none" else f"{metric} ({name})"] = float(value)
    return numbers
