"""`rocr redirects`: which of some names each concept is best redirected to, as a list for `rocr unlearn`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rocr.cli.arguments import add_chat, add_model, chat_of, claim_output, load, source_of
from rocr.cli.console import Console
from rocr.cli.evaluate import DEFAULT_PROBES
from rocr.concepts import check_names
from rocr.io.output import new_file


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "redirects", parents=[common], help="choose each concept's redirect among some names"
    )
    add_model(parser)
    add_chat(parser)
    parser.add_argument("--probes", default=str(DEFAULT_PROBES), metavar="FILE", help="questions, as for rocr eval")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="subjects of the questions (default: all)")
    parser.add_argument("--among", nargs="+", required=True, metavar="NAME", help="the redirects to choose among")
    parser.add_argument("--out", required=True, metavar="FILE", help="a list of concepts, .jsonl; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Ask the model about each concept and candidate, show what would be left and write the list."""
    from rocr.evaluation.probes.load import load_probes
    from rocr.evaluation.probes.probe import split_by_subject
    from rocr.evaluation.redirects import check_candidates, choose_redirects

    arguments.chat = chat_of(arguments)
    check_names("--targets", arguments.targets or [])
    source = source_of(arguments)
    claim_output(arguments, source.inputs)
    probes = load_probes(arguments.probes, arguments.download)
    if arguments.targets:
        probes = [probe for probe in split_by_subject(probes, arguments.targets) if probe.split == "forget"]
    check_candidates(probes, arguments.among)
    with console.stage("load"):
        loaded = load(arguments, source)
    with console.stage("questions") as progress:
        choices = choose_redirects(
            loaded.model, loaded.tokenizer, probes, arguments.among, progress=progress, chat=arguments.chat
        )
    lines = [json.dumps({"name": c.concept.name, "redirect": c.concept.redirect}, ensure_ascii=False) for c in choices]
    with new_file(arguments.out, overwrite=arguments.overwrite) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        (c.concept.name, c.concept.redirect, str(c.questions), *(f"{c.left[name]:.3f}" for name in arguments.among))
        for c in choices
    ]
    title = "Share of what is known of the concept that is answered right when the redirect is asked about"
    console.table(title, ("concept", "redirect", "questions", *arguments.among), rows)
    console.say(f"{arguments.out} holds {len(choices)} concepts for rocr unlearn.")
    return {
        "out": arguments.out,
        "concepts": [
            {"name": c.concept.name, "redirect": c.concept.redirect, "left": c.left, "questions": c.questions}
            for c in choices
        ],
    }
