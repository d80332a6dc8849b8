"""What chat templates are given besides the message of the user."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rocr.concepts import check_text
from rocr.errors import InputError

CLOCK_DATE = "2024-07-26"
"""Default of the current date for chat templates. Llama 3.1's template uses the same one."""
MAX_CONTEXT = 10_000
"""Maximum number of characters of a system message or a template."""
_RESERVED_VARIABLES = {
    "self", "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "sanitize_control_tokens", "tokenizer_kwargs", "strftime_now",
}  # fmt: skip


@dataclass(frozen=True)
class ChatSettings:
    """Inputs of the tokenizer's chat template besides the user's message.

    Attributes:
        system: The system message. None gives no system message; a template with a default one then uses it.
        variables: Values of variables of the template, such as {"enable_thinking": False}. They must be JSON values.
        date: The current date for the template, "YYYY-MM-DD", passed as `strftime_now` and `date_string`. None is
            2024-07-26. The date of the run is never used, so that equal inputs give equal bytes on any day.
        enabled: Whether the chat template is used. Without it, messages are read as plain text.

    Raises:
        InputError: A value cannot be passed to a chat template.
    """

    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    date: str | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.system is not None:
            check_text("The system message", self.system, MAX_CONTEXT)
        if not isinstance(self.variables, Mapping):
            raise InputError(f"The variables of a chat template must be a mapping, not {repr(self.variables)[:100]}.")
        object.__setattr__(self, "variables", dict(self.variables))
        for name, value in self.variables.items():
            _check_variable(name, value)
        if self.date is not None:
            _check_date(self.date)
        if not isinstance(self.enabled, bool):
            raise InputError(f"enabled must be true or false, not {repr(self.enabled)[:100]}.")
        if not self.enabled and (self.system is not None or self.variables or self.date is not None):
            raise InputError(
                "A system message, variables or a date have no effect without the chat template: leave them out, or "
                "set enabled to true."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, as JSON values."""
        values = {"system": self.system, "variables": dict(self.variables) or None, "date": self.date}
        found = {name: value for name, value in values.items() if value is not None}
        return found if self.enabled else {**found, "enabled": False}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ChatSettings:
        """Return the settings of a JSON object, the inverse of `to_json`.

        Raises:
            InputError: An unknown field, or a value that cannot be passed to a chat template.
        """
        unknown = sorted(map(str, set(values) - {"system", "variables", "date", "enabled"}))
        if unknown:
            raise InputError(f"Unknown chat settings: {', '.join(unknown)[:100]}.")
        return cls(**values)

    def described(self) -> str:
        """Return the settings as the end of a sentence; empty for the defaults."""
        values = self.to_json()
        if "system" in values:
            values["system"] = f"sha256 {hashlib.sha256(values['system'].encode()).hexdigest()}"
        return "".join(f", {name} {value}" for name, value in values.items())


DEFAULT = ChatSettings()


def _check_variable(name: object, value: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED_VARIABLES:
        raise InputError(
            f"{repr(name)[:100]} cannot be a variable of a chat template: use an identifier that transformers does not "
            "reserve."
        )
    if not _is_plain(value):
        raise InputError(
            f"The value of the template variable {name!r} must be JSON of at most {MAX_CONTEXT:,} characters, valid as "
            "UTF-8."
        )


def _is_plain(value: Any) -> bool:
    """Return whether a value is JSON of bounded size without unpaired surrogates."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return len(text) <= MAX_CONTEXT and bool(text.encode())
    except (TypeError, ValueError, RecursionError):
        return False


def _check_date(value: object) -> None:
    try:
        if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
            raise ValueError
        datetime.date.fromisoformat(value)
    except ValueError:
        raise InputError(
            f"The date {repr(value)[:100]} is not a valid date of the form YYYY-MM-DD, such as {CLOCK_DATE}."
        ) from None
