"""The attacks of `rocr.evaluation.attacks.suite`, with the unedited model under the same attack as their control."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from rocr.evaluation.attacks.attack import Attack, Outcome, Target, scores_of
from rocr.evaluation.attacks.suite import AttackOptions, attack
from rocr.evaluation.scores import Evaluation


def _ordinary(name: str, target: Target) -> Iterator[Outcome]:
    """Make an attack on the edited and on the unedited model."""
    layers = sorted({block.layer for block in target.blocks})

    def make() -> dict[str, Evaluation]:
        return attack(
            *(target.model, target.tokenizer, target.forget, [name], target.forms),
            layers=layers,
            options=AttackOptions(evaluate=target.limits.evaluate),
            progress=target.progress,
        )

    found = make()
    with target.without_edit():
        control = make()
    before, after = target.before, target.after
    if name == "relearn":  # asks fewer questions, since some are taught
        before, after = control["relearn 0 epochs"], found["relearn 0 epochs"]
    for variant, evaluation in found.items():
        yield Outcome(
            *(variant, "", scores_of(before), scores_of(after), scores_of(evaluation), scores_of(control[variant])),
            questions=len({item.probe for item in evaluation.items}),
            evaluation=evaluation,
        )


_COSTS = {
    "relearn": (
        "trains a LoRA adapter on some facts of each concept, and asks about the others",
        "training of an adapter; questions and answers about the same concepts",
    ),
    "4-bit": ("rounds the edited weights to 4 bits", "one pass over the edited weights"),
    "8-bit": ("rounds the edited weights to 8 bits", "one pass over the edited weights"),
    "prefixes": ("puts instructions before each question, and takes the best", "some prompts for each question"),
    "examples": (
        "puts solved questions about the same concept before each question",
        "one prompt for each question; the attacker knows other facts about the subject",
    ),
}
ORDINARY = {
    name: Attack(summary, cost, "the same on the unedited model", partial(_ordinary, name))
    for name, (summary, cost) in _COSTS.items()
}
