"""`rocr eval`: measure what a model answers in each form of a question, before and after an edit."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.arguments import chat_of, claim_output, files_read, load_language_model, source_of
from rocr.cli.conditions import Condition, check_conditions
from rocr.cli.console import Console
from rocr.cli.interruption import Interrupted
from rocr.cli.parsing import Arguments, command, flag, option
from rocr.cli.values import COUNT, DIR, FILE
from rocr.concepts import check_names
from rocr.errors import InputError
from rocr.io.output import check_output
from rocr.statistics.corpus import check_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from rocr.cli.attacks import FoundByAttacks
    from rocr.edit.edit import Edit
    from rocr.evaluation import EvaluateOptions, Evaluation, Probe
    from rocr.evaluation.report import About
    from rocr.model.load import LoadedModel, ModelSource

PERPLEXITY_TOKENS = 8192


@command("eval")
@options.model
@options.out("Report to write, JSON")
@option("--html", "Write the report as one HTML page with plots too.", type=FILE)
@option("--edit", "An edit file: evaluate the model without and with it.", type=FILE)
@option("--targets", "Subjects to forget (default: the concepts of --edit).", several=True, metavar="NAME")
@options.scoring
@option("--orders", "Orders of multiple-choice options.", type=COUNT, default=1)
@options.seed
@flag("--generate", "Let the model answer in free text too.")
@option("--text", "Ordinary text: measure perplexity, and with --edit divergence.", type=FILE, several=True)
@option("--utility", "Multiple-choice questions on any subject, .jsonl.", type=FILE, several=True)
@option("--suites", "Tasks of lm-evaluation-harness, such as mmlu.", several=True, metavar="NAME")
@option("--suite-folder", "Folder with further tasks, as YAML files of the harness.", type=DIR)
@option("--suite-limit", "Ask the first N questions of each task.", type=COUNT)
@option("--attacks", "Attacks, such as bottom-rank, relearn or 4-bit, or all.", several=True, metavar="NAME")
@option(
    "--fail-if",
    "Exit with code 4 if a condition holds, such as forget.fb.gone<0.8 or retain.mcp.lost>0.05: a set, a form, one of "
    "before, after, gone, lost (shares above chance), and a number. May be repeated.",
    multiple=True,
    metavar="CONDITION",
)
@options.chat
def evaluate(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Ask questions in several forms, before and after an edit.

    An interrupted run continues if it is started again with the same arguments.
    """
    from rocr.cli.attacks import attack_names, run_attacks
    from rocr.evaluation.page import write_html
    from rocr.evaluation.probes.load import load_probes
    from rocr.evaluation.probes.probe import split_by_subject
    from rocr.evaluation.report import report_json, write_json

    attacks = attack_names(arguments.attacks, arguments.edit is not None)
    arguments.chat = chat_of(arguments)
    check_names("--targets", arguments.targets)
    forms = form_names(arguments.forms)
    conditions = [Condition.parse(text, forms, arguments.edit is not None) for text in arguments.fail_if]
    _check_packages(arguments, attacks)
    if arguments.text:
        check_texts(arguments.text)
    source = source_of(arguments)
    if arguments.html:
        check_output(arguments.html, inputs=(*source.inputs, *files_read(arguments)), overwrite=arguments.overwrite)
    claim_output(arguments, source.inputs)
    probes = load_probes(arguments.probes, arguments.download)
    edit = _load_edit(arguments.edit)
    targets = arguments.targets or ([concept.name for concept in edit.concepts] if edit is not None else None)
    if targets:
        probes = split_by_subject(probes, targets)
    _check_journal(arguments, source, probes, forms)
    with console.stage("load"):
        loaded = load_language_model(arguments, source)
    probes = _nearest(arguments, loaded, probes)
    try:
        before, after = _evaluate(arguments, loaded, probes, forms, edit, console)
    except Interrupted:
        for journal in filter(Path.exists, _journals(arguments)):
            console.warn(f"The scores so far are in {journal}: the same command continues from there.")
        raise
    found = run_attacks(arguments, loaded, probes, after, edit, attacks, console)
    about = _about(arguments, edit)
    document = report_json(after, before, found.evaluations, found.study, about)
    write_json(document, arguments.out, arguments.overwrite)
    if arguments.html:
        title = f"Evaluation of {about.model}"
        write_html(title, after, arguments.html, before, arguments.overwrite, found.plotted, found.study, about)
    for journal in _journals(arguments):
        journal.unlink(missing_ok=True)
    _show(after, before, found, console)
    console.say(f"The report is in {arguments.out}" + (f" and {arguments.html}." if arguments.html else "."))
    check_conditions(conditions, after, before, console.warn)
    return document


