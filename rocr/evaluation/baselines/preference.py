"""The trained methods of Table I of arXiv 2506.07795: gradient ascent, negative preference, rejection, preference.

Each trains a LoRA adapter on the questions about the target with the settings of ORT's authors for Llama-3; see
`rocr.evaluation.lora_training`. With an answer y to a question x, π the trained and π₀ the unedited model:

- gradient ascent (Jang et al., arXiv 2210.01504): mean log π(y|x) over the tokens of y; rate 2e-5, batch 16.
- negative preference (Zhang et al., arXiv 2404.05868, eq. 3): −(2/β) log sigmoid(−β log(π(y|x)/π₀(y|x))); β 0.0275,
  rate 5e-5, batch 16.
- rejection tuning: −mean log π(r|x) over the tokens of a refusal r; rate 5e-5, batch 8.
- direct preference (Rafailov et al., arXiv 2305.18290, eq. 7):
  −log sigmoid(β log(π(r|x)/π₀(r|x)) − β log(π(y|x)/π₀(y|x))); β 0.1, rate 1e-4, batch 8.

The authors train on generated texts about a target and draw from a list of refusals. Here the questions themselves are
trained on, and there is one refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.lora_training import (
    DIRECT_PREFERENCE,
    GRADIENT_ASCENT,
    NEGATIVE_PREFERENCE,
    REJECTION,
    Example,
    Training,
    trained,
)
from rocr.evaluation.probes.probe import Probe

REFUSAL = "I don't know."


@contextmanager
def _trained(case: Case, training: Training, refuses: bool) -> Iterator[Unlearned]:
    """Train an adapter; leaving the context removes it."""
    comparison = case.comparison
    seed = (training.seed + case.seed) % 2**63
    training = replace(training, least_steps=comparison.least_steps, steps=comparison.steps, seed=seed)
    examples = case.forget(_refuse if refuses else None)
    if training.loss == "learn":
        examples = [Example(example.prompt, example.preferred) for example in examples]
    with trained(case.model, examples, training, case.progress) as model:
        yield Unlearned(model)


def _refuse(_probe: Probe) -> str:
    return REFUSAL


def _method(name: str, training: Training, refuses: bool = False) -> Method:
    unlearned = partial(_trained, training=training, refuses=refuses)
    return Method(name, unlearned, packages=(("peft", "lora"),))


PREFERENCE_METHODS = (
    _method("gradient ascent", GRADIENT_ASCENT),
    _method("negative preference", NEGATIVE_PREFERENCE),
    _method("rejection tuning", REJECTION, refuses=True),
    _method("direct preference", DIRECT_PREFERENCE, refuses=True),
)
