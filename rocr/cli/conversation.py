"""A conversation of `rocr chat`: its questions and answers, and the lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rocr.cli.talk import BOTH, EDITED, ORIGINAL, check_question
from rocr.errors import InputError

HELP = """\
Each line is a question of its own: the model is not told those before it.
/both, /edited, /original   who answers the next questions
/save FILE                  write the questions and answers: .json, else text
/help                       this help
/quit                       leave; so does Ctrl-D
Ctrl-C stops an answer, and leaves when it is pressed again."""
_COMMANDS = (f"/{BOTH}", f"/{EDITED}", f"/{ORIGINAL}", "/save", "/help", "/quit")


@dataclass
class Turn:
    """A question and its answers.

    Attributes:
        question: the question.
        answers: the answers by "edited" and "original", as far as they were asked.
        stopped: whether an answer was interrupted.
    """

    question: str
    answers: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """The turn as JSON values."""
        return {"question": self.question, **self.answers} | ({"stopped": True} if self.stopped else {})

    def lines(self) -> list[str]:
        """The turn as lines of text."""
        answers = [f"{side}: {text}" for side, text in self.answers.items()]
        return [f"> {self.question}", *answers, *(["(stopped)"] if self.stopped else [])]


@dataclass
class Conversation:
    """What was asked so far, and who answers.

    Attributes:
        shown: who answers: "both", "edited" or "original".
        check_original: raises if the original cannot be asked.
        turns: questions with their answers.
        ended: whether /quit was read.
    """

    shown: str
    check_original: Callable[[], None]
    turns: list[Turn] = field(default_factory=list)
    ended: bool = False

    def read(self, line: str) -> Turn | str | None:
        """Take one line.

        Returns:
            A new turn to answer, or a sentence to show; None for an empty line and for /quit.

        Raises:
            InputError: the line is no question that can be asked and no command, or FILE cannot be written.
            RocrError: the original cannot be asked, or FILE cannot be written.
        """
        line = line.strip()
        if not line:
            return None
        if not line.startswith("/"):
            check_question(line)
            self.turns.append(Turn(line))
            return self.turns[-1]
        name, _, rest = line.partition(" ")
        if name not in _COMMANDS:
            nearest = difflib.get_close_matches(name, _COMMANDS, 1)
            meant = f" Did you mean {nearest[0]}?" if nearest else ""
            raise InputError(f"There is no command {name[:40]!r}.{meant} /help lists the commands.")
        if name == "/save":
            return self._save(rest.strip())
        if rest.strip():
            raise InputError(f"{name} takes nothing after it: write the question on a line of its own.")
        if name == "/help":
            return HELP
        if name == "/quit":
            self.ended = True
            return None
        if name != f"/{EDITED}":
            self.check_original()
        self.shown = name.removeprefix("/")
        return f"Asked from now on: {self.shown}."

    def to_json(self) -> list[dict[str, Any]]:
        """All turns as JSON values."""
        return [turn.to_json() for turn in self.turns]

    def _save(self, place: str) -> str:
        from rocr.io.output import new_file

        if not place:
            raise InputError("/save needs the name of a file, such as /save answers.json.")
        if not self.turns:
            raise InputError("Nothing was asked yet, so there is nothing to save.")
        if Path(place).suffix == ".json":
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        else:
            text = "\n".join("\n".join(turn.lines()) + "\n" for turn in self.turns)
        with new_file(place) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        return f"{place}: {len(self.turns)} questions with their answers."
