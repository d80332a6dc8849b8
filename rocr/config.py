"""The settings of an edit: frozen, and every one checked once."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rocr.concepts import check_text
from rocr.errors import InputError

MAX_SETTING = 1e30  # larger numbers overflow float32
HELD_WEIGHT = 0.03
LONG_LIST = 25
"""Concepts from which on what they cost others matters more than what is left of each."""
BY_COUNT = ("reach", "held_weight")
"""Settings that are chosen by the number of concepts where they are not given."""
Method = Literal["whitened", "projected"]
KeyTokens = Literal["last", "all"]
KeysPerConcept = Literal["mean", "all"]
Contexts = Literal["matched", "official"]
Reach = Literal["gradual", "whole"]
Measure = Literal["each", "once"]
CLOCK_DATE = "2024-07-26"
"""The day that a chat template is told it is: the one that Llama 3.1's own writes where it is given no other."""
MAX_CONTEXT = 10_000
"""Characters of a system message, or of a context in which names are read."""
_TAKEN = {
    "self", "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "sanitize_control_tokens", "tokenizer_kwargs", "strftime_now",
}  # fmt: skip


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
        check_text("A template", self.text, MAX_CONTEXT)
        if self.answer.strip():
            check_text("The answer of a template", self.answer, MAX_CONTEXT)

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
class ChatSettings:
    """What chat templates are given besides the user's message.

    Attributes:
        system: the system message; None: none is given, and a template that has one of its own writes it.
        variables: values of variables that the template names, such as {"enable_thinking": False}; JSON values.
        date: the day that templates are told it is, "YYYY-MM-DD", through `strftime_now` and `date_string`; None:
            `CLOCK_DATE`. It never is the day of the run, so that the same inputs give the same bytes on any day.
        enabled: whether the tokenizer's chat template is used at all; without it messages are read as they are.

    Raises:
        InputError: a value that no template can be given.
    """

    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    date: str | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.system is not None:
            check_text("The system message", self.system, MAX_CONTEXT)
        if not isinstance(self.variables, Mapping):
            raise InputError(f"The variables of a chat template must be an object, not {repr(self.variables)[:100]}.")
        object.__setattr__(self, "variables", dict(self.variables))
        for name, value in self.variables.items():
            _check_variable(name, value)
        if self.date is not None:
            _check_date(self.date)
        if not isinstance(self.enabled, bool):
            raise InputError(f"enabled must be true or false, not {repr(self.enabled)[:100]}.")
        if not self.enabled and (self.system is not None or self.variables or self.date is not None):
            raise InputError("Without the chat template, a system message, variables or a date have no effect.")

    def to_json(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as JSON values."""
        values = {"system": self.system, "variables": dict(self.variables) or None, "date": self.date}
        found = {name: value for name, value in values.items() if value is not None}
        return found if self.enabled else {**found, "enabled": False}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ChatSettings:
        """The inverse of `to_json`.

        Raises:
            InputError: an unknown field, or a value that no template can be given.
        """
        unknown = sorted(map(str, set(values) - {"system", "variables", "date", "enabled"}))
        if unknown:
            raise InputError(f"Unknown chat settings: {', '.join(unknown)[:100]}.")
        return cls(**values)

    def described(self) -> str:
        """The settings as the end of a sentence; empty where they are the defaults."""
        values = self.to_json()
        if "system" in values:
            values["system"] = f"sha256 {hashlib.sha256(values['system'].encode()).hexdigest()}"
        return "".join(f", {name} {value}" for name, value in values.items())


DEFAULT = ChatSettings()

DEFAULT_TEMPLATES = (
    Template("{}", chat=True),
    Template("Who is {}?", chat=True),
    Template("Tell me about {}.", chat=True),
    Template("Please answer the question about {}.", chat=True),
    Template("This text is about {}.", chat=False),
    Template("Question: What is known about {}?", chat=False),
)

OFFICIAL_TEMPLATES = tuple(
    Template(f"{opening} {{}}.", chat=True, answer="Answer:")
    for opening in (
        "",
        "Please answer the question about",
        "Choose the best answer about",
        "Write the answer about",
        "Tell me about",
        "Write something about",
    )
)


@dataclass(frozen=True)
class EditConfig:
    """How concepts are redirected. The notation is that of `rocr.ops.reference`.

    Attributes:
        layers: decoder layers to edit, in ascending order; None: chosen from the model's depth.
        method: the metric that protects ordinary keys: "whitened" (one Cholesky factorisation, as in ROME and
            MEMIT) or "projected" (the null space of the statistics, as in the ROCR paper).
        ridge: λ > 0: how much a small update is preferred to a complete one. It is in units of the mean squared
            length of ordinary keys under the metric, tr(C M), if `relative_ridge`, else in squared key units. 1
            closes about 0.8 of a residual; from 0.1 to 1 one concept is forgotten alike, while of 100 at once a
            small ridge makes others lose more (benches/search_defaults.py).
        relative_ridge: whether `ridge` is free of the model's scale.
        gamma: γ >= 0, for "whitened": the weight of ordinary keys against the identity. Where 100 concepts are
            redirected at once, ordinary text loses half as much with 10 as with 1 and other names lose less, given
            statistics of over 100,000 tokens; 30 is no better (benches/search_defaults.py).
        threshold: for "projected": eigenvalues of the second moment below it are free to use. It is in squared
            key units, as in the authors' code, unless `relative_threshold`.
        relative_threshold: whether `threshold` is in units of the mean eigenvalue, which has no scale.
        strength: how far the state at a name is sent, as a share of the way to its target: 1 is the target itself,
            above 1 lies beyond it.
        templates: contexts in which a concept is read; a plain string is a template without the chat format.
        key_tokens: which tokens of the name become keys: the "last", or "all", which forgets far more: a model gathers
            a name from all of its tokens (benches/search_defaults.py).
        keys_per_concept: "mean" over the templates, or "all" of them.
        contexts: "matched": target and current state are taken in the key's own template; "official": the
            target in the first template and the current state in the bare text "{name}.", as the authors do.
        reach: how far the tokens of a name are sent: all of them the "whole" way, or "gradual", token j of m √(j/m) of
            it, since other names begin alike; None: gradual for long lists (`LONG_LIST`), where others then lose a
            third as much, while of one concept it would leave more (benches/search_defaults.py).
        held_weight: s >= 0: what the templates' own tokens before a name, such as a chat's system prompt, weigh
            against ordinary ones: C + s mean(k kᵀ) takes the place of C. They stand before everything that a chat
            model reads, and ordinary text has none of them; None: 0.03 for long lists, else 0.
        measure: "each": keys and residuals are measured again after every layer's edit, as the authors do;
            "once": all before the first, with equal shares for the layers, so that concepts can be removed and
            added later exactly (`Edit.remove`), at the price of residuals that are closed less.
        seed: of everything that is drawn at random: the text that the model writes where no statistics are given.
        chat: what chat templates are given, wherever the edit renders one: in its contexts, and in text that the model
            writes for its own statistics.

    Raises:
        InputError: a value is out of its range.
    """

    layers: tuple[int, ...] | None = None
    method: Method = "whitened"
    ridge: float = 1.0
    relative_ridge: bool = True
    gamma: float = 10.0
    threshold: float = 0.02
    relative_threshold: bool = False
    strength: float = 1.0
    templates: tuple[Template, ...] = DEFAULT_TEMPLATES
    key_tokens: KeyTokens = "all"
    keys_per_concept: KeysPerConcept = "mean"
    contexts: Contexts = "matched"
    reach: Reach | None = None
    held_weight: float | None = None
    measure: Measure = "each"
    seed: int = 0
    chat: ChatSettings = DEFAULT

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "templates", _checked_templates(self.templates))
        _check_choice("method", self.method, get_args(Method))
        _check_choice("key_tokens", self.key_tokens, get_args(KeyTokens))
        _check_choice("keys_per_concept", self.keys_per_concept, get_args(KeysPerConcept))
        _check_choice("contexts", self.contexts, get_args(Contexts))
        if self.reach is not None:
            _check_choice("reach", self.reach, get_args(Reach))
        _check_choice("measure", self.measure, get_args(Measure))
        _check_number("ridge", self.ridge, 0.0, exclusive=True)
        _check_number("gamma", self.gamma, 0.0)
        if self.held_weight is not None:
            _check_number("held_weight", self.held_weight, 0.0)
        _check_number("threshold", self.threshold, 0.0, exclusive=True)
        _check_number("strength", self.strength, 0.0, exclusive=True)
        for name in ("relative_ridge", "relative_threshold"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {_shown(getattr(self, name))}.")
        if not isinstance(self.chat, ChatSettings):
            raise InputError(f"chat must be ChatSettings, not {_shown(self.chat)}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number from 0 to 2**63 - 1, not {_shown(self.seed)}.")

    @classmethod
    def official(cls, layers: tuple[int, ...] | None = None) -> EditConfig:
        """The authors' settings (Acruxos/ORT, train/rocr, rocr_hparams for Llama-3-8B)."""
        return cls(
            layers=layers,
            method="projected",
            ridge=1.0,
            relative_ridge=False,
            threshold=0.02,
            templates=OFFICIAL_TEMPLATES,
            key_tokens="last",
            keys_per_concept="mean",
            contexts="official",
            reach="whole",
            held_weight=0.0,
        )

    def left_to_the_count(self) -> list[str]:
        """Names of the settings that `for_concepts` chooses."""
        return [name for name in BY_COUNT if getattr(self, name) is None]

    def for_concepts(self, count: int) -> EditConfig:
        """The settings with what is chosen by the number of concepts."""
        long = count >= LONG_LIST
        return dataclasses.replace(
            self,
            reach=self.reach or ("gradual" if long else "whole"),
            held_weight=self.held_weight if self.held_weight is not None else HELD_WEIGHT * long,
        )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; without those of chats where they are the defaults."""
        values = dataclasses.asdict(self)
        del values["chat"]
        return values | ({"chat": self.chat.to_json()} if self.chat != DEFAULT else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EditConfig:
        """The inverse of `to_json`; settings that older files lack are as they were then.

        Raises:
            InputError: an unknown setting, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"The settings must be an object, not {_shown(values)}.")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"Unknown settings: {_shown(', '.join(unknown))}.")
        known: dict[str, Any] = {"reach": "whole", "held_weight": 0.0, **values}
        if isinstance(known.get("templates"), (list, tuple)):
            known["templates"] = tuple(
                Template.from_json(template) if isinstance(template, Mapping) else template
                for template in known["templates"]
            )
        if isinstance(known.get("chat"), Mapping):
            known["chat"] = ChatSettings.from_json(known["chat"])
        return cls(**known)


