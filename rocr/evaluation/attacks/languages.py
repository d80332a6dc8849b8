"""Ask the same question in other wordings and languages, as far as the probes have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, scores_of
from rocr.evaluation.forms import EXTRA_FORMS
from rocr.evaluation.probes.probe import Probe


def worded(probes: Sequence[Probe], form: str) -> list[Probe]:
    """Return the probes that have a wording of a form, or are probes of this form."""
    return [probe for probe in probes if form in probe.wordings or probe.form == form]


def languages(target: Target) -> Iterator[Outcome]:
    """Ask in each wording that the probes have.

    "After" is what would be left if the wording lost the same share as the plain question: what is above comes back.

    Raises:
        InputError: The probes have no other wordings.
    """
    forms = {form: worded(target.forget, form) for form in EXTRA_FORMS}
    if not any(forms.values()):
        raise InputError("The probes have no other wordings, such as translations; give probes that have them.")
    for form, probes in forms.items():
        if not probes:
            continue
        found = target.ask(probes, forms=[form])
        plain = [probe for probe in probes if probe.form == "qa"]
        with target.without_edit():
            before = scores_of(target.ask(probes, forms=[form]))
            known = scores_of(target.ask(plain, forms=["qa"]))["qa"] if plain else 0.0
        left = scores_of(target.ask(plain, forms=["qa"]))["qa"] / known if known > 0 else 0.0
        expected = {form: before[form] * min(1.0, left)}
        yield Outcome(
            "languages", form, before, expected, scores_of(found), before, questions=len(probes), evaluation=found
        )


LANGUAGES = Attack(
    "asks in other languages and wordings",
    "one prompt for each wording of a question that the probes have",
    "the unedited model in the same wording; the share that the plain question keeps is expected to stay",
    languages,
)
