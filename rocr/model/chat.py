"""Render chats with a tokenizer's chat template, with a fixed date and fixed random numbers."""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rocr.chat_settings import CLOCK_DATE, DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.io.boundary import calling

MAX_RENDERED = 2**20
"""Limit of the characters of a rendered chat."""
TEMPLATE_ADVICE = (
    "Give the template what it asks for with --system TEXT or --template-variable NAME=VALUE, or do not use it: "
    "--no-chat, and --template TEXT for each context in which names are read (in Python rocr.ChatSettings, and "
    "EditConfig.templates)."
)
# Placeholders for a message, to find its place in a rendered chat: a private-use character, and words for templates
# that strip it or change the case of words.
_PLACEHOLDERS = ("\ue000", "zqxjk", "ZQXJK", "Zqxjk")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's chat template with settings that it accepts; see `find_chat_format`.

    Attributes:
        tokenizer: The tokenizer.
        arguments: The variables of the template, besides the messages.
        system: The system message; None for none.
        as_parts: Whether the content of a message is a list of parts, as some templates need it, or a text.
    """

    tokenizer: Any
    arguments: Mapping[str, Any]
    system: str | None
    as_parts: bool

    def render(self, message: str) -> str:
        """Render a user's message, up to the opening of the answer.

        Raises:
            InputError: The template refuses the message, or writes more than `MAX_RENDERED` characters.
        """
        turns = [("system", self.system), ("user", message)]
        chat = [{"role": role, "content": self._content(text)} for role, text in turns if text is not None]
        with calling("The tokenizer's chat template", TEMPLATE_ADVICE), _fixed_random():
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.arguments
            )
        if not isinstance(text, str) or len(text) > MAX_RENDERED:
            size = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise InputError(
                f"The tokenizer's chat template writes {size} for a message of {len(message):,} characters; the limit "
                f"is {MAX_RENDERED:,}. {TEMPLATE_ADVICE}"
            )
        return text

    def parts(self, context: str) -> list[str]:
        """Return the rendered text around the `{}` of a context: two parts if the template writes the message once."""
        best: list[str] = [""]
        for placeholder in (each for each in _PLACEHOLDERS if each not in context):
            parts = self.render(context.replace("{}", placeholder)).split(placeholder)
            if len(parts) == 2:
                return parts
            best = max(best, parts, key=len)
        return best

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.as_parts else text


def with_date(settings: ChatSettings, tokenizer: Any) -> ChatSettings:
    """Return the settings with the date filled in, if the tokenizer's chat template reads one."""
    if not settings.enabled or settings.date is not None:
        return settings
    return replace(settings, date=CLOCK_DATE) if _reads_date(_template_of(tokenizer) or "") else settings


def find_chat_format(tokenizer: Any, settings: ChatSettings = DEFAULT) -> ChatFormat | None:
    """Find the chat format of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.
        settings: The variables, system message and date of the chat template, and whether it is used.

    Returns:
        The chat format; None if the tokenizer has no chat template, or the settings switch it off.

    Raises:
        InputError: The template refuses a user's message or does not write it, or a setting has no effect on it.
    """
    template = _template_of(tokenizer) if settings.enabled else None
    if template is None:
        given = settings.to_json().keys() - {"enabled"}
        if given:
            raise InputError(f"The tokenizer has no chat template: leave out {', '.join(sorted(given))}.")
        return None
    for name in settings.variables:
        if not _names(template, name):
            raise InputError(f"The tokenizer's chat template does not use the variable {name!r}: leave it out.")
    if settings.date is not None and not _reads_date(template):
        raise InputError("The tokenizer's chat template does not use a date: leave --date out.")
    first_error = None
    for as_parts in (False, True):
        found = ChatFormat(tokenizer, _arguments(template, settings), settings.system, as_parts)
        try:
            if len(found.parts("{}")) < 2:
                raise InputError(not_written_once(0))
        except InputError as error:
            first_error = first_error or error
            continue
        _check_system(found)
        return found
    assert first_error is not None
    raise first_error


