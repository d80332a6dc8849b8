"""The errors that rocr raises, each with the exit code of the command line."""

from typing import Any


class RocrError(Exception):
    """Base class of all errors of rocr. The message says what is wrong and what to do.

    Attributes:
        exit_code: The exit code of the command line.
        is_broadcast: Whether all processes of a group have the error.
        details: JSON values for programs, besides the message.
    """

    exit_code = 1
    is_broadcast = False

    def __init__(self, sentence: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.details = details or {}


class InputError(RocrError):
    """An argument, a file or a model is not valid."""

    exit_code = 2


class VerificationError(RocrError):
    """A check found other bytes or records than were recorded."""

    exit_code = 3


class GuardError(RocrError):
    """An operation was stopped because its result would harm the model or is not finite."""

    exit_code = 4
