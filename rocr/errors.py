"""The errors that rocr raises, each with the exit code of the command line."""

from typing import Any


class RocrError(Exception):
    """An operation that failed, with a message that says what is wrong and what to do.

    Attributes:
        exit_code: The exit code of the command line.
        is_broadcast: Whether every process of a group has received the error.
        details: JSON values that a program can read instead of the message.
    """

    exit_code = 1
    is_broadcast = False

    def __init__(self, message: str = "", details: dict[str, Any] | None = None) -> None:
        """Create the error.

        Args:
            message: One or more sentences that say what is wrong and what to do.
            details: JSON values that a program can read instead of the message; None for none.
        """
        super().__init__(message)
        self.details = details or {}


class InputError(RocrError):
    """An argument, file or model that cannot be used."""

    exit_code = 2


class VerificationError(RocrError):
    """Bytes or records that differ from those that were recorded."""

    exit_code = 3


class GuardError(RocrError):
    """An edit that was stopped because it exceeds a safety limit or because values are not finite."""

    exit_code = 4
