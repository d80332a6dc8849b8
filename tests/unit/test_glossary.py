"""The table of forms and measures, and the documentation that repeats it."""

from pathlib import Path
from typing import get_args

from rocr.evaluation import FORMS
from rocr.evaluation.glossary import (
    FORM_TEXTS,
    MEASURE_TEXTS,
    SCORE_TEXTS,
    flat_measures,
    form_title,
    measure_text,
)
from rocr.evaluation.probes.load import FIELDS
from rocr.evaluation.probes.probe import Language
from rocr.evaluation.report import COLUMNS, NOT_KNOWN

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_form_is_explained() -> None:
    assert set(FORM_TEXTS) == set(FORMS) and len({text.title for text in FORM_TEXTS.values()}) == len(FORM_TEXTS)
    assert all(form_title(language) == language.title() for language in get_args(Language))


def test_the_columns_and_measures_are_explained() -> None:
    explained = {name for names in SCORE_TEXTS for name in names.split(", ")}
    assert set(COLUMNS) - {"split", "form", "questions", "targets"} <= explained and NOT_KNOWN in explained
    assert measure_text("perplexity").better == "lower" and measure_text("mmlu acc").retained
    assert flat_measures({"utility": {"accuracy": 0.5}, "perplexity": 3.0}) == {
        "utility accuracy": 0.5,
        "perplexity": 3.0,
    }


def test_the_documentation_has_the_same_words() -> None:
    for form, text in FORM_TEXTS.items():
        if form not in get_args(Language):
            assert f"| `{form}` | {text.title} | {text.asks} |" in DOCS, form
    assert f"| {', '.join(f'`{language}`' for language in get_args(Language))} |" in DOCS
    for name, meaning in SCORE_TEXTS.items():
        assert f"| `{name}` | {meaning} |" in DOCS, name
    for name, measure in MEASURE_TEXTS.items():
        assert f"| {name} | {measure.better or ''} | {measure.meaning} |" in DOCS, name


def test_every_field_of_a_probe_is_documented() -> None:
    start = DOCS.index("## The probe format")
    section = DOCS[start : DOCS.index("\n## ", start + 1)]
    for field in set(FIELDS) - set(get_args(Language)):
        assert f"`{field}`" in section, field
