"""`rocr eval`: does a model forget in every form of a question, and keep the rest?"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import add_model, claim_output, load, positive, source_of
from rocr.cli.console import Console
from rocr.output import check_output

if TYPE_CHECKING:
    from rocr.edit import Edit
    from rocr.evaluation import EvaluateOptions, Evaluation, Probe
    from rocr.models import LoadedModel

DEFAULT_PROBES = Path(__file__).parent.parent / "data" / "probes.jsonl"
PERPLEXITY_TOKENS = 8192


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("eval", parents=[common], help="ask a model in every form, before and after an edit")
    add_model(parser)
    parser.add_argument(
        "--probes",
        default=str(DEFAULT_PROBES),
        metavar="FILE",
        help="a .jsonl file, or a folder of RWKU or ORT (default: six questions about each of 50 well-known people)",
    )
    parser.add_argument("--edit", metavar="FILE", help="an edit file: evaluate without and with it")
    parser.add_argument("--forms", default="qa,fb,mcp,subtoken", help="such as qa,mcp (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="subjects to forget (default: those of the edit)")
    parser.add_argument("--known", type=float, metavar="P", help="count only probes that the model knows, such as 0.5")
    parser.add_argument("--orders", type=positive, default=1, metavar="N", help="orders of multiple-choice options")
    parser.add_argument("--seed", type=int, default=0, help="of the order of options (default: 0)")
    parser.add_argument("--generate", action="store_true", help="let the model answer in free text too")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="ordinary text, for the perplexity")
    parser.add_argument("--utility", metavar="FILE", help="a .jsonl file of multiple-choice questions about anything")
    parser.add_argument("--out", required=True, metavar="FILE", help="the report, JSON; it must not exist")
    parser.add_argument("--html", metavar="FILE", help="the report as one page with plots, too")
    parser.add_argument("--overwrite", action="store_true", help="replace reports that exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate, going on where an interrupted run with the same arguments stopped."""
    from rocr.evaluation.probes import load_probes, split_by_subject
    from rocr.evaluation.report import report_json, write_html, write_json

    inputs = [arguments.probes, *(arguments.text or ()), *filter(None, (arguments.edit, arguments.utility))]
    for path in filter(None, (arguments.out, arguments.html)):
        check_output(path, inputs=inputs, overwrite=arguments.overwrite)
    source = source_of(arguments)
    claim_output(arguments, inputs)
    probes = load_probes(arguments.probes)
    edit = _load_edit(arguments.edit)
    targets = arguments.targets or ([concept.name for concept in edit.concepts] if edit is not None else None)
    if targets:
        probes = split_by_subject(probes, targets)
    with console.stage("load"):
        loaded = load(arguments, source)
    before, after = _evaluate(arguments, loaded, probes, edit, console)
    document = report_json(after, before)
    write_json(document, arguments.out, arguments.overwrite)
    if arguments.html:
        write_html(f"Evaluation of {arguments.model}", after, arguments.html, before, arguments.overwrite)
    for journal in _journals(arguments):
        journal.unlink(missing_ok=True)
    _show(after, before, console)
    console.say(f"The report is in {arguments.out}" + (f" and {arguments.html}." if arguments.html else "."))
    return document


def _evaluate(
    arguments: argparse.Namespace, loaded: LoadedModel, probes: list[Probe], edit: Edit | None, console: Console
) -> tuple[Evaluation | None, Evaluation]:
    """The scores without the edit, where there is one, and with it."""
    from rocr.evaluation import evaluate

    forms = [form.strip() for form in arguments.forms.split(",")]
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
    return first, second


def _options(arguments: argparse.Namespace, loaded: LoadedModel) -> EvaluateOptions:
    from rocr.evaluation import EvaluateOptions
    from rocr.evaluation.text_measures import TextSample
    from rocr.evaluation.utility import load_choice_questions
    from rocr.texts import read_texts

    text = None
    if arguments.text:
        text = TextSample.take(read_texts(arguments.text), loaded.tokenizer, PERPLEXITY_TOKENS)
    return EvaluateOptions(
        seed=arguments.seed,
        orders=arguments.orders,
        generate=arguments.generate,
        text=text,
        utility=load_choice_questions(arguments.utility) if arguments.utility else (),
    )


def _load_edit(path: str | None) -> Edit | None:
    from rocr.edit import Edit

    return Edit.load(path) if path is not None else None


def _journals(arguments: argparse.Namespace) -> tuple[Path, Path]:
    return Path(f"{arguments.out}.journal-before"), Path(f"{arguments.out}.journal-after")


def _show(after: Evaluation, before: Evaluation | None, console: Console) -> None:
    from rocr.evaluation.report import COLUMNS, measure_rows, table_rows

    console.table("Scores", COLUMNS, table_rows(after, before))
    if after.measures:
        console.table("Measures", ("measure", "before", "after"), measure_rows(after, before))
    if after.known is not None:
        console.say(f"{after.known} of {after.probes} probes are known to the model and count.")