def _checked_layers(layers: Any) -> tuple[int, ...]:
    numbers = list(layers) if isinstance(layers, (list, tuple, range)) else None
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise InputError(f"layers must be a list of layer numbers, 0 or more, not {_shown(layers)}.")
    if len(set(numbers)) != len(numbers):
        raise InputError(f"layers names a layer twice: {_shown(numbers)}.")
    return tuple(sorted(numbers))


def _checked_templates(templates: Any) -> tuple[Template, ...]:
    if isinstance(templates, (str, Template)):
        templates = (templates,)
    if not isinstance(templates, (list, tuple)):
        raise InputError(f"templates must be a list, not {_shown(templates)}.")
    checked = tuple(Template(t) if isinstance(t, str) else t for t in templates)
    if not checked or not all(isinstance(template, Template) for template in checked):
        raise InputError("templates must hold at least one text with {} where the name goes.")
    return checked


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {_shown(value)}.")


def _check_number(name: str, value: object, least: float, exclusive: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_SETTING
    if not number or value < least or (exclusive and value == least):  # type: ignore[operator]
        bound = "above" if exclusive else "of at least"
        raise InputError(f"{name} must be a finite number {bound} {least:g}, not {_shown(value)}.")


def _shown(value: object) -> str:
    return repr(value)[:100]


def _check_variable(name: object, value: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
        raise InputError(f"{repr(name)[:100]} cannot be a variable of a chat template.")
    if not _is_plain(value):
        raise InputError(
            f"The value of the template variable {name!r} must be JSON of at most {MAX_CONTEXT:,} characters, in UTF-8."
        )


def _is_plain(value: Any) -> bool:
    """Whether a value is JSON, of bounded size, without halves of surrogate pairs."""
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
            f"The date {repr(value)[:100]} is not a day written YYYY-MM-DD, such as {CLOCK_DATE}."
        ) from None
