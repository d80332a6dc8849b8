"""Every error that rocr raises on purpose, each with the exit code that the command line gives it."""

from typing import Any


class RocrError(Exception):
    """Something rocr cannot do; the message is a sentence that says what and how to go on.

    Attributes:
        exit_code: of the command line.
        is_broadcast: Whether all processes of a group have the error.
        details: JSON values that a program may want besides the sentence.
    """

    exit_code = 1
    is_broadcast = False

    def __init__(self, sentence: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.details = details or {}


class InputError(RocrError):
    """An argument, file or model that cannot be used as it is."""

    exit_code = 2


class VerificationError(RocrError):
    """A check of bytes or records that did not come out as recorded."""

    exit_code = 3


class GuardError(RocrError):
    """An edit that was stopped because going on would harm the model."""

    exit_code = 4
