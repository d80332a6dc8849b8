"""Put a concept's name into context templates, and find its tokens there.

A name's tokens are found by the tokenizer's offsets, never by counting: a name may merge with what follows it
("Jr." before a full stop), and it is split differently at the start of a text and after a space.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rocr.errors import InputError

# A private-use character stands for the name while a chat template is rendered, so that the name's
# place is known whatever else the template writes.
_PLACEHOLDER = "\ue000"


@dataclass(frozen=True)
class Template:
    """A context in which a name is read.

    Attributes:
        text: the context, with `{}` once where the name goes.
        chat: whether the text is a user's message, put into the tokenizer's chat template. Where the tokenizer
            has none, the text is used as it is.
        answer: what the text goes on with, after the chat template's opening of the answer.
    """

    text: str
    chat: bool = False
    answer: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or self.text.count("{}") != 1:
            raise InputError(
                f"A template needs {{}} exactly once, where the name goes, unlike {repr(self.text)[:100]}."
            )
        if not isinstance(self.chat, bool) or not isinstance(self.answer, str):
            raise InputError(
                f"The template {self.text[:100]!r} needs chat to be true or false, and answer to be a text."
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Template:
        """Build a template from the JSON object that `dataclasses.asdict` makes of one."""
        unknown = sorted(set(values) - {"text", "chat", "answer"})
        if unknown:
            raise InputError(f"Unknown fields of a template: {', '.join(unknown)[:100]}.")
        if "text" not in values:
            raise InputError("A template has no text.")
        return cls(**values)


@dataclass(frozen=True)
class Prompt:
    """A tokenised text.

    Attributes:
        tokens: token ids, with the tokenizer's own opening tokens.
        name: positions of the name's tokens among them, ascending; never 0, since the first token of a text is
            an attention sink with keys unlike all others.
        words: those of them that can become keys: before the last one, none that holds punctuation or space alone, such
            as the comma of "Harry, Duke of Sussex", which belongs to every text.
        shared: how many leading tokens all prompts of the template have in common, before the first of a name.
    """

    tokens: tuple[int, ...]
    name: tuple[int, ...]
    words: tuple[int, ...] = field(default=(), compare=False)
    shared: int = field(default=0, compare=False)


@dataclass(frozen=True)
class RenderedTemplate:
    """A template as the model reads it: `before` + name + `after`."""

    before: str
    after: str


def render_template(tokenizer: Any, template: Template) -> RenderedTemplate:
    """Put a template into the tokenizer's chat format where it asks for it.

    Raises:
        InputError: the chat template does not write the user's message once.
    """
    text = template.text.replace("{}", _PLACEHOLDER)
    if template.chat and tokenizer.chat_template:
        text = render_chat(tokenizer, text)
    parts = (text + template.answer).split(_PLACEHOLDER)
    if len(parts) != 2:
        raise InputError(
            f"The tokenizer's chat template writes the user's message {len(parts) - 1} times instead of once; "
            "use templates without the chat format."
        )
    return RenderedTemplate(*parts)


def render_chat(tokenizer: Any, message: str) -> str:
    """A user's message in the tokenizer's chat format, up to the opening of the answer."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return text


def build_prompts(tokenizer: Any, template: RenderedTemplate, names: Sequence[str]) -> list[Prompt]:
    """Tokenise a template around each name.

    Raises:
        InputError: the tokenizer reports no offsets, or a name has no token in its text.
    """
    if not names:
        return []
    check_tokenizer(tokenizer)
    texts = [template.before + name + template.after for name in names]
    opening = opening_tokens(tokenizer, texts[0])
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    start = len(template.before)
    prompts = [
        _prompt(name, opening, tokens, offsets, start)
        for name, tokens, offsets in zip(names, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    shared = _common_prefix(prompts)
    return [replace(prompt, shared=shared) for prompt in prompts]


def opening_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens that the tokenizer puts before a text (its BOS, if it adds one), unless the text has them already.

    A chat template usually writes the BOS itself; adding it again would make it double.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a", add_special_tokens=True)["input_ids"]
    opening = special[: _find(special, plain)]
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [] if written[: len(opening)] == opening else opening


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} reports no character offsets, which rocr needs to find a name's tokens; "
            "load the tokenizer with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )


def _prompt(
    name: str, opening: Sequence[int], tokens: Sequence[int], offsets: Sequence[tuple[int, int]], start: int
) -> Prompt:
    end = start + len(name)
    parts = {
        i + len(opening): name[max(first - start, 0) : last - start]
        for i, (first, last) in enumerate(offsets)
        if first < end and last > start
    }
    if not parts:
        raise InputError(f"The tokenizer gives no token to the name {name!r}.")
    covered = tuple(position for position in parts if position > 0)
    words = tuple(position for position in covered if position == max(parts) or _is_of_a_word(parts[position]))
    return Prompt((*opening, *tokens), covered, words)


def _is_of_a_word(text: str) -> bool:
    """Whether a text holds a letter, a digit or a mark on one, and not punctuation, symbols or space alone."""
    return any(unicodedata.category(character)[0] in "LNM" for character in text)


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """How many leading tokens are the same in all prompts, and belong to a name in none."""
    first = prompts[0].tokens
    shared = len(first)
    for prompt in prompts:
        # Where a name begins the text, its first token, the sink, may count as shared: it is never read.
        shared = min(shared, prompt.name[0] if prompt.name else 0)
        while prompt.tokens[:shared] != first[:shared]:
            shared -= 1
    return shared


def _find(sequence: Sequence[int], part: Sequence[int]) -> int:
    for i in range(len(sequence) - len(part) + 1):
        if list(sequence[i : i + len(part)]) == list(part):
            return i
    return 0
