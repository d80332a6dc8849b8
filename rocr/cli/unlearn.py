"""`rocr unlearn`: a model and a list of concepts in, an edited model out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import (
    COUNT,
    add_chat,
    add_model,
    add_partial,
    add_text,
    chat_of,
    check_save,
    check_text,
    claim_output,
    layer_list,
    load,
    loads_partially,
    source_of,
    whole_number,
)
from rocr.cli.console import Console
from rocr.cli.outputs import show_adapter, write_output
from rocr.cli.tables import show_report
from rocr.concepts import (
    MAX_CONCEPTS,
    Concept,
    check_concepts,
    check_length,
    check_names,
    folded,
    load_concepts,
)
from rocr.errors import InputError
from rocr.io.output import check_output
from rocr.statistics.corpus import read_texts, text_digest

if TYPE_CHECKING:
    from rocr.config import EditConfig
    from rocr.edit.edit import Edit
    from rocr.export.report import Answer
    from rocr.model.load import LoadedModel, ModelSource
    from rocr.statistics.statistics import Statistics

SHOWN_CONCEPTS = 10


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("unlearn", parents=[common], help="redirect concepts and save the edited model")
    add_model(parser)
    add_partial(parser)
    parser.add_argument("concepts", metavar="CONCEPTS", nargs="?", help="a .txt, .csv or .jsonl list of concepts")
    parser.add_argument("--concept", action="append", metavar="NAME", help="in place of a list; may be repeated")
    parser.add_argument(
        "--allow-long-list", action="store_true", help=f"allow more than {MAX_CONCEPTS:,} concepts: see --dry-run first"
    )
    parser.add_argument("--redirect", metavar="NAME", help="what concepts without a redirect of their own become")
    parser.add_argument("--out", metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument(
        "--save",
        default="model,edit",
        metavar="PARTS",
        help="of model, lora, edit, originals: the first bytes, for `rocr revert` (default: model,edit)",
    )
    parser.add_argument(
        "--lora-rank", type=COUNT, metavar="N", help="cut the adapter to this rank, such as vLLM's limit of 16"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    settings = parser.add_argument_group("settings")
    settings.add_argument("--layers", type=layer_list, help="such as 4,5,6 (default: chosen from the depth)")
    settings.add_argument("--method", choices=("whitened", "projected"))
    settings.add_argument("--official", action="store_true", help="the authors' settings, as a baseline")
    for name in ("ridge", "gamma", "threshold", "strength", "held-weight"):
        settings.add_argument(f"--{name}", type=float, metavar="X")
    settings.add_argument("--key-tokens", choices=("last", "all"))
    settings.add_argument("--keys-per-concept", choices=("mean", "all"))
    settings.add_argument("--reach", choices=("gradual", "whole"))
    settings.add_argument("--force", action="store_true", help="go on past the limits of an edit; it is recorded")
    settings.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="a context in which names are read, with {} once: a user's message, or with --no-chat a text as the model "
        "reads it; may be repeated, in place of the default contexts",
    )
    add_chat(parser)
    statistics = parser.add_argument_group("statistics of ordinary text")
    statistics.add_argument("--statistics", metavar="FILE", help="made by `rocr stats`")
    add_text(statistics)
    shown = parser.add_argument_group("answers before and after")
    shown.add_argument("--ask", default="Who is {}?", metavar="QUESTION", help='(default: "Who is {}?")')
    shown.add_argument(
        "--control",
        nargs="+",
        default=[],
        metavar="NAME",
        help="ask about these too, and measure what the edit does to them: they should not change",
    )
    shown.add_argument("--answer-tokens", type=whole_number(1, 65_536), default=32, metavar="N")
    shown.add_argument("--no-answers", action="store_true", help="ask nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check everything that can be checked, then load, edit, save and report."""
    arguments.chat = chat_of(arguments)
    concepts = _concepts(arguments)
    check_length(len(concepts), _most(arguments, concepts))
    save = check_save(arguments.save)
    source = source_of(arguments)
    _check_output(arguments, source)
    _check_parts(arguments, source, save)
    check_text(arguments)

    from rocr.model.generate import fill_question

    check_names("--control", arguments.control)
    questions = [] if arguments.no_answers else fill_question(arguments.ask, _asked(arguments, concepts))
    config = _config(arguments)
    statistics = _load_statistics(arguments)
    last_layer = _last_layer(arguments, source, config, statistics)
    if last_layer is not None and questions:
        console.warn("Only the beginning of the model is loaded, so nothing is asked before and after.")
        questions = []
    if arguments.dry_run:
        from rocr.cli.plan import show_plan

        with console.stage("dry run"):
            return show_plan(arguments, concepts, source, config, save, len(questions), last_layer, console)
    with console.stage("load"):
        loaded = load(arguments, source, last_layer)
    config = _with_layers(config, loaded)
    if "model" in save:
        from rocr.export.folder import check_output_possible

        check_output_possible(loaded, config.layers or (), Path(arguments.out))
    before = _ask(loaded, questions, arguments, console, "answers before")
    if statistics is None:
        statistics = _collect(loaded, config, arguments, console)
    edit = _edit(loaded, concepts, statistics, config, arguments, console)
    after = _ask(loaded, questions, arguments, console, "answers after")
    answers = _answers(arguments, concepts, questions, before, after)
    report = write_output(arguments, loaded, edit, save, console, answers)
    show_report(report, console, arguments.out)
    show_adapter(report, console)
    return report


def _concepts(arguments: argparse.Namespace) -> list[Concept]:
    if (arguments.concepts is None) == (not arguments.concept):
        raise InputError("Give a list of concepts, or --concept NAME, one of the two.")
    if arguments.concepts is not None:
        return load_concepts(arguments.concepts, default_redirect=arguments.redirect)
    if not arguments.redirect:
        raise InputError("--concept needs --redirect NAME: what the concept is turned into.")
    concepts = [Concept(name, arguments.redirect) for name in arguments.concept]
    check_concepts(concepts)
    return concepts


