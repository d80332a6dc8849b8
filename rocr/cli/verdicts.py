"""Words for the numbers of a report: how near each concept comes to its redirect, and what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from rocr.cli.outputs import EDIT_FILE

STRONG, PARTIAL, WEAK = "strong", "partial", "weak"
STRONG_TO, PARTIAL_TO = 0.5, 0.75
"""Largest distances left, as shares of those before the edit, of a strong and of a partial redirection."""
SHOWN_NAMES = 5


def verdict(distance: float | None) -> str:
    """A word for the distance that is left to a redirect, as a share of that before the edit; empty if unknown."""
    if distance is None:
        return ""
    return STRONG if distance <= STRONG_TO else PARTIAL if distance <= PARTIAL_TO else WEAK


def weak_sentences(concepts: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], ridge: float) -> list[str]:
    """What to try for concepts that are far from their redirects, or about which every answer is as before.

    Args:
        concepts: The concepts of a report.
        answers: Its answers.
        ridge: The ridge of the edit.
    """
    weak = [f"{c['name']} ({100 * c['distance']:.0f}% left)" for c in concepts if verdict(c["distance"]) == WEAK]
    own: dict[str, list[bool]] = {}
    for answer in answers:
        if answer["on_list"]:
            own.setdefault(answer["name"], []).append(answer["before"] == answer["after"])
    same = [name for name, are_same in own.items() if all(are_same)]
    sentences = []
    if weak:
        sentences.append(
            f"Weak: {listed(weak)}. Try a smaller --ridge ({ridge / 10:g}), more --layers, or another redirect "
            "(--redirect auto)."
        )
    if same:
        sentences.append(f"Answered word for word as before: {listed(same)}. Try another redirect (--redirect auto).")
    return sentences


def next_step(report: dict[str, Any], out: str) -> str:
    """The command that measures what an edit forgets, and the one that checks its folder `out`."""
    check = f"rocr verify {shlex.quote(out)}"
    if EDIT_FILE not in report["files"] or "drift" in report:  # text encoders, which have a drift, answer no questions
        return f"Next: {check} checks the folder."
    edit = shlex.quote(f"{out.rstrip('/')}/{EDIT_FILE}")
    return (
        f"Next: rocr eval {shlex.quote(report['model'])} --edit {edit} --out evaluation.json measures what is "
        f"forgotten and what else is lost (--probes FILE with questions of your own); {check} checks the folder."
    )


def path_note(model: str) -> str | None:
    """A sentence for a model that is given by an absolute path, which an output repeats; None for other names."""
    if not os.path.isabs(model):
        return None
    return (
        "The output holds the model's path on this machine: to publish it, give the model by a relative path or its id "
        "on a hub."
    )


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first names of a list for a sentence, and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return separator.join(names[:SHOWN_NAMES]) + more
