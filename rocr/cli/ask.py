"""`rocr ask`: ask the edited model of an output folder, and the original, some questions."""

from __future__ import annotations

from typing import Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command
from rocr.cli.talk import asking, check_question, load_talk, sides_of


@command("ask")
@asking
@argument("questions", "Questions, each in quotes.", nargs=-1, required=True, metavar="QUESTION...")
def ask(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Ask questions to an edited model, and to the original.

    Both answer from one loaded model, with the edit applied and reverted. Answers are greedy, and each question is
    asked on its own.
    """
    for question in arguments.questions:
        check_question(question)
    talk = load_talk(arguments, console)
    answers: dict[str, list[str]] = {}
    for side in sides_of(arguments.show):
        with console.stage(f"answers, {side}"):
            answers[side] = talk.answers(side, arguments.questions)
    rows = list(zip(arguments.questions, *answers.values(), strict=True))
    console.table(arguments.folder, ("question", *answers), rows)
    return {
        "folder": arguments.folder,
        "answers": [dict(zip(("question", *answers), row, strict=True)) for row in rows],
        "seconds": console.seconds,
    }
