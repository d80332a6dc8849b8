"""Attacks by a text before a question, and by the first tokens of the answer.

The texts are of the three kinds of arXiv 2505.12636: text about the subject, repetition, and other questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rocr.concepts import folded
from rocr.errors import InputError
from rocr.evaluation.attacks.attack import (
    Attack,
    Outcome,
    Scores,
    Target,
    grouped,
    invented,
    mean_by_subject,
    scores_of,
)
from rocr.evaluation.probes.probe import BLANK, Probe
from rocr.evaluation.scoring import AnswerScore, Question, score_answers

Prefix = Callable[[Probe], str]


def context_prefixes(
    probes: Sequence[Probe], others: Sequence[Probe], shown: int, repetitions: int
) -> dict[str, Prefix]:
    """Return the three kinds of text before a question; none of them holds the answer of the question.

    Args:
        probes: The questions.
        others: Questions about other subjects, for the kind "other questions".
        shown: Number of sentences or solved questions.
        repetitions: How often the name is repeated.
    """
    own = grouped(probes)

    def about(probe: Probe) -> str:
        facts = _without_answer(own[folded(probe.subject)], probe)[:shown]
        return "".join(f"{_sentence(fact)}\n" for fact in facts)

    def repetition(probe: Probe) -> str:
        return ", ".join([probe.subject] * repetitions) + ".\n"

    def questions(probe: Probe) -> str:
        strangers = [other for other in others if folded(other.subject) != folded(probe.subject) and other.form == "qa"]
        solved = _without_answer(strangers, probe)[:shown]
        return "".join(f"Question: {other.query}\nAnswer: {other.answer}\n\n" for other in solved)

    return {"text about the subject": about, "repetition": repetition, "other questions": questions}


def _without_answer(facts: Sequence[Probe], probe: Probe) -> list[Probe]:
    """Return the facts that do not hold the answer to a question, neither in their answer nor in their wording."""
    answer = folded(probe.answer)
    return [fact for fact in facts if answer not in folded(f"{fact.query} {fact.cloze or ''} {fact.answer}")]


def _sentence(fact: Probe) -> str:
    """Return a fact as a sentence, or as a question with its answer if it has no sentence with a blank."""
    text = fact.query if fact.form == "fb" else fact.cloze
    return text.replace(BLANK, fact.answer) if text is not None else f"{fact.query} {fact.answer}."


def context(target: Target) -> Iterator[Outcome]:
    """Ask with each kind of text before the questions; the controls get the same text."""
    probes, limits = target.named, target.limits
    never = invented(probes)
    others = target.retain or target.forget
    before, after = target.plain(probes)
    never_plain = scores_of(target.ask(never))
    own, unknown = (context_prefixes(p, others, limits.shown, limits.repetitions) for p in (probes, never))
    for kind, prefix in own.items():
        found = target.ask(probes, prefix)
        with target.without_edit():
            control = scores_of(target.ask(probes, prefix))
        luck = scores_of(target.ask(never, unknown[kind]))
        count = len(probes)
        yield Outcome(
            *("context", kind, before, after, scores_of(found), control, luck, never_plain),
            questions=count,
            evaluation=found,
        )


def prefill(target: Target) -> Iterator[Outcome]:
    """Give the first tokens of the answer, and score the others.

    Raises:
        InputError: No answer has more tokens than are given.
    """
    forms, probes = target.free_forms(), target.named
    pairs = {form: target.questions(probes, form) for form in forms}
    unknown = {form: target.questions(invented(probes), form) for form in forms}
    for count in target.limits.prefilled:
        kept = {
            form: [i for i, (_, question) in enumerate(asked) if len(question.answers[0]) > count]
            for form, asked in pairs.items()
        }
        if not all(kept.values()):
            raise InputError(f"No answer has more than {count} tokens, so {count} of them cannot be given.")

        def scores(asked: dict[str, list[tuple[Probe, Question]]], given: int, kept: dict[str, list[int]]) -> Scores:
            return {form: _remaining(target, [asked[form][i] for i in kept[form]], given) for form in forms}

        with target.without_edit():
            before, control = scores(pairs, 0, kept), scores(pairs, count, kept)
        luck, never_plain = scores(unknown, count, kept), scores(unknown, 0, kept)
        after, attacked = scores(pairs, 0, kept), scores(pairs, count, kept)
        name = f"{count} token{'s' * (count > 1)} of the answer"
        questions = max(map(len, kept.values()))
        yield Outcome("prefill", name, before, after, attacked, control, luck, never_plain, questions=questions)


def _remaining(target: Target, pairs: Sequence[tuple[Probe, Question]], given: int) -> float:
    """Return the mean score of the tokens of the answers after the first `given` ones."""
    asked = [
        Question((*question.prompt, *question.answers[0][:given]), (question.answers[0][given:],))
        for _, question in pairs
    ]
    found: dict[int, float] = {}

    def receive(index: int, scores: list[AnswerScore]) -> None:
        found[index] = math.exp(-scores[0].nll)

    score_answers(target.model, asked, receive, target.limits.evaluate.token_budget)
    return mean_by_subject((pairs[i][0], found[i]) for i in range(len(pairs)))


CONTEXT = Attack(
    "puts text about the subject, the repeated name, or other solved questions before each question",
    "three prompts for each question; the attacker knows other facts about the subject",
    "the unedited model, and invented names, with the same text",
    context,
)
PREFILL = Attack(
    "begins the answer with its first tokens, and scores the others",
    "one prompt for each question; the attacker knows the beginning of the answer",
    "the unedited model, and invented names, with the same beginning",
    prefill,
)
