"""`rocr compare`: the methods side by side, on the same targets and questions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import (
    COUNT,
    add_chat,
    add_model,
    add_text,
    chat_of,
    check_text,
    claim_output,
    load,
    share,
    source_of,
)
from rocr.cli.console import Console
from rocr.cli.evaluate import DEFAULT_PROBES, NEIGHBOURS, check_package, form_names
from rocr.concepts import Concept, check_concepts, check_names, folded
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.evaluation import Probe
    from rocr.model.load import LoadedModel
    from rocr.statistics.statistics import Statistics


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("compare", parents=[common], help="rocr beside the methods it is compared to")
    add_model(parser)
    add_text(parser)
    add_chat(parser)
    parser.add_argument("--probes", default=str(DEFAULT_PROBES), metavar="FILE", help="as for rocr eval")
    parser.add_argument("--targets", nargs="+", required=True, metavar="NAME", help="subjects to forget, one at a time")
    parser.add_argument("--redirect", required=True, metavar="NAME", help="what rocr redirects the targets to")
    parser.add_argument("--statistics", metavar="FILE", help="key statistics (default: collected now)")
    parser.add_argument("--methods", metavar="LIST", help="names, separated by commas (default: all)")
    parser.add_argument("--forms", default="qa,fb,mcp,subtoken", help="such as qa,mcp (default: %(default)s)")
    parser.add_argument("--known", type=share, metavar="P", help="count only probes that the model knows, such as 0.5")
    parser.add_argument("--neighbours", type=COUNT, metavar="N", help=NEIGHBOURS)
    parser.add_argument(
        "--steps", type=COUNT, default=0, metavar="N", help="train for N steps at least (default: 5 epochs)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the results, JSON; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compare and show one table."""
    from rocr.config import EditConfig
    from rocr.evaluation.baselines.methods import (
        METHODS,
        TRAININGS,
        MethodComparison,
        compare_methods,
        forget_table,
        results_json,
        retain_table,
    )
    from rocr.evaluation.neighbours import keep_nearest
    from rocr.evaluation.probes.load import load_probes
    from rocr.evaluation.probes.probe import split_by_subject
    from rocr.evaluation.report import write_json

    arguments.chat = chat_of(arguments)
    check_names("--targets", arguments.targets)
    check_names("--redirect", [arguments.redirect])
    source = source_of(arguments)
    claim_output(arguments, source.inputs)
    methods = [name.strip() for name in arguments.methods.split(",")] if arguments.methods else list(METHODS)
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"Unknown methods: {', '.join(unknown)}; they are {', '.join(METHODS)}.")
    if set(methods) & TRAININGS.keys():
        check_package("peft", "lora", "A method that trains")
    forms = form_names(arguments.forms)
    for target in arguments.targets:
        check_concepts([Concept(target, arguments.redirect)])
    check_text(arguments)
    probes = split_by_subject(load_probes(arguments.probes, arguments.download), arguments.targets)
    with console.stage("load"):
        loaded = load(arguments, source)
    if arguments.neighbours:
        probes = keep_nearest(
            loaded.model, loaded.tokenizer, probes, arguments.targets, arguments.neighbours, arguments.chat
        )
    statistics = _statistics(arguments, loaded, console)
    probes = _known(arguments, loaded, probes, forms, console)
    _check_targets(arguments.targets, probes)
    comparison = MethodComparison(
        loaded.model,
        loaded.tokenizer,
        probes,
        statistics,
        arguments.redirect,
        config=EditConfig(chat=arguments.chat),
        forms=forms,
        least_steps=arguments.steps,
        seed=arguments.seed,
    )
    results = []
    with console.stage("methods") as progress:
        for result in compare_methods(comparison, arguments.targets, methods, progress):
            results.append(result)
            console.warn(f"{result.method}: {result.target} in {result.seconds:.1f} s")
    document = {
        "format": "rocr comparison 1",
        "known": arguments.known,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "results": results_json(results),
    }
    write_json(document, arguments.out, arguments.overwrite)
    console.table("Forget set: mean scores over targets", *forget_table(results, forms))
    console.table("Retain set: mean scores over targets", *retain_table(results, forms))
    console.say(f"The results are in {arguments.out}.")
    return document


def _check_targets(targets: Sequence[str], probes: Sequence[Probe]) -> None:
    """Before anything is trained: a target without a question could not be scored."""
    asked = {folded(probe.subject) for probe in probes}
    silent = [target for target in targets if folded(target) not in asked]
    if silent:
        raise InputError(
            f"No probe that counts is about {', '.join(map(repr, silent))}: lower --known, or leave them out."
        )


def _statistics(arguments: argparse.Namespace, loaded: LoadedModel, console: Console) -> Statistics:
    from rocr.evaluation.baselines.methods import layers_to_edit
    from rocr.statistics.collect import CollectOptions, collect_statistics
    from rocr.statistics.corpus import read_texts
    from rocr.statistics.statistics import Statistics

    if arguments.statistics:
        return Statistics.load(arguments.statistics)
    options = CollectOptions(tokens=arguments.tokens, seed=arguments.seed, chat=arguments.chat)
    texts = read_texts(arguments.text) if arguments.text else None
    with console.stage("statistics") as progress:
        return collect_statistics(
            loaded.model, loaded.tokenizer, texts, layers_to_edit(loaded.model), options, progress
        )


def _known(
    arguments: argparse.Namespace, loaded: LoadedModel, probes: list[Probe], forms: list[str], console: Console
) -> list[Probe]:
    from rocr.evaluation import EvaluateOptions, evaluate

    if arguments.known is None:
        return probes
    with console.stage("what the model knows") as progress:
        base = evaluate(
            loaded.model,
            loaded.tokenizer,
            probes,
            forms,
            targets=arguments.targets,
            known=arguments.known,
            options=EvaluateOptions(seed=arguments.seed, chat=arguments.chat),
            progress=progress,
        )
    kept = {item.probe for item in base.items}
    console.say(f"{base.known} of {base.probes} probes are known to the model and count.")
    return [probe for i, probe in enumerate(probes) if i in kept]