def render_chat(tokenizer: Any, message: str, settings: ChatSettings = DEFAULT) -> str:
    """Render a user's message in the tokenizer's chat format, up to the opening of the answer.

    Returns:
        The rendered message; the message itself if there is no chat format.

    Raises:
        InputError: As `find_chat_format`.
    """
    return render_chats(tokenizer, [message], settings)[0]


def render_chats(tokenizer: Any, messages: Sequence[str], settings: ChatSettings = DEFAULT) -> list[str]:
    """Render each message as `render_chat` does."""
    chat = find_chat_format(tokenizer, settings) if messages else None
    return list(messages) if chat is None else [chat.render(message) for message in messages]


def not_written_once(times: int) -> str:
    """Return the error message for a chat template that does not write the user's message exactly once."""
    return f"The tokenizer's chat template writes the user's message {times} times instead of once. {TEMPLATE_ADVICE}"


@contextmanager
def _fixed_random() -> Iterator[None]:
    """Make the random functions of templates (`random`, `lipsum`) return the same values in every run."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _arguments(template: str, settings: ChatSettings) -> dict[str, Any]:
    """Return the template's variables, and a changed template if it reads the clock."""
    today = datetime.date.fromisoformat(settings.date or CLOCK_DATE)
    arguments = dict(settings.variables)
    if _names(template, "date_string"):
        arguments.setdefault("date_string", f"{today.day:02} {_MONTHS[today.month - 1][:3]} {today.year}")
    if _names(template, "strftime_now"):
        arguments["chat_template"] = _with_clock(template, today)
    return arguments


def _check_system(chat: ChatFormat) -> None:
    """Raise InputError if the template does not write the system message."""
    if chat.system is None:
        return
    try:
        without = replace(chat, system=None).render("")
    except InputError:
        return  # the template needs a system message
    if chat.render("") == without:
        raise InputError("The tokenizer's chat template does not write a system message: leave --system out.")


def _template_of(tokenizer: Any) -> str | None:
    """Return the tokenizer's chat template as a text; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or isinstance(template, str):
        return template or None
    with calling("The tokenizer's choice of a chat template", TEMPLATE_ADVICE):
        return str(tokenizer.get_chat_template())


def _names(template: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", template) is not None


def _reads_date(template: str) -> bool:
    return _names(template, "strftime_now") or _names(template, "date_string")


def _with_clock(template: str, today: datetime.date) -> str:
    """Return a template whose `strftime_now` is a macro for a fixed day, since transformers accepts no function."""
    filters = "".join(f"|replace({code!r}, {text!r})" for code, text in _codes(today).items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def _codes(today: datetime.date) -> dict[str, str]:
    """Return the values of the codes of strftime at midnight of a day, in English for every locale."""
    month, weekday = _MONTHS[today.month - 1], _DAYS[today.weekday()]
    year, day, of_year = f"{today.year:04}", f"{today.day:02}", today.timetuple().tm_yday
    number, clock = f"{today.month:02}", "00:00:00"
    short, percent = f"{number}/{day}/{year[2:]}", "\ue001"
    iso = today.isocalendar()
    codes = {
        "%%": percent, "%-d": str(today.day), "%-m": str(today.month), "%-y": str(int(year[2:])), "%-j": str(of_year),
        "%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0", "%A": weekday, "%a": weekday[:3], "%B": month, "%b": month[:3],
        "%h": month[:3], "%c": f"{weekday[:3]} {month[:3]} {today.day:2} {clock} {year}", "%D": short, "%x": short,
        "%d": day, "%e": f"{today.day:2}", "%F": today.isoformat(), "%G": str(iso[0]), "%V": f"{iso[1]:02}",
        "%u": str(iso[2]), "%H": "00", "%I": "12", "%j": f"{of_year:03}", "%M": "00", "%m": number, "%p": "AM",
        "%R": "00:00", "%r": "12:00:00 AM", "%S": "00", "%T": clock, "%X": clock, "%f": "000000", "%w": str(iso[2] % 7),
        "%U": f"{(of_year + 6 - iso[2] % 7) // 7:02}", "%W": f"{(of_year + 7 - iso[2]) // 7:02}", "%y": year[2:],
        "%Y": year, "%C": year[:2], "%Z": "", "%z": "", "%n": " ", "%t": " ",
    }  # fmt: skip
    return {**codes, percent: "%"}