def _evaluate(
    arguments: Arguments,
    loaded: LoadedModel,
    probes: list[Probe],
    forms: list[str],
    edit: Edit | None,
    console: Console,
) -> tuple[Evaluation | None, Evaluation]:
    """Scores before the edit, or None without an edit file, and scores of the model with it."""
    from rocr.evaluation import evaluate
    from rocr.evaluation.measures import divergence

    settings = _evaluate_options(arguments, loaded)

    def ask(stage: str, probes: list[Probe], journal: Path, known: float | None = None) -> Evaluation:
        given = replace(settings, journal=journal)
        with console.stage(stage) as progress:
            return evaluate(
                loaded.model, loaded.tokenizer, probes, forms, known=known, options=given, progress=progress
            )

    first_journal, second_journal = _journals(arguments)
    first = ask("questions", probes, first_journal, arguments.known)
    _add_suites(arguments, loaded, first, console)
    if edit is None:
        return None, first
    kept = sorted({item.probe for item in first.items})
    edit.apply(loaded.model)
    second = ask("questions after the edit", [probes[i] for i in kept], second_journal)
    second = replace(
        second,
        items=[replace(item, probe=kept[item.probe]) for item in second.items],
        answers=[replace(answer, probe=kept[answer.probe]) for answer in second.answers],
        probes=first.probes,
        known=first.known,
        known_threshold=first.known_threshold,
    )
    if settings.text is not None:
        second.measures["KL divergence"] = divergence(
            loaded.model, settings.text, partial(_reverted, edit, loaded.model)
        )
    _add_suites(arguments, loaded, second, console)
    return first, second


@contextmanager
def _reverted(edit: Edit, model: nn.Module) -> Iterator[None]:
    """Revert an applied edit inside the context."""
    edit.revert(model)
    try:
        yield
    finally:
        edit.apply(model)


def _add_suites(arguments: Arguments, loaded: LoadedModel, evaluation: Evaluation, console: Console) -> None:
    from rocr.evaluation.suites import suite_scores

    if arguments.suites:
        with console.stage("suites"):
            scores = suite_scores(
                loaded.model,
                loaded.tokenizer,
                arguments.suites,
                folder=arguments.suite_folder,
                limit=arguments.suite_limit,
                download=arguments.download,
            )
        evaluation.measures.update(scores)


def _nearest(arguments: Arguments, loaded: LoadedModel, probes: list[Probe]) -> list[Probe]:
    """The probes about the targets and, with --neighbours, only their nearest other subjects."""
    from rocr.evaluation.neighbours import keep_nearest

    if not arguments.neighbours:
        return probes
    targets = list(dict.fromkeys(probe.subject for probe in probes if probe.split == "forget"))
    return keep_nearest(loaded.model, loaded.tokenizer, probes, targets, arguments.neighbours, arguments.chat)


def form_names(text: str) -> list[str]:
    """Forms such as "qa,mcp".

    Raises:
        InputError: a form is unknown.
    """
    from rocr.evaluation.forms import check_forms

    forms = [form.strip() for form in text.split(",")]
    check_forms(forms)
    return forms


