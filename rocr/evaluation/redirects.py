"""Choose redirects by asking the model, before any edit, a subject's questions about each candidate.

An edit lets a model read the redirect in a subject's place. What it still answers right then is nearly what the model
as it is answers about the redirect: what the question gives away, and what subject and redirect share
(benches/search_defaults.py, "about NAME, no edit").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rocr.concepts import Concept, check_concepts, folded, holds_name, with_name
from rocr.config import DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scores import Evaluation
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import ProgressCallback, silent

FORMS = ("qa", "fb", "mcp")
LEAST_KNOWN = 0.05
"""Score above chance below which a form says little about what a model knows: shares are of this at least."""


@dataclass(frozen=True)
class RedirectChoice:
    """The redirect of one subject.

    Attributes:
        concept: the subject and what it is best redirected to.
        left: for each candidate, what would be left of what the model knows of the subject: the score of the subject's
            answers when the candidate is asked about, over their score when the subject is, both above chance and
            means over its questions, then the mean over forms.
        questions: how many name the subject and were asked.
    """

    concept: Concept
    left: dict[str, float]
    questions: int


@plain_arithmetic()
def choose_redirects(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    candidates: Sequence[str],
    forms: Sequence[str] = FORMS,
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
) -> list[RedirectChoice]:
    """Give each subject of the probes the candidate about which its questions are answered right the least.

    Every form counts alike, whatever the size of its scores: as a share of what the model knows of the subject there.

    Args:
        model: a causal language model of transformers, not edited.
        tokenizer: its tokenizer.
        probes: questions about the subjects; those that do not hold the subject's name say nothing and are left out.
        candidates: names that a subject may be redirected to, two or more.
        forms: in which the questions are asked.
        progress: told after every question.
        chat: what chat templates are given.

    Raises:
        InputError: a subject has no question with its name, or a candidate is a subject or stands there twice.
        RocrError: a score is not a number.
    """
    check_candidates(probes, candidates)
    named = [probe for probe in probes if holds_name(probe.query, probe.subject)]
    options = EvaluateOptions(chat=chat)
    subjects = list(dict.fromkeys(probe.subject for probe in named))

    def scores_of(asked: Sequence[Probe]) -> dict[str, dict[str, float]]:
        return _scores(asked, evaluate(model, tokenizer, asked, forms, options=options, progress=progress))

    known = scores_of(named)
    scores = {candidate: scores_of([about(probe, candidate) for probe in named]) for candidate in candidates}
    found = []
    for subject in subjects:
        left = {candidate: _share(scores[candidate][subject], known[subject]) for candidate in candidates}
        best = min(candidates, key=left.__getitem__)
        found.append(RedirectChoice(Concept(subject, best), left, sum(p.subject == subject for p in named)))
    return found


def check_candidates(probes: Sequence[Probe], candidates: Sequence[str]) -> None:
    """What `choose_redirects` asks of its probes and candidates, before a model is there.

    Raises:
        InputError: as there.
    """
    if len({folded(candidate) for candidate in candidates}) < max(2, len(candidates)):
        raise InputError(f"A choice needs two different redirects or more, not {', '.join(map(repr, candidates))}.")
    subjects = dict.fromkeys(probe.subject for probe in probes)
    without = subjects.keys() - {probe.subject for probe in probes if holds_name(probe.query, probe.subject)}
    if without or not subjects:
        named = ", ".join(map(repr, sorted(without)[:5])) or "any subject"
        raise InputError(f"No question holds the name of {named}: leave them out (--targets), or write one.")
    for candidate in candidates:
        check_concepts([Concept(subject, candidate) for subject in subjects])


def about(probe: Probe, name: str) -> Probe:
    """A probe's question with another name in the place of its subject's."""
    cloze = None if probe.cloze is None else with_name(probe.cloze, probe.subject, name)
    query = with_name(probe.query, probe.subject, name)
    return replace(probe, query=query, cloze=cloze, wordings={}, split="forget")


def _scores(probes: Sequence[Probe], evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """For each subject and form the mean over questions of what its answers score above chance."""
    above: dict[str, dict[str, list[float]]] = {}
    for item in evaluation.items:
        by_form = above.setdefault(probes[item.probe].subject, {})
        by_form.setdefault(item.form, []).append(item.score - (item.chance or 0.0))
    return {
        subject: {form: sum(scores) / len(scores) for form, scores in by_form.items()}
        for subject, by_form in above.items()
    }


def _share(left: Mapping[str, float], known: Mapping[str, float]) -> float:
    """Mean over forms of what is left above chance, as a share of what was known there."""
    shares = [max(left[form], 0.0) / max(known[form], LEAST_KNOWN) for form in known]
    return sum(shares) / len(shares)
