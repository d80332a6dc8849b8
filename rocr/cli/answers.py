"""Questions that a command asks before and after an edit, and the names that should not change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, flag, option, together
from rocr.cli.values import Number
from rocr.concepts import Concept, Kind, folded, for_kind

if TYPE_CHECKING:
    from rocr.export.report import Answer
    from rocr.model.load import LoadedModel

SHOWN_CONCEPTS = 10
_answering = partial(option, group="Answers before and after")
questions = together(
    _answering(
        "--ask",
        "Question to ask, with {} for a name. May be repeated. 'Who is {}?' asks 'What is {}?' about things.",
        default=["Who is {}?"],
        multiple=True,
        metavar="QUESTION",
    ),
    _answering(
        "--control",
        "Names that should not change: they are asked about too, and the effect of the edit on them is measured "
        "(default: names that the edit is likely to harm are measured).",
        several=True,
        metavar="NAME",
    ),
    _answering("--answer-tokens", "Tokens of an answer.", type=Number(1, 65_536), default=32),
    flag("--no-answers", "Ask no questions.", group="Answers before and after"),
)


def asked_names(arguments: Arguments, concepts: Sequence[Concept]) -> list[tuple[str, Kind | None]]:
    """The names that are asked about, with their kinds: some concepts, and those of --control."""
    asked = [(concept.name, concept.kind) for concept in concepts[:SHOWN_CONCEPTS]]
    return [*asked, *((name, None) for name in arguments.control)]


def filled_questions(arguments: Arguments, concepts: Sequence[Concept]) -> list[str]:
    """Every question of --ask about every name, name by name."""
    from rocr.model.generate import fill_question

    asked = list(dict.fromkeys(arguments.ask))
    for question in asked:
        fill_question(question, [])  # checks it, also if there is no name
    return [
        fill_question(for_kind(question, kind), [name])[0]
        for name, kind in asked_names(arguments, concepts)
        for question in asked
    ]


def retained_names(arguments: Arguments, concepts: Sequence[Concept]) -> list[str] | None:
    """Names of --control that are not concepts of the list; the effect of the edit on them is measured."""
    listed = {folded(name) for concept in concepts for name in concept.names}
    return [name for name in arguments.control if folded(name) not in listed] or None


def answerable(loaded: LoadedModel, asked: list[str], console: Console) -> list[str]:
    """The questions, or none if the model writes no text."""
    from rocr.model.causality import why_no_text

    reason = why_no_text(loaded.model) if asked else None
    if reason is None:
        return asked
    console.warn(f"Nothing is asked before and after: {reason}.")
    return []


def ask_model(loaded: LoadedModel, asked: list[str], arguments: Arguments, console: Console, stage: str) -> list[str]:
    """The model's answers to questions."""
    from rocr.model.generate import ask

    if not asked:
        return []
    with console.stage(stage):
        return ask(loaded.model, loaded.tokenizer, asked, arguments.answer_tokens, arguments.chat)


def answers_of(
    arguments: Arguments, concepts: Sequence[Concept], asked: list[str], before: list[str], after: list[str]
) -> list[Answer]:
    """The questions with the answers before and after the edit, for the report."""
    from rocr.export.report import Answer

    listed = {folded(name) for concept in concepts for name in concept.names}
    times = len(dict.fromkeys(arguments.ask))
    names = [name for name, _ in asked_names(arguments, concepts) for _ in range(times)] if asked else []
    return [
        Answer(n, folded(n) in listed, q, b, a) for n, q, b, a in zip(names, asked, before, after, strict=bool(asked))
    ]
