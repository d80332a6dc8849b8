"""Unlearn the rounds of growing_lists.py by MRP and UniErase, each by its own sequential protocol.

A round is one `Case`, as a target of `rocr compare --sequential` is: the questions about its people are to forget, in
the one trained phrasing of each attribute that the form "qa" writes, and those about others are to keep. The contexts
of the rounds before stay entered: MRP keeps their directions, and UniErase its token and their edits.

With the constants for real models, the first round forgets nothing in a model this small. `SETTINGS` has those that
take other values, searched on the first round alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest.mock import patch

from learned_facts import TRAINED, Person
from learned_training import Learned

import rocr
from rocr.evaluation.baselines import mrp, unierase
from rocr.evaluation.baselines.method import Case, Method, MethodComparison
from rocr.evaluation.baselines.training import Schedule
from rocr.evaluation.probes.probe import Probe, Split

METHODS: dict[str, tuple[Method, ModuleType]] = {"MRP": (mrp.MRP, mrp), "UniErase": (unierase.UNIERASE, unierase)}
"""Each method, and the module that has its constants."""
SETTINGS: dict[str, dict[str, Any]] = {
    "MRP": {"SCHEDULE": Schedule(3.0, batch=5, epochs=2, steps=240, optimizer="sgd", clip=1.0)},
    "UniErase": {"RIDGE": 0.1, "THRESHOLD": 0.005, "VALUE_STEPS": 30, "VALUE_RADIUS": 3.0, "VALUE_DECAY": 0.1},
}
"""The constants that differ: of those tried, the ones with the largest share gone less the share that others lose."""


def in_sequence(
    way: str,
    learned: Learned,
    statistics: rocr.Statistics,
    rounds: Sequence[Sequence[Person]],
    others: Sequence[Person],
) -> Iterator[None]:
    """Unlearn each round in the model that the rounds before left. The model is restored at the end.

    Args:
        way: Of `METHODS`.
        learned: The model, which is changed in place.
        statistics: Statistics of the unedited model in the layers that the method edits.
        rounds: The people of each round.
        others: People who are never unlearned, about whom a method may train.
    """
    method, module = METHODS[way]
    retain = probes(others, "retain")
    comparison = MethodComparison(
        learned.model, learned.tokenizer, (), statistics, redirect="", retain=retain, sequential=True
    )
    model, state = learned.model, None
    with patch.multiple(module, **SETTINGS[way]), ExitStack() as stack:
        for people in rounds:
            names = ", ".join(person.name for person in people)
            case = Case(comparison, model, names, probes(people, "forget"), earlier=state)
            unlearned = stack.enter_context(method.unlearned(case))
            model, state = unlearned.model, unlearned.state
            yield


def probes(people: Sequence[Person], split: Split) -> list[Probe]:
    """Return a probe for each person and attribute, in the trained phrasing that is a question."""
    opening, end = "Question: ", " Answer:"
    texts = {name: next(t for t in some if t.startswith(opening)) for name, some in TRAINED.items()}
    return [
        Probe(
            person.name,
            text.format(person.name).removeprefix(opening).removesuffix(end),
            person.facts[attribute],
            split=split,
        )
        for person in people
        for attribute, text in texts.items()
    ]