def check_package(module: str, extra: str, what: str) -> None:
    """Check that an optional package is installed.

    Args:
        module: name of the package's module.
        extra: rocr's extra that installs it.
        what: what needs it, as a message calls it.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs the package {module}: pip install 'rocr[{extra}]'.")


def _check_packages(arguments: Arguments, attacks: Sequence[str]) -> None:
    if arguments.suites:
        check_package("lm_eval", "harness", "--suites")
    if "relearn" in attacks:
        check_package("peft", "lora", "The attack relearn")


def _evaluate_options(arguments: Arguments, loaded: LoadedModel) -> EvaluateOptions:
    from rocr.evaluation import EvaluateOptions
    from rocr.evaluation.measures import TextSample, load_choice_questions
    from rocr.statistics.corpus import read_texts

    text = None
    if arguments.text:
        text = TextSample.take(read_texts(arguments.text), loaded.tokenizer, PERPLEXITY_TOKENS)
    return EvaluateOptions(
        seed=arguments.seed,
        orders=arguments.orders,
        generate=arguments.generate,
        text=text,
        chat=arguments.chat,
        utility=[question for path in arguments.utility for question in load_choice_questions(path)],
    )


def _load_edit(path: str | None) -> Edit | None:
    from rocr.edit.edit import Edit

    return Edit.load(path) if path is not None else None


def _about(arguments: Arguments, edit: Edit | None) -> About:
    """What the report says about the run; files by their names, without the folders of this machine."""
    from rocr.evaluation.report import About
    from rocr.io.versions import versions

    chosen: dict[str, Any] = {
        "probes": Path(arguments.probes).name,
        "known": arguments.known,
        "neighbours": arguments.neighbours,
        "generate": arguments.generate,
        "text": [Path(path).name for path in arguments.text],
        "utility": [Path(path).name for path in arguments.utility],
        "suites": list(arguments.suites),
        "attacks": list(arguments.attacks),
    }
    return About(
        model=Path(arguments.model).name or Path(arguments.model).resolve().name,
        edit=Path(arguments.edit).name if arguments.edit else "",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        versions=versions(),
        options={name: value for name, value in chosen.items() if value},
        redirects={concept.name: concept.redirect for concept in edit.concepts} if edit is not None else {},
    )


def _journals(arguments: Arguments) -> tuple[Path, Path]:
    return Path(f"{arguments.out}.journal-before"), Path(f"{arguments.out}.journal-after")


def _check_journal(arguments: Arguments, source: ModelSource, probes: list[Probe], forms: list[str]) -> None:
    """Check, before the model is loaded, the journal of a run that was interrupted.

    Raises:
        InputError: it is of other questions.
    """
    from rocr.evaluation.evaluate import check_journal
    from rocr.evaluation.forms import PromptStyle, build_items

    if arguments.neighbours:
        return  # which questions are asked is known when the model is loaded
    style = PromptStyle.of_name(source.place)
    check_journal(_journals(arguments)[0], build_items(probes, forms, style, arguments.seed, arguments.orders))


def _show(after: Evaluation, before: Evaluation | None, attacks: FoundByAttacks, console: Console) -> None:
    from rocr.cli.attacks import show_attacks
    from rocr.evaluation.glossary import FORM_TEXTS
    from rocr.evaluation.report import measure_table, score_notes, score_table
    from rocr.evaluation.verdict import judge

    console.table("Scores", *score_table(after, before))
    console.say("\n".join(f"{form}: {FORM_TEXTS[form].asks}" for form in after.forms))
    if after.measures:
        console.table("Measures", *measure_table(after, before))
    show_attacks(attacks, after, before, console)
    if after.known is not None:
        console.say(f"{after.known} of {after.probes} probes are known to the model; only these count.")
    verdict = judge(after, before)
    for note in score_notes(after, verdict, before):
        console.say(note)
    for alarm in verdict.alarms:
        console.warn(f"Large loss: {alarm.sentence}")
    console.say(f"{verdict.sentence}\n{verdict.next_step}")
