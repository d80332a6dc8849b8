"""Attack an edit in many ways, each with its cost and its control: what comes back of what was gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rocr.edit.edit import Edit
from rocr.edit.weight import edited_weights
from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, AttackLimits, Outcome, Target
from rocr.evaluation.attacks.components import BOTTOM_RANK
from rocr.evaluation.attacks.depth import DEPTH
from rocr.evaluation.attacks.languages import LANGUAGES
from rocr.evaluation.attacks.linear_probe import LINEAR_PROBE
from rocr.evaluation.attacks.mask import MASK
from rocr.evaluation.attacks.ordinary import ORDINARY
from rocr.evaluation.attacks.prompts import CONTEXT, PREFILL
from rocr.evaluation.attacks.restoring import restored
from rocr.evaluation.attacks.samples import SAMPLES
from rocr.evaluation.attacks.soft_tokens import SOFT_TOKENS
from rocr.evaluation.attacks.suffix import SUFFIX
from rocr.evaluation.attacks.tuning import BENIGN, EDITED_LAYERS, RETRAIN
from rocr.evaluation.evaluate import evaluate
from rocr.evaluation.forms import ORT_FORMS, PromptStyle
from rocr.evaluation.probes.probe import Probe
from rocr.model.architecture import find_architecture
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import ProgressCallback, silent

STUDY: dict[str, Attack] = {
    **ORDINARY,
    "bottom-rank": BOTTOM_RANK,
    "context": CONTEXT,
    "prefill": PREFILL,
    "samples": SAMPLES,
    "languages": LANGUAGES,
    "mask": MASK,
    "retrain": RETRAIN,
    "benign": BENIGN,
    "edited-layers": EDITED_LAYERS,
    "linear-probe": LINEAR_PROBE,
    "depth": DEPTH,
    "soft-tokens": SOFT_TOKENS,
    "suffix": SUFFIX,
}
"""The attacks by name: those of `rocr.evaluation.attacks.suite`, then those without training, then the others."""


@dataclass(frozen=True)
class Studied:
    """The outcomes of one attack.

    Attributes:
        name: The attack.
        outcomes: One for each variant of the attack.
        seconds: Duration of the attack, its controls included.
        refused: Why the attack could not be made; None if it was.
    """

    name: str
    outcomes: list[Outcome]
    seconds: float
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the outcomes with what the attack does, costs and is compared to, as JSON values."""
        attack = STUDY[self.name]
        told = {"name": self.name, "summary": attack.summary, "cost": attack.cost, "control": attack.control}
        outcomes = [outcome.to_json() for outcome in self.outcomes]
        return {**told, "seconds": self.seconds, "refused": self.refused, "outcomes": outcomes}


@plain_arithmetic()
def study(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    edit: Edit,
    names: Sequence[str] = tuple(STUDY),
    forms: Sequence[str] = ORT_FORMS,
    *,
    limits: AttackLimits | None = None,
    progress: ProgressCallback = silent,
    receive: Callable[[Studied], object] = lambda _: None,
) -> list[Studied]:
    """Attack an edited model by name, one attack after the other; each leaves every weight as it was, bit for bit.

    Args:
        model: The model with the edit applied, and no later one.
        tokenizer: Its tokenizer.
        probes: Probes; those of the split "forget" are attacked, the others are what some attacks learn from.
        edit: The edit, with its undo data: the controls ask the unedited model.
        names: Attacks, from STUDY.
        forms: Forms in which the probes are asked.
        limits: The size of each attack; None uses the defaults of `AttackLimits`.
        progress: Called after every item and every step.
        receive: Called with what each attack finds, when it is done.

    Returns:
        What each attack finds. One that these probes or this model do not allow is marked as refused, with the reason.

    Raises:
        InputError: An attack is unknown, there are no probes of the forget set, or the model does not have the edit.
    """
    unknown = [name for name in names if name not in STUDY]
    if unknown or not names:
        raise InputError(f"Unknown attacks: {', '.join(unknown) or 'none given'}; the attacks are {', '.join(STUDY)}.")
    target = _target(model, tokenizer, probes, edit, forms, limits or AttackLimits(), progress)
    found = []
    for name in dict.fromkeys(names):
        start = time.perf_counter()
        outcomes: list[Outcome] = []
        refused = None
        with restored(target.stored):
            try:
                outcomes += STUDY[name].run(target)
            except InputError as error:
                refused = str(error)
        found.append(Studied(name, outcomes, time.perf_counter() - start, refused))
        receive(found[-1])
    return found


def _target(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    edit: Edit,
    forms: Sequence[str],
    limits: AttackLimits,
    progress: ProgressCallback,
) -> Target:
    """Return the target with its evaluations before and after the edit."""
    forget = [probe for probe in probes if probe.split == "forget"]
    if not forget:
        raise InputError('There are no probes to forget: attacks need probes of the split "forget".')
    retain = [probe for probe in probes if probe.split == "retain"]
    style = limits.evaluate.style or PromptStyle.of(model)
    settings = replace(limits.evaluate, generate=False, text=None, utility=(), journal=None, style=style)
    weights = edited_weights(find_architecture(model), edit.updates)
    blocks = tuple(block for weight in weights for block in weight.blocks)
    stored = [block.stored for block in blocks]

    def ask() -> Any:
        return evaluate(model, tokenizer, forget, forms, options=settings, progress=progress)

    after = ask()
    with restored(stored):
        edit.revert(model)
        original = [each.clone() for each in stored]
        before = ask()
    kept = replace(limits, evaluate=settings)
    return Target(model, tokenizer, forget, retain, tuple(forms), blocks, original, before, after, kept, progress)
