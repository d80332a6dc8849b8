"""What `rocr ask` and `rocr chat` share: an edited model that is asked with its edit and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocr.cli import options
from rocr.cli.arguments import chat_of, load, start_running
from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, choice, option, together
from rocr.cli.values import DIR, FILE, Number
from rocr.errors import RocrError

if TYPE_CHECKING:
    from rocr.chat_settings import ChatSettings
    from rocr.export.edited import EditedModel

EDITED, ORIGINAL, BOTH = "edited", "original", "both"
BATCH = 32
"""Number of questions that are asked in one batch."""
asking = together(
    argument("folder", "An output folder of `rocr unlearn` that holds the edit file.", type=DIR, metavar="DIR"),
    option(
        "--model",
        "The model that the edit was made for, if DIR holds the edit without a model (default: the model in DIR).",
        type=FILE,
        group=options.LOADING,
    ),
    options.loading_as_stored,
    option("--show", "Ask the edited model, the original or both.", type=choice(EDITED, ORIGINAL, BOTH), default=BOTH),
    option("--answer-tokens", "Tokens of an answer.", type=Number(1, 65_536), default=100),
    options.chat,
)


@dataclass(frozen=True)
class Talk:
    """A loaded model with its edit, as questions are asked to it.

    Attributes:
        edited: The model with the edit applied, its tokenizer and the edit.
        max_tokens: The largest number of tokens of an answer.
        chat: The settings of the chat template.
    """

    edited: EditedModel
    max_tokens: int
    chat: ChatSettings

    @contextmanager
    def side(self, name: str) -> Iterator[None]:
        """A context in which the model is the edited one or the original.

        Raises:
            RocrError: the weights are not those after the edit, so that it cannot be taken off.
        """
        reverted = self.edited.edit.reverted(self.edited.model) if name == ORIGINAL else nullcontext()
        with reverted:
            yield

    def check_original(self) -> None:
        """Check that the edit can be taken off and put on.

        Raises:
            RocrError: it cannot.
        """
        try:
            with self.side(ORIGINAL):
                pass
        except RocrError as error:
            raise type(error)(
                f"The original cannot be asked: {error} Ask the edited model alone (--show edited), or give the "
                "original with --model."
            ) from error

    def answers(self, name: str, questions: Sequence[str]) -> list[str]:
        """The answers of one side to questions, asked in batches."""
        from rocr.model.generate import ask

        model, tokenizer = self.edited.model, self.edited.tokenizer
        with self.side(name):
            return [
                answer
                for start in range(0, len(questions), BATCH)
                for answer in ask(
                    model, tokenizer, questions[start : start + BATCH], self.max_tokens, self.chat, always=True
                )
            ]

    def answer(self, name: str, question: str, show: Callable[[str], bool]) -> str:
        """The answer of one side to a question; `show` gets its beginning after each token and may end it."""
        from rocr.model.generate import answer_in_steps

        model, tokenizer = self.edited.model, self.edited.tokenizer
        with self.side(name):
            return answer_in_steps(model, tokenizer, question, show, self.max_tokens, self.chat)


def sides_of(shown: str) -> tuple[str, ...]:
    """The sides that are asked, in order."""
    return (EDITED, ORIGINAL) if shown == BOTH else (shown,)


def check_question(question: str) -> None:
    """Raise InputError unless a question can be asked."""
    from rocr.concepts import check_text
    from rocr.model.generate import MAX_QUESTION

    check_text("The question", question, MAX_QUESTION)


def load_talk(arguments: Arguments, console: Console) -> Talk:
    """Load the model of an output folder with its edit.

    Raises:
        InputError: the folder cannot be loaded, or its model writes no text.
        VerificationError: the model in the folder does not have the edit, or the original is to be asked and the edit
            cannot be taken off.
    """
    chat = chat_of(arguments)
    start_running(arguments)
    from rocr.chat_settings import DEFAULT
    from rocr.export.edited import edited_model, find_edited
    from rocr.model.causality import check_writes_text

    found = find_edited(arguments.folder, arguments.model, arguments.download)
    with console.stage("load"):
        arguments.dtype = None  # in another dtype the edit cannot be taken off
        loaded = load(arguments, found.source)
        check_writes_text(loaded.model, f"rocr {arguments.context.info_name}")
        edited = edited_model(found, loaded)
    talk = Talk(edited, arguments.answer_tokens, found.edit.config.chat if chat == DEFAULT else chat)
    if arguments.show != EDITED:
        talk.check_original()
    return talk
