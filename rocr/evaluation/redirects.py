"""Choose redirects by asking the unedited model the questions about a subject with the names of candidates instead.

An edited model reads the redirect in place of the subject. The share of its right answers is therefore close to the
share that the unedited model gives about the redirect: what the question reveals, and what subject and redirect have
in common. benches/search_defaults.py measures this ("about NAME, no edit").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rocr.argument_checks import NAMES, check_kind, check_list, check_reader
from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import Concept, check_concepts, folded, holds_name, with_name
from rocr.errors import InputError
from rocr.evaluation.evaluate import FORM_NAMES, PROBES, EvaluateOptions, evaluate
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scores import Evaluation
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import ProgressCallback, silent

FORMS = ("qa", "fb", "mcp")
LEAST_KNOWN = 0.05
"""Minimum of the score above chance that shares are relative to, because shares of a smaller score are unreliable."""


@dataclass(frozen=True)
class RedirectChoice:
    """The redirect chosen for one subject.

    Attributes:
        concept: The subject and the candidate with the lowest value in `left`.
        left: For each candidate, the predicted share of the model's knowledge about the subject that an edit leaves:
            the score of the subject's answers when asked about the candidate, divided by their score when asked about
            the subject. Both are scores above chance, averaged over questions; the share is averaged over forms.
        questions: Number of questions that contain the subject's name and were asked.
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
    """Choose for each subject the candidate about which its questions get the fewest right answers.

    All forms have the same weight: their scores count relative to the score of the subject in the same form.

    Args:
        model: Causal language model of transformers, not edited.
        tokenizer: Its tokenizer.
        probes: Questions about the subjects; those that do not contain the subject's name are left out.
        candidates: Two or more possible redirects.
        forms: Forms in which the questions are asked, from `rocr.evaluation.FORMS`.
        progress: Function that is called after every item.
        chat: Settings of the chat template.

    Returns:
        One choice for each subject, in the order of the probes.

    Raises:
        InputError: If no question contains the name of a subject, a candidate is also a subject, or two candidates are
            the same.
        RocrError: If a score is not a finite number.
    """
    check_reader(model, tokenizer, progress)
    check_list("probes", probes, Probe, PROBES, advice="Read a file of probes with rocr.load_probes(path).")
    check_list("candidates", candidates, str, NAMES)
    check_list("forms", forms, str, FORM_NAMES)
    check_kind("chat", chat, ChatSettings, "a rocr.ChatSettings")
    check_candidates(probes, candidates)
    named = [probe for probe in probes if holds_name(probe.query, probe.subject)]
    options = EvaluateOptions(chat=chat)
    subjects = list(dict.fromkeys(probe.subject for probe in named))

    def scores_of(asked: Sequence[Probe]) -> dict[str, dict[str, float]]:
        return _scores(asked, evaluate(model, tokenizer, asked, forms, options=options, progress=progress))

    known = scores_of(named)
    scores = {candidate: scores_of([replace_subject(probe, candidate) for probe in named]) for candidate in candidates}
    found = []
    for subject in subjects:
        left = {candidate: _share(scores[candidate][subject], known[subject]) for candidate in candidates}
        best = min(candidates, key=left.__getitem__)
        kind = next(probe.kind for probe in named if probe.subject == subject)
        count = sum(probe.subject == subject for probe in named)
        found.append(RedirectChoice(Concept(subject, best, kind=kind), left, count))
    return found


def check_candidates(probes: Sequence[Probe], candidates: Sequence[str]) -> None:
    """Raise InputError unless probes and candidates are valid for `choose_redirects`."""
    if len({folded(candidate) for candidate in candidates}) < max(2, len(candidates)):
        raise InputError(
            f"A choice needs two or more different redirects, not {', '.join(map(repr, candidates)) or 'none'}."
        )
    subjects = dict.fromkeys(probe.subject for probe in probes)
    without = subjects.keys() - {probe.subject for probe in probes if holds_name(probe.query, probe.subject)}
    if without or not subjects:
        named = ", ".join(map(repr, sorted(without)[:5])) or "any subject"
        raise InputError(
            f"No question contains the name of {named}; leave the subject out (--targets) or add such a question."
        )
    for candidate in candidates:
        check_concepts([Concept(subject, candidate) for subject in subjects])


def replace_subject(probe: Probe, name: str) -> Probe:
    """Return a probe whose question has another name in place of its subject's."""
    cloze = None if probe.cloze is None else with_name(probe.cloze, probe.subject, name)
    query = with_name(probe.query, probe.subject, name)
    return replace(probe, query=query, cloze=cloze, wordings={}, split="forget")


def _scores(probes: Sequence[Probe], evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return the mean score above chance over the questions of each subject and form."""
    above: dict[str, dict[str, list[float]]] = {}
    for item in evaluation.items:
        by_form = above.setdefault(probes[item.probe].subject, {})
        by_form.setdefault(item.form, []).append(item.score - (item.chance or 0.0))
    return {
        subject: {form: sum(scores) / len(scores) for form, scores in by_form.items()}
        for subject, by_form in above.items()
    }


def _share(left: Mapping[str, float], known: Mapping[str, float]) -> float:
    """Return the mean over forms of `left` relative to `known`, both scores above chance."""
    shares = [max(left[form], 0.0) / max(known[form], LEAST_KNOWN) for form in known]
    return sum(shares) / len(shares)