def _most(arguments: argparse.Namespace, concepts: list[Concept]) -> int:
    """How many concepts are allowed."""
    return max(MAX_CONCEPTS, len(concepts)) if arguments.allow_long_list else MAX_CONCEPTS


def _check_output(arguments: argparse.Namespace, source: ModelSource) -> None:
    if arguments.out is None:
        if not arguments.dry_run:
            raise InputError("--out DIR is needed: where the edited model goes.")
        return
    if arguments.dry_run:
        check_output(arguments.out, inputs=source.inputs, overwrite=arguments.overwrite)
    else:
        claim_output(arguments, source.inputs)


def _check_parts(arguments: argparse.Namespace, source: ModelSource, save: tuple[str, ...]) -> None:
    if arguments.lora_rank and "lora" not in save:
        raise InputError("--lora-rank is of the adapter, which --save does not name: add lora to it.")
    if "model" in save:
        from rocr.export.copying import check_carried

        check_carried(source)
    if "originals" in save:
        from rocr.export.originals import original_files

        original_files(source)


def _asked(arguments: argparse.Namespace, concepts: list[Concept]) -> list[str]:
    controls: list[str] = arguments.control
    return [concept.name for concept in concepts[:SHOWN_CONCEPTS]] + controls


def _config(arguments: argparse.Namespace) -> EditConfig:
    import dataclasses

    from rocr.config import EditConfig, Template

    numbers = ("ridge", "gamma", "threshold", "strength", "held_weight", "seed")
    names = (*numbers, "layers", "method", "key_tokens", "keys_per_concept", "reach")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.template:
        given["templates"] = tuple(Template(text, chat=True) for text in arguments.template)
    config = EditConfig.official() if arguments.official else EditConfig()
    return dataclasses.replace(config, chat=arguments.chat, **given)


def _load_statistics(arguments: argparse.Namespace) -> Statistics | None:
    if arguments.statistics is None:
        return None
    from rocr.statistics.statistics import Statistics

    return Statistics.load(arguments.statistics)


def _last_layer(
    arguments: argparse.Namespace, source: ModelSource, config: EditConfig, statistics: Statistics | None
) -> int | None:
    """The last layer to load; None: the whole model."""
    if not loads_partially(arguments, source):
        return None
    if statistics is None and not arguments.text:
        raise InputError(
            "Only the beginning of the model is loaded, so it cannot write ordinary text itself: give --text or "
            "--statistics, or load the --whole model."
        )
    from rocr.model.architecture import find_architecture
    from rocr.model.layers import chosen_layers
    from rocr.model.load_partial import empty_model

    layers = chosen_layers(config, find_architecture(empty_model(source, arguments.trust_remote_code)))
    last = max(layers) if statistics is None else max(*layers, statistics.fingerprint.layer)
    return last if loads_partially(arguments, source, last) else None


def _with_layers(config: EditConfig, loaded: LoadedModel) -> EditConfig:
    from rocr.model.layers import resolve_layers

    return resolve_layers(config, loaded.architecture)


def _collect(loaded: LoadedModel, config: EditConfig, arguments: argparse.Namespace, console: Console) -> Statistics:
    from rocr.statistics.collect import CollectOptions, collect_statistics

    texts = list(arguments.text or ())
    options = CollectOptions(
        tokens=arguments.tokens,
        seed=arguments.seed,
        text_sha256=text_digest(texts) if texts else None,
        text_bytes=sum(Path(text).stat().st_size for text in texts) or None,
        chat=config.chat,
    )
    with console.stage("statistics") as progress:
        return collect_statistics(
            loaded.model, loaded.tokenizer, read_texts(texts) if texts else None, config.layers, options, progress
        )


def _edit(
    loaded: LoadedModel,
    concepts: list[Concept],
    statistics: Statistics,
    config: EditConfig,
    arguments: argparse.Namespace,
    console: Console,
) -> Edit:
    from rocr.edit.guards import Guards
    from rocr.unlearn import unlearn

    guards = Guards(force=arguments.force, concepts=_most(arguments, concepts))
    neighbours = _neighbours(arguments, concepts)
    with console.stage("edit") as progress:
        edit = unlearn(
            loaded.model, loaded.tokenizer, concepts, statistics, config, progress, guards, neighbours=neighbours
        )
    for sentence in edit.report.limits_passed:
        console.warn(f"Forced: {sentence}")
    return edit


def _neighbours(arguments: argparse.Namespace, concepts: list[Concept]) -> list[str] | None:
    """The names to keep that were given; one on the list may be asked about, but is not kept."""
    listed = {folded(name) for concept in concepts for name in concept.names}
    return [name for name in arguments.control if folded(name) not in listed] or None


def _ask(
    loaded: LoadedModel, questions: list[str], arguments: argparse.Namespace, console: Console, stage: str
) -> list[str]:
    from rocr.model.generate import ask

    if not questions:
        return []
    with console.stage(stage):
        return ask(loaded.model, loaded.tokenizer, questions, arguments.answer_tokens, arguments.chat)


def _answers(
    arguments: argparse.Namespace, concepts: list[Concept], questions: list[str], before: list[str], after: list[str]
) -> list[Answer]:
    from rocr.export.report import Answer

    listed = {folded(name) for concept in concepts for name in concept.names}
    names = _asked(arguments, concepts) if questions else []
    return [
        Answer(n, folded(n) in listed, q, b, a)
        for n, q, b, a in zip(names, questions, before, after, strict=bool(questions))
    ]
