"""The attacks of `rocr eval`: which ones run, and what they find."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rocr.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocr.cli.console import Console
    from rocr.cli.parsing import Arguments
    from rocr.edit.edit import Edit
    from rocr.evaluation import Evaluation, Probe
    from rocr.model.load import LoadedModel


@dataclass
class FoundByAttacks:
    """What attacks found.

    Attributes:
        evaluations: Evaluations under attack by name, of the attacks that ask in the ordinary forms.
        study: For each attack of an edit file its cost, controls and outcomes, as JSON values.
    """

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    study: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plotted(self) -> dict[str, Evaluation]:
        """The evaluations that a plot has room for: those of the attacks that need no edit file."""
        from rocr.evaluation.attacks.suite import ATTACKS

        return {name: found for name, found in self.evaluations.items() if name.split(" ")[0] in ATTACKS}


def attack_names(names: Sequence[str], has_edit: bool) -> tuple[str, ...]:
    """Return the attacks to run, with "all" expanded.

    Raises:
        InputError: An attack is unknown, or needs an edit file.
    """
    from rocr.evaluation.attacks.study import STUDY
    from rocr.evaluation.attacks.suite import ATTACKS

    unknown = [name for name in names if name not in (*STUDY, "all")]
    if unknown:
        raise InputError(f"Unknown attacks: {', '.join(unknown)}; they are all, {', '.join(STUDY)}.")
    if "all" in names:
        return tuple(STUDY) if has_edit else ATTACKS
    comparing = [name for name in names if name not in ATTACKS]
    if comparing and not has_edit:
        raise InputError(
            f"The attacks {', '.join(comparing)} compare the edited model with the unedited one: give the edit file "
            "with --edit."
        )
    return tuple(names)


def run_attacks(
    arguments: Arguments,
    loaded: LoadedModel,
    probes: list[Probe],
    after: Evaluation,
    edit: Edit | None,
    names: tuple[str, ...],
    console: Console,
) -> FoundByAttacks:
    """Attack the model with the probes that count; without an edit file, all layers are rounded."""
    if not names:
        return FoundByAttacks()
    from rocr.evaluation import EvaluateOptions
    from rocr.evaluation.attacks.attack import AttackLimits
    from rocr.evaluation.attacks.study import study
    from rocr.evaluation.attacks.suite import AttackOptions, attack

    asked = [probes[i] for i in sorted({item.probe for item in after.items})]
    settings = EvaluateOptions(seed=arguments.seed, orders=arguments.orders, chat=arguments.chat)
    with console.stage("attacks") as progress:
        given = (loaded.model, loaded.tokenizer, asked)
        if edit is None:
            options = AttackOptions(evaluate=settings)
            return FoundByAttacks(attack(*given, names, after.forms, options=options, progress=progress))
        limits = AttackLimits(seed=arguments.seed, evaluate=settings)
        found = study(*given, edit, names, after.forms, limits=limits, progress=progress)
    evaluations = {o.name: o.evaluation for each in found for o in each.outcomes if o.evaluation is not None}
    return FoundByAttacks(evaluations, [each.to_json() for each in found])


def show_attacks(found: FoundByAttacks, after: Evaluation, before: Evaluation | None, console: Console) -> None:
    """Print what attacks found."""
    from rocr.evaluation.report import STUDY_COLUMNS, attack_columns, attack_rows, study_rows

    if found.study:
        console.table("Attacks", STUDY_COLUMNS, study_rows(found.study))
        for attack in found.study:
            if attack["refused"]:
                console.say(f"The attack {attack['name']} was not made: {attack['refused']}")
    elif found.evaluations:
        console.table("Forget set under attack", attack_columns(after), attack_rows(after, before, found.evaluations))
