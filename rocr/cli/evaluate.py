"""`rocr eval`: does a model forget in every form of a question, and keep the rest?"""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import (
    COUNT,
    SEED,
    add_chat,
    add_model,
    chat_of,
    claim_output,
    files_read,
    load,
    share,
    source_of,
)
from rocr.cli.console import Console
from rocr.concepts import check_names
from rocr.errors import InputError
from rocr.io.output import check_output
from rocr.statistics.corpus import check_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from rocr.edit.edit import Edit
    from rocr.evaluation import EvaluateOptions, Evaluation, Probe
    from rocr.model.load import LoadedModel

DEFAULT_PROBES = Path(__file__).parent.parent / "data" / "probes.jsonl"
PERPLEXITY_TOKENS = 8192
NEIGHBOURS = "keep only the N subjects that the model holds nearest to each target: the hardest retain set"


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("eval", parents=[common], help="ask a model in every form, before and after an edit")
    add_model(parser)
    add_chat(parser)
    parser.add_argument(
        "--probes",
        default=str(DEFAULT_PROBES),
        metavar="FILE",
        help="a .jsonl file, a folder of RWKU or ORT, or hf:OWNER/NAME (default: 300 questions about 50 people)",
    )
    parser.add_argument("--edit", metavar="FILE", help="an edit file: evaluate without and with it")
    parser.add_argument("--forms", default="qa,fb,mcp,subtoken", help="such as qa,mcp (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="subjects to forget (default: those of the edit)")
    parser.add_argument("--neighbours", type=COUNT, metavar="N", help=NEIGHBOURS)
    parser.add_argument("--known", type=share, metavar="P", help="count only probes that the model knows, such as 0.5")
    parser.add_argument("--orders", type=COUNT, default=1, metavar="N", help="orders of multiple-choice options")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the order of options (default: 0)")
    parser.add_argument("--generate", action="store_true", help="let the model answer in free text too")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="ordinary text: perplexity, and divergence by --edit")
    parser.add_argument(
        "--utility", nargs="+", metavar="FILE", help=".jsonl files of multiple-choice questions about anything"
    )
    parser.add_argument("--suites", nargs="+", metavar="NAME", help="tasks of lm-evaluation-harness, such as mmlu")
    parser.add_argument("--suite-folder", metavar="DIR", help="further tasks, as YAML files of the harness")
    parser.add_argument("--suite-limit", type=COUNT, metavar="N", help="ask the first N questions of each task")
    parser.add_argument(
        "--attacks", nargs="+", metavar="NAME", help="of relearn, 4-bit, 8-bit, prefixes, examples; or all"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the report, JSON; it must not exist")
    parser.add_argument("--html", metavar="FILE", help="the report as one page with plots, too")
    parser.add_argument("--overwrite", action="store_true", help="replace reports that exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate, going on where an interrupted run with the same arguments stopped."""
    from rocr.evaluation.probes.load import load_probes
    from rocr.evaluation.probes.probe import split_by_subject
    from rocr.evaluation.report import report_json, write_html, write_json

    attacks = _attack_names(arguments.attacks)
    arguments.chat = chat_of(arguments)
    check_names("--targets", arguments.targets or [])
    forms = form_names(arguments.forms)
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
    with console.stage("load"):
        loaded = load(arguments, source)
    if arguments.neighbours:
        probes = _keep_nearest(arguments, loaded, probes)
    before, after = _evaluate(arguments, loaded, probes, forms, edit, console)
    found = _attack(arguments, loaded, probes, after, edit, attacks, console)
    document = report_json(after, before, found)
    write_json(document, arguments.out, arguments.overwrite)
    if arguments.html:
        title = f"Evaluation of {Path(arguments.model).name}"
        write_html(title, after, arguments.html, before, arguments.overwrite, found)
    for journal in _journals(arguments):
        journal.unlink(missing_ok=True)
    _show(after, before, found, console)
    console.say(f"The report is in {arguments.out}" + (f" and {arguments.html}." if arguments.html else "."))
    return document


def _evaluate(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    probes: list[Probe],
    forms: list[str],
    edit: Edit | None,
    console: Console,
) -> tuple[Evaluation | None, Evaluation]:
    """The scores without the edit, where there is one, and with it."""
    from rocr.evaluation import evaluate
    from rocr.evaluation.measures import divergence

    options = _options(arguments, loaded)
    first_journal, second_journal = _journals(arguments)
    with console.stage("questions") as progress:
        first = evaluate(
            loaded.model,
            loaded.tokenizer,
            probes,
            forms,
            known=arguments.known,
            options=replace(options, journal=first_journal),
            progress=progress,
        )
    _add_suites(arguments, loaded, first, console)
    if edit is None:
        return None, first
    kept = sorted({item.probe for item in first.items})
    edit.apply(loaded.model)
    with console.stage("questions after the edit") as progress:
        second = evaluate(
            loaded.model,
            loaded.tokenizer,
            [probes[i] for i in kept],
            forms,
            options=replace(options, journal=second_journal),
            progress=progress,
        )
    numbered = [replace(item, probe=kept[item.probe]) for item in second.items]
    second = replace(
        second, items=numbered, probes=first.probes, known=first.known, known_threshold=first.known_threshold
    )
    if options.text is not None:
        second.measures["KL divergence"] = divergence(
            loaded.model, options.text, partial(_reverted, edit, loaded.model)
        )
    _add_suites(arguments, loaded, second, console)
    return first, second


@contextmanager
def _reverted(edit: Edit, model: nn.Module) -> Iterator[None]:
    """The model without the edit that is applied to it."""
    edit.revert(model)
    try:
        yield
    finally:
        edit.apply(model)


def _add_suites(arguments: argparse.Namespace, loaded: LoadedModel, evaluation: Evaluation, console: Console) -> None:
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


def _keep_nearest(arguments: argparse.Namespace, loaded: LoadedModel, probes: list[Probe]) -> list[Probe]:
    from rocr.evaluation.neighbours import keep_nearest

    targets = list(dict.fromkeys(probe.subject for probe in probes if probe.split == "forget"))
    return keep_nearest(loaded.model, loaded.tokenizer, probes, targets, arguments.neighbours, arguments.chat)


def form_names(text: str) -> list[str]:
    """The forms such as "qa,mcp"; refused before anything is loaded where there is no such one."""
    from rocr.evaluation.forms import check_forms

    forms = [form.strip() for form in text.split(",")]
    check_forms(forms)
    return forms


def check_package(module: str, extra: str, what: str) -> None:
    """Refuse what needs a package that is not installed, before anything is loaded."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs the package {module}: pip install 'rocr[{extra}]'.")


def _check_packages(arguments: argparse.Namespace, attacks: Sequence[str]) -> None:
    if arguments.html:
        check_package("matplotlib", "report", "--html")
    if arguments.suites:
        check_package("lm_eval", "harness", "--suites")
    if "relearn" in attacks:
        check_package("peft", "lora", "The attack relearn")


def _attack_names(names: list[str] | None) -> tuple[str, ...]:
    """The attacks that are asked for; refused before anything is loaded where there is no such one."""
    from rocr.evaluation.attacks.suite import ATTACKS

    if not names:
        return ()
    unknown = [name for name in names if name not in (*ATTACKS, "all")]
    if unknown:
        raise InputError(f"Unknown attacks: {', '.join(unknown)}; they are all, {', '.join(ATTACKS)}.")
    return ATTACKS if "all" in names else tuple(names)


def _attack(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    probes: list[Probe],
    after: Evaluation,
    edit: Edit | None,
    names: tuple[str, ...],
    console: Console,
) -> dict[str, Evaluation]:
    """Attack the model as it is, by the probes that count; without an edit file all layers are rounded."""
    if not names:
        return {}
    from rocr.evaluation import EvaluateOptions
    from rocr.evaluation.attacks.suite import AttackOptions, attack

    kept = sorted({item.probe for item in after.items})
    options = AttackOptions(evaluate=EvaluateOptions(seed=arguments.seed, orders=arguments.orders, chat=arguments.chat))
    with console.stage("attacks") as progress:
        return attack(
            loaded.model,
            loaded.tokenizer,
            [probes[i] for i in kept],
            names,
            after.forms,
            layers=edit.layers if edit is not None else None,
            options=options,
            progress=progress,
        )


def _options(arguments: argparse.Namespace, loaded: LoadedModel) -> EvaluateOptions:
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
        utility=[question for path in arguments.utility or () for question in load_choice_questions(path)],
    )


def _load_edit(path: str | None) -> Edit | None:
    from rocr.edit.edit import Edit

    return Edit.load(path) if path is not None else None


def _journals(arguments: argparse.Namespace) -> tuple[Path, Path]:
    return Path(f"{arguments.out}.journal-before"), Path(f"{arguments.out}.journal-after")


def _show(after: Evaluation, before: Evaluation | None, attacks: dict[str, Evaluation], console: Console) -> None:
    from rocr.evaluation.report import attack_columns, attack_rows, measure_table, score_table

    console.table("Scores", *score_table(after, before))
    if after.measures:
        console.table("Measures", *measure_table(after, before))
    if attacks:
        console.table("Forget set under attack", attack_columns(after), attack_rows(after, before, attacks))
    if after.known is not None:
        console.say(f"{after.known} of {after.probes} probes are known to the model and count.")
