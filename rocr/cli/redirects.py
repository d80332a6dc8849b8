"""`rocr redirects`: choose the best redirect of each concept among some names, as a list for `rocr unlearn`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.arguments import chat_of, claim_output, load_language_model, source_of
from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, command, option
from rocr.cli.tables import number_of_concepts
from rocr.cli.verdicts import listed
from rocr.concepts import check_names
from rocr.io.output import new_file

if TYPE_CHECKING:
    from rocr.evaluation.redirects import RedirectChoice


NEAR = 0.05
"""Difference between two shares up to which the choice between them is a near tie: few questions decide it."""
MUCH = 0.5


@command("redirects")
@options.model
@option("--among", "Redirects to choose from.", several=True, required=True, metavar="NAME")
@options.out("List of concepts to write, .jsonl")
@options.probes
@option("--targets", "Subjects of the questions (default: all).", several=True, metavar="NAME")
@options.chat
def redirects(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Choose the redirect of each concept among some names.

    The questions about a concept are asked about each candidate; the candidate with the fewest right answers is
    chosen.
    """
    from rocr.evaluation.probes.load import load_probes
    from rocr.evaluation.probes.probe import split_by_subject
    from rocr.evaluation.redirects import check_candidates, choose_redirects

    arguments.chat = chat_of(arguments)
    check_names("--targets", arguments.targets)
    source = source_of(arguments)
    claim_output(arguments, source.inputs)
    probes = load_probes(arguments.probes, arguments.download)
    if arguments.targets:
        probes = [probe for probe in split_by_subject(probes, arguments.targets) if probe.split == "forget"]
    check_candidates(probes, arguments.among)
    with console.stage("load"):
        loaded = load_language_model(arguments, source)
    with console.stage("questions") as progress:
        choices = choose_redirects(
            loaded.model, loaded.tokenizer, probes, arguments.among, progress=progress, chat=arguments.chat
        )
    concepts = [{name: value for name, value in c.concept.to_json().items() if value} for c in choices]
    lines = [json.dumps(concept, ensure_ascii=False) for concept in concepts]
    with new_file(arguments.out, overwrite=arguments.overwrite) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        (c.concept.name, c.concept.redirect, str(c.questions), *(f"{c.left[name]:.3f}" for name in arguments.among))
        for c in choices
    ]
    title = "Share of right answers about the concept that remains if the questions name the redirect"
    console.table(title, ("concept", "redirect", "questions", *arguments.among), rows)
    for sentence in near_ties(choices):
        console.warn(sentence)
    console.say(f"{arguments.out} holds {number_of_concepts(choices)} for rocr unlearn.")
    return {
        "out": arguments.out,
        "concepts": [
            {**concept, "left": c.left, "questions": c.questions} for concept, c in zip(concepts, choices, strict=True)
        ],
    }


def near_ties(choices: Sequence[RedirectChoice]) -> list[str]:
    """Sentences about choices that another candidate nearly won, and about concepts without a good candidate."""
    ties, bad = [], []
    for choice in choices:
        first, second, *_ = sorted(choice.left.items(), key=lambda pair: pair[1])
        if second[1] - first[1] <= NEAR:
            ties.append(f"{choice.concept.name}: {first[0]} {first[1]:.3f}, {second[0]} {second[1]:.3f}")
        if first[1] > MUCH:
            bad.append(f"{choice.concept.name} ({first[1]:.2f})")
    sentences = []
    if ties:
        sentences.append(
            f"Near ties (up to {NEAR:g} apart; the second is about as good, so choose by meaning): "
            f"{listed(ties, '; ')}."
        )
    if bad:
        sentences.append(
            f"Every candidate leaves more than {MUCH:.0%} of the right answers: {listed(bad)}. Try other names."
        )
    return sentences
