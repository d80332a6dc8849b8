"""`rocr aliases`: let the model propose aliases of concepts and verify them, as a list for `rocr unlearn`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.arguments import chat_of, claim_output, load_language_model, source_of
from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command, flag, option
from rocr.cli.tables import number_of_concepts
from rocr.cli.values import FILE, SHARE
from rocr.concepts import AUTO, load_concepts
from rocr.errors import InputError
from rocr.io.output import new_file

if TYPE_CHECKING:
    from rocr.concepts import Concept
    from rocr.edit.aliases import Proposal

SHOWN_ROWS = 200
WITHOUT_REDIRECT = "the redirect of --redirect"


@command("aliases")
@options.model
@argument("concepts", "A list of concepts: .txt, .csv or .jsonl.", type=FILE)
@options.out("List of concepts to write, .jsonl")
@option(
    "--languages",
    "Languages in which the name is spelt (default: Chinese, Japanese, Korean, Russian, Arabic, Hindi, Greek, Hebrew).",
    several=True,
    metavar="NAME",
)
@option(
    "--least",
    "Take an alias from this share on: 1 if the model says of it what it says of the name, 0 if no more than of "
    "unrelated names. Half of it is enough if the model's state at the alias is near that at the name.",
    type=SHARE,
    default=0.5,
)
@flag("--related", "Add works, companies and inventions of each concept, as concepts of their own.")
@option(
    "--redirect",
    "Redirect of related concepts, and of concepts that have none (default: auto, and none).",
    metavar="NAME",
)
@options.chat
def aliases(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Let the model propose aliases of concepts, and verify each by what it says of it.

    Full names, nicknames, spellings in other scripts and descriptions are proposed. Read the list before using it.
    """
    from rocr.edit.aliases import LANGUAGES, check_languages, check_redirect, propose_aliases

    arguments.chat = chat_of(arguments)
    languages = arguments.languages or LANGUAGES
    check_languages(languages)
    if not str(arguments.out).lower().endswith(".jsonl"):
        raise InputError(f"--out {arguments.out} is written as JSON lines: give it a name that ends in .jsonl.")
    concepts = load_concepts(arguments.concepts, arguments.redirect or WITHOUT_REDIRECT)
    check_redirect(arguments.redirect or AUTO, concepts)
    source = source_of(arguments)
    claim_output(arguments, source.inputs)
    with console.stage("load"):
        loaded = load_language_model(arguments, source)
    with console.stage("aliases") as progress:
        found = propose_aliases(
            loaded.model,
            loaded.tokenizer,
            concepts,
            languages,
            arguments.least,
            arguments.related,
            arguments.redirect or AUTO,
            progress=progress,
            chat=arguments.chat,
        )
    lines = [_line(concept) for concept in found.concepts]
    with new_file(arguments.out, overwrite=arguments.overwrite) as partial:
        partial.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    _show(found.proposals, console)
    taken = sum(proposal.taken for proposal in found.proposals)
    console.say(
        f"{arguments.out} holds {number_of_concepts(found.concepts)} for rocr unlearn; {taken:,} of "
        f"{len(found.proposals):,} proposals were taken. Read it before using it."
    )
    return {
        "out": arguments.out,
        "concepts": lines,
        "proposals": [proposal.to_json() for proposal in found.proposals],
    }


def _line(concept: Concept) -> dict[str, Any]:
    """Return the fields of a concept for a list, without a redirect that it does not have."""
    values = concept.to_json()
    if concept.redirect == WITHOUT_REDIRECT:
        del values["redirect"]
    return values


def _show(proposals: list[Proposal], console: Console) -> None:
    """Show a row for each proposal, of many the first."""
    rows = [
        (
            proposal.concept,
            proposal.name or "",
            proposal.language or proposal.kind,
            "" if proposal.share is None else f"{proposal.share:.2f}",
            "" if proposal.near is None else "near" if proposal.near else "not near",
            "taken" if proposal.taken else "not taken",
            proposal.reason,
        )
        for proposal in proposals[:SHOWN_ROWS]
    ]
    console.table("Proposals", ("concept", "proposal", "kind", "share", "state", "result", "reason"), rows)
    if len(proposals) > SHOWN_ROWS:
        console.say(f"and {len(proposals) - SHOWN_ROWS:,} more, which --json lists.")
