"""What each form of a question asks and what each measure means: the one table that commands, reports and docs use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rocr.evaluation.probes.probe import Language


@dataclass(frozen=True)
class FormText:
    """What a form is.

    Attributes:
        title: Its name in words, which fits after "in".
        asks: What is asked, and how the answer is scored where that differs.
    """

    title: str
    asks: str


@dataclass(frozen=True)
class MeasureText:
    """What a measure is.

    Attributes:
        meaning: One sentence.
        better: Which values are good: "higher", "lower", or "same" as before the edit; None if no value is better.
        retained: Whether a change for the worse is a cost of an edit.
    """

    meaning: str
    better: Literal["higher", "lower", "same"] | None = None
    retained: bool = False


FORM_TEXTS: Mapping[str, FormText] = {
    "qa": FormText("QA", "a plain question, to be answered in a few words"),
    "fb": FormText("fill in the blank", "a sentence with a blank in place of the answer"),
    "mcp": FormText(
        "multiple choice",
        "the question with up to four options; the letter of the right one is scored",
    ),
    "subtoken": FormText("characters", "the question, to be answered character by character, each on a new line"),
    "adversarial": FormText("adversarial wordings", "wordings that attack the edit, from probe files that have them"),
    "misspelt": FormText("misspelt names", "the question with two letters of the name swapped"),
    "abbreviated": FormText("abbreviated names", "the question with the first name as an initial"),
    "lower": FormText("lower case", "the question with the name in lower case"),
    "surname": FormText("surnames", "the question with the last word of a person's name alone"),
    "described": FormText("descriptions", "the question with a description in place of the name"),
    "translated": FormText(
        "another language",
        "the question in any other language: a wording of that name, or else the first of the languages below",
    ),
    **{
        language: FormText(language.title(), f"the question in {language.title()}, with the answer in it")
        for language in get_args(Language)
    },
    "reverse": FormText("reverse questions", "a question whose answer is the name"),
    "reverse-fb": FormText("reverse blanks", "a sentence with a blank in place of the name"),
    "reverse-mcp": FormText("reverse multiple choice", "a question whose answer is the name, among other names"),
}
"""Every form of `rocr.evaluation.FORMS`, in its order but for the languages, which follow "translated"."""

MEASURE_TEXTS: Mapping[str, MeasureText] = {
    "contained forget": MeasureText(
        "Share of the free answers about the forget set that contain the right one.", "lower"
    ),
    "contained retain": MeasureText(
        "Share of the free answers about the retain set that contain the right one.", "higher", retained=True
    ),
    "n-gram entropy": MeasureText(
        "How varied the words of the free answers are, in bits; an answer that repeats itself has a low one.",
        "higher",
        retained=True,
    ),
    "perplexity": MeasureText(
        "Exponential of the mean negative log-likelihood of a token of ordinary text.", "lower", retained=True
    ),
    "KL divergence": MeasureText(
        "How far the predictions on ordinary text are from those before the edit, in nats per token.", "lower"
    ),
    "utility accuracy": MeasureText(
        "Share of the multiple-choice questions on any subject that are answered right.", "higher", retained=True
    ),
    "utility chance": MeasureText("What a uniform guess would reach in these questions."),
    "utility questions": MeasureText("The number of these questions."),
}
"""Every measure beside the scores, by the name that tables show; others are scores of suites."""

SUITE_TEXT = MeasureText("Score of a task of lm-evaluation-harness.", "higher", retained=True)

SCORE_TEXTS: Mapping[str, str] = {
    "score": "exp(-mean negative log-likelihood) of the right answer's tokens, from 0 to 1; with options, that of the "
    "right letter. Mean over the questions of a subject, then over subjects.",
    "before, after": "The score without and with the edit.",
    "gone": "Share of the score above chance that the edit takes away: (before - after) / (before - chance). About the "
    "retain set it is what is lost.",
    "95%": "Bootstrap interval of `gone`, or of the score where there is no edit: subjects are drawn again with "
    "replacement, not questions. With few subjects it is rough, with one there is none.",
    "chance": "Score of a uniform guess among the options; forms without options have none.",
    "not known": "Before the edit the score was less than 5% of the way from chance to 1, or its interval reaches down "
    "to chance: the model did not know the answers in this form, so that it says nothing about forgetting.",
    "worst form of each target": "For each subject the form with the highest score; multiple choice is left out.",
    "accuracy": "Share of the right answer's tokens with the highest logit, each after the true ones before it.",
    "extraction": "Extraction strength (Carlini et al., arXiv 2012.07805): 1 - k/T for an answer of T tokens, of which "
    "the first k must be given before greedy decoding writes the rest.",
    "choice": "Probability of the right option relative to all options.",
    "worst_case": "What is left of each fact in the form that reveals most of it, above chance.",
}
"""The columns of tables and the fields of reports."""


def form_title(form: str) -> str:
    """Return a form's name in words."""
    return FORM_TEXTS[form].title if form in FORM_TEXTS else form


def measure_text(name: str) -> MeasureText:
    """Return what a measure is, by its name in `flat_measures`."""
    return MEASURE_TEXTS.get(name, SUITE_TEXT)


def flat_measures(measures: Mapping[str, Any]) -> dict[str, float]:
    """Return measures with those of nested ones named "outer inner"."""
    flat: dict[str, float] = {}
    for name, value in measures.items():
        if isinstance(value, dict):
            flat.update({f"{name} {inner}": number for inner, number in value.items()})
        else:
            flat[name] = value
    return flat
