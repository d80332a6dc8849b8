"""Chats as a model reads them: the one place that renders chat templates, the same on any day."""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rocr.config import CLOCK_DATE, DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.io.boundary import calling

MAX_RENDERED = 2**20
"""Characters of a chat."""
WAY_ROUND = (
    "Give the template what it asks for with --system TEXT or --template-variable NAME=VALUE, or do without it: "
    "--no-chat, and --template TEXT for each context in which names are read (in Python rocr.ChatSettings, and "
    "EditConfig.templates)."
)
# Each stands for a message while a chat template is rendered, so that its place is known whatever else the template
# writes: a private-use character, and words for templates that strip it or change the case of words.
_MARKS = ("\ue000", "zqxjk", "ZQXJK", "Zqxjk")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's chat template with settings that it takes; see `find_chat_format`.

    Attributes:
        tokenizer: the tokenizer.
        arguments: what the template is given besides the messages.
        system: the system message; None: none.
        as_parts: whether a message's content is a list of parts, as some templates want it, and not a text.
    """

    tokenizer: Any
    arguments: Mapping[str, Any]
    system: str | None
    as_parts: bool

    def render(self, message: str) -> str:
        """A user's message in the chat format, up to the opening of the answer.

        Raises:
            InputError: the template refuses it, or writes too much.
        """
        turns = [("system", self.system), ("user", message)]
        chat = [{"role": role, "content": self._content(text)} for role, text in turns if text is not None]
        with calling("The tokenizer's chat template", WAY_ROUND), _pinned_random():
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.arguments
            )
        if not isinstance(text, str) or len(text) > MAX_RENDERED:
            size = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise InputError(
                f"The tokenizer's chat template gives {size} for a message of {len(message):,}. {WAY_ROUND}"
            )
        return text

    def parts(self, context: str) -> list[str]:
        """What a chat writes around the `{}` of a context; two parts where it writes the message once."""
        best: list[str] = [""]
        for mark in (mark for mark in _MARKS if mark not in context):
            parts = self.render(context.replace("{}", mark)).split(mark)
            if len(parts) == 2:
                return parts
            best = max(best, parts, key=len)
        return best

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.as_parts else text


def settled(settings: ChatSettings, tokenizer: Any) -> ChatSettings:
    """The settings with the date written down, where the tokenizer's chat template reads one."""
    if not settings.enabled or settings.date is not None:
        return settings
    return replace(settings, date=CLOCK_DATE) if _reads_date(_template_of(tokenizer) or "") else settings


def find_chat_format(tokenizer: Any, settings: ChatSettings = DEFAULT) -> ChatFormat | None:
    """The chat format of a tokenizer; None where it has no chat template, or it is not to be used.

    Raises:
        InputError: the template refuses a user's message, does not write it, or a setting has no effect on it.
    """
    template = _template_of(tokenizer) if settings.enabled else None
    if template is None:
        given = settings.to_json().keys() - {"enabled"}
        if given:
            raise InputError(f"The tokenizer has no chat template, so that no {', '.join(sorted(given))} can be given.")
        return None
    for name in settings.variables:
        if not _names(template, name):
            raise InputError(f"The tokenizer's chat template names no variable {name!r}: leave it out.")
    if settings.date is not None and not _reads_date(template):
        raise InputError("The tokenizer's chat template reads no date: leave --date out.")
    first_error = None
    for as_parts in (False, True):
        found = ChatFormat(tokenizer, _arguments(template, settings), settings.system, as_parts)
        try:
            if len(found.parts("{}")) < 2:
                raise InputError(times_written(0))
        except InputError as error:
            first_error = first_error or error
            continue
        _check_system(found)
        return found
    assert first_error is not None
    raise first_error


def render_chat(tokenizer: Any, message: str, settings: ChatSettings = DEFAULT) -> str:
    """A user's message in the tokenizer's chat format, up to the opening of the answer; as it is where there is none.

    Raises:
        InputError: as `find_chat_format`.
    """
    return render_chats(tokenizer, [message], settings)[0]


def render_chats(tokenizer: Any, messages: Sequence[str], settings: ChatSettings = DEFAULT) -> list[str]:
    """Each message as `render_chat` gives it."""
    chat = find_chat_format(tokenizer, settings) if messages else None
    return list(messages) if chat is None else [chat.render(message) for message in messages]


def times_written(times: int) -> str:
    """The sentence about a chat template that does not write the user's message once."""
    return f"The tokenizer's chat template writes the user's message {times} times instead of once. {WAY_ROUND}"


@contextmanager
def _pinned_random() -> Iterator[None]:
    """Within the context, what a template draws at random (`random`, `lipsum`) is the same in every run."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _arguments(template: str, settings: ChatSettings) -> dict[str, Any]:
    """The template's variables, and the template itself where it has to be told the date."""
    today = datetime.date.fromisoformat(settings.date or CLOCK_DATE)
    arguments = dict(settings.variables)
    if _names(template, "date_string"):
        arguments.setdefault("date_string", f"{today.day:02} {_MONTHS[today.month - 1][:3]} {today.year}")
    if _names(template, "strftime_now"):
        arguments["chat_template"] = _with_clock(template, today)
    return arguments


def _check_system(chat: ChatFormat) -> None:
    """Refuse a system message that a template leaves out."""
    if chat.system is None:
        return
    try:
        without = replace(chat, system=None).render("")
    except InputError:
        return  # the template asks for one
    if chat.render("") == without:
        raise InputError("The tokenizer's chat template leaves a system message out: do without --system.")


def _template_of(tokenizer: Any) -> str | None:
    """The tokenizer's chat template as a text; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or isinstance(template, str):
        return template or None
    with calling("The tokenizer's choice of a chat template", WAY_ROUND):
        return str(tokenizer.get_chat_template())


def _names(template: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", template) is not None


def _reads_date(template: str) -> bool:
    return _names(template, "strftime_now") or _names(template, "date_string")


def _with_clock(template: str, today: datetime.date) -> str:
    """A template whose `strftime_now` says a given day: a macro of its own, since transformers takes no function."""
    filters = "".join(f"|replace({code!r}, {text!r})" for code, text in _codes(today).items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def _codes(today: datetime.date) -> dict[str, str]:
    """What the codes of strftime give at midnight of a day, in English whatever the locale."""
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
