"""Insert a concept's name into templates, and find the tokens of the name in the text.

The tokens are found by the tokenizer's offsets, not by counting: a name may merge with the text that follows it
("Jr." before a full stop), and a tokenizer splits it differently at the start of a text and after a space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.config import Template
from rocr.errors import InputError
from rocr.io.spelling import has_visible_character, has_word_character
from rocr.model.chat import TEMPLATE_ADVICE, ChatFormat, find_chat_format, not_written_once
from rocr.model.kind import LANGUAGE_MODEL, ModelKind
from rocr.model.prefix_cache import common_prefix
from rocr.model.tokenizer import (
    PART,
    check_tokenizer,
    closing_tokens,
    opening_tokens,
    token_texts,
    tokenize_with_offsets,
)


@dataclass(frozen=True)
class Prompt:
    """A tokenised text.

    Attributes:
        tokens: Token ids, with the tokenizer's own opening tokens, and for a text encoder with its closing tokens.
        name: Positions of the name's tokens, ascending. Position 0 is left out, since the first token of a text is
            an attention sink, whose key is unlike all others; not so in a model that reads both ways.
        words: The positions of `name` that can become keys. Tokens that contain only punctuation, spaces or joiners,
            such as the comma of "Harry, Duke of Sussex", are left out unless they are the last one.
        shared: Number of leading tokens that all prompts of the template share, before the first token of a name.
        closing: Number of closing tokens.
    """

    tokens: tuple[int, ...]
    name: tuple[int, ...]
    words: tuple[int, ...] = field(default=(), compare=False)
    shared: int = field(default=0, compare=False)
    closing: int = field(default=0, compare=False)


@dataclass(frozen=True)
class RenderedTemplate:
    """A template as the model reads it: `before` + name + `after`.

    Attributes:
        before: The text before the name.
        after: The text after the name.
        context: The template's own text, with `{}` for the name; used with `chat`.
        chat: The chat format of the context. None: plain text, in which names are read as they are written.
        answer: The end of `after` that follows the chat format.
    """

    before: str
    after: str
    context: str = field(default="{}", compare=False)
    chat: ChatFormat | None = field(default=None, compare=False, repr=False)
    answer: str = field(default="", compare=False)

    def around(self, name: str) -> tuple[str, str, str]:
        """Return the text before a name, the name as the model reads it, and the text after it.

        A chat template may change the message, for example to upper case, or write its length.

        Raises:
            InputError: The name is not found in the text that the chat template renders.
        """
        if self.chat is None:
            return self.before, name, self.after
        text = self.chat.render(self.context.replace("{}", name)) + self.answer
        if text == self.before + name + self.after:
            return self.before, name, self.after
        start, end = _span(text, self.before, self.after, name)
        if start == end:
            raise InputError(
                f"The name {name!r} is not found in the text that the tokenizer's chat template renders. "
                f"{TEMPLATE_ADVICE}"
            )
        return text[:start], text[start:end], text[end:]

    def to_json(self) -> dict[str, str]:
        """Return the text around a name as JSON values."""
        return {"before": self.before, "after": self.after}


def render_template(tokenizer: Any, template: Template, settings: ChatSettings = DEFAULT) -> RenderedTemplate:
    """Render a template, in the tokenizer's chat format if `template.chat`.

    Raises:
        InputError: The chat template fails, or does not write the message exactly once.
    """
    chat = find_chat_format(tokenizer, settings) if template.chat else None
    parts = template.text.split("{}") if chat is None else chat.parts(template.text)
    if len(parts) != 2:
        raise InputError(not_written_once(len(parts) - 1))
    return RenderedTemplate(parts[0], parts[1] + template.answer, template.text, chat, template.answer)


def build_prompts(
    tokenizer: Any, template: RenderedTemplate, names: Sequence[str], kind: ModelKind = LANGUAGE_MODEL
) -> list[Prompt]:
    """Tokenise a template with each name in its place, for a model of some kind.

    Raises:
        InputError: The tokenizer fails or reports no offsets, or a name has no token in its text.
    """
    if not names:
        return []
    check_tokenizer(tokenizer)
    different = list(dict.fromkeys(names))  # many concepts may share a redirect
    written = [template.around(name) for name in different]
    texts = ["".join(parts) for parts in written]
    opening = opening_tokens(tokenizer, texts[0])
    closing = [] if kind.writes_text else closing_tokens(tokenizer)
    first = 0 if kind.bidirectional else 1
    own_text = token_texts(tokenizer)
    encoded = tokenize_with_offsets(tokenizer, texts)
    prompts = []
    for name, (before, as_read, _), text, (tokens, offsets) in zip(different, written, texts, encoded, strict=True):
        start, end = len(before), len(before) + len(as_read)
        prompt = _prompt(name, opening, tokens, _parts(tokens, offsets, start, end, text, own_text), first)
        prompts.append(replace(prompt, tokens=(*prompt.tokens, *closing), closing=len(closing)))
    shared = _shared_tokens(prompts)
    found = {name: replace(prompt, shared=shared) for name, prompt in zip(different, prompts, strict=True)}
    return [found[name] for name in names]


@dataclass(frozen=True)
class _Part:
    """The part of a name in a token: `own` is the text of the token, `covered` the characters of the name."""

    own: str
    covered: str

    @property
    def is_of_the_name(self) -> bool:
        """Whether it is more than a space mark to which the tokenizer assigns the first letter of a name."""
        return PART in self.own or has_visible_character(self.own) or not has_visible_character(self.covered)

    @property
    def has_word_character(self) -> bool:
        """Whether it contains a letter or a digit of the name, or some bytes of one."""
        return has_word_character(self.covered) and (PART in self.own or has_word_character(self.own))


def _parts(
    tokens: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    start: int,
    end: int,
    text: str,
    own_text: Callable[[int], str],
) -> dict[int, _Part]:
    """Return the tokens that cover characters from `start` to `end` of a text, by position."""
    found = {
        i: _Part(own_text(tokens[i]), text[max(first, start) : min(last, end)])
        for i, (first, last) in enumerate(offsets)
        if first < end and last > start
    }
    return {i: part for i, part in found.items() if part.is_of_the_name}


def _prompt(name: str, opening: Sequence[int], tokens: Sequence[int], parts: Mapping[int, _Part], first: int) -> Prompt:
    """Return the prompt of a text, given the tokens that cover its name and the first position that can be read."""
    last = max((i for i, part in parts.items() if has_visible_character(part.covered)), default=None)
    if last is None:
        raise InputError(f"The tokenizer gives no token for the name {name!r}: change the name, or its template.")
    # A variation selector after the last letter has tokens of its own, which are not read.
    covered = {i + len(opening): part for i, part in parts.items() if i <= last and i + len(opening) >= first}
    words = tuple(i for i, part in covered.items() if i == last + len(opening) or part.has_word_character)
    return Prompt((*opening, *tokens), tuple(covered), words)


def _shared_tokens(prompts: Sequence[Prompt]) -> int:
    """Return the number of leading tokens that are equal in all prompts and belong to no name."""
    # The first token of a name at the start of the text may count as shared, since it is never read.
    first_names = (prompt.name[0] if prompt.name else 0 for prompt in prompts)
    return min(common_prefix([prompt.tokens for prompt in prompts]), *first_names)


def _span(text: str, before: str, after: str, name: str) -> tuple[int, int]:
    """Return start and end of a name in a text other than before + name + after; equal if it is not found."""
    start = _common_length(text, before)
    end = len(text) - _common_length(text[start:][::-1], after[::-1])
    middle = text[start:end]
    if start == len(before) and len(text) - end == len(after):
        return start, end
    # The chat template changed the text around the name too: search for the name in the difference.
    for found, wanted in ((middle, name), (middle.casefold(), name.casefold())):
        if len(found) == len(middle) and found.count(wanted) == 1:
            place = start + found.index(wanted)
            return place, place + len(wanted)
    return start, start


def _common_length(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
