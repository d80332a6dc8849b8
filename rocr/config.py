"""The settings of an edit: immutable dataclasses that check every value when they are built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rocr.chat_settings import DEFAULT, MAX_CONTEXT, ChatSettings
from rocr.concepts import Kind, check_text, for_kind
from rocr.deprecation import Renamed, renamed_fields, with_new_names
from rocr.errors import InputError

MAX_SETTING = 1e30  # larger numbers overflow float32
LONG_LIST_TEMPLATE_WEIGHT = 0.03
LONG_LIST = 25
"""Lists of at least this many concepts use settings that favour specificity."""
BY_COUNT = ("token_schedule", "template_weight", "variants")
"""Settings whose default depends on the number of concepts."""
OFFICIAL_LAYERS: Literal["official"] = "official"
"""Value of `EditConfig.layers`: the layers that the authors edit, scaled to the depth of the model."""
Method = Literal["whitened", "projected"]
KeyTokens = Literal["last", "all"]
KeysPerConcept = Literal["mean", "all"]
Contexts = Literal["matched", "official"]
TokenSchedule = Literal["full", "ramp", "predicted"]
Variants = Literal["none", "spelling", "all"]
Measure = Literal["each", "once"]
RENAMED = {
    "reach": Renamed("token_schedule", {"whole": "full", "gradual": "ramp"}),
    "held_weight": Renamed("template_weight"),
}
"""Settings that had another name in rocr 0.1, by that name."""


def new_setting_name(name: Any) -> Any:
    """Return the name of a setting for its name in a file of any version."""
    return RENAMED[name].name if isinstance(name, str) and name in RENAMED else name


def with_new_setting_names(settings: Any) -> Any:
    """Return settings of a file of any version under their new names; anything but a mapping as it is."""
    return with_new_names(settings, RENAMED) if isinstance(settings, Mapping) else settings


@dataclass(frozen=True)
class Template:
    """A context in which a name is read.

    Attributes:
        text: The context, with `{}` exactly once in the place of the name.
        chat: Whether the text is a user's message that is rendered with the tokenizer's chat template. A tokenizer
            without a chat template uses the text as it is.
        answer: Text that follows the chat template's opening of the answer.

    Raises:
        InputError: The text does not contain `{}` exactly once, a field has another type, or a text is empty, is
            longer than 10,000 characters or is not valid UTF-8.
    """

    text: str
    chat: bool = False
    answer: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or self.text.count("{}") != 1:
            raise InputError(
                f"A template must contain {{}} exactly once, in the place of the name, but is {repr(self.text)[:100]}."
            )
        if not isinstance(self.chat, bool) or not isinstance(self.answer, str):
            raise InputError(f"The template {self.text[:100]!r} must have true or false as chat and a text as answer.")
        check_text("A template", self.text, MAX_CONTEXT)
        if self.answer.strip():
            check_text("The answer of a template", self.answer, MAX_CONTEXT)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Template:
        """Return the template of a JSON object, the inverse of `dataclasses.asdict`.

        Raises:
            InputError: An unknown field, no text, or a value that is not valid.
        """
        unknown = sorted(set(values) - {"text", "chat", "answer"})
        if unknown:
            raise InputError(f"Unknown fields of a template: {', '.join(unknown)[:100]}.")
        if "text" not in values:
            raise InputError("A template has no text.")
        return cls(**values)

    def for_kind(self, kind: Kind | None) -> Template:
        """Return the template for names of some kind; see `rocr.concepts.for_kind`."""
        return dataclasses.replace(self, text=for_kind(self.text, kind))


DEFAULT_TEMPLATES = (
    Template("{}", chat=True),
    Template("Who is {}?", chat=True),
    Template("Tell me about {}.", chat=True),
    Template("Please answer the question about {}.", chat=True),
    Template("This text is about {}.", chat=False),
    Template("Question: What is known about {}?", chat=False),
)

IMAGE_TEMPLATES = tuple(
    Template(text)
    for text in (
        "a painting by {}",
        "a photo of {}",
        "a picture in the style of {}",
        "a portrait of {}, highly detailed",
        "an artwork of {} on a white background",
    )
)
"""Contexts of prompts for image generators, for the text encoder of one."""

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


@renamed_fields(RENAMED)
@dataclass(frozen=True)
class EditConfig:
    """How concepts are redirected.

    The symbols are those of `rocr.unlearn`: keys K, metric M, second moment C, ridge λ.

    Attributes:
        layers: Decoder layers to edit; stored in ascending order. None chooses two layers by the depth of the model.
            "official" chooses the authors' layers, 4 to 6 of 32, scaled to the depth of the model.
        method: The metric that protects ordinary keys. "whitened" is M = (γ C / mean(diag C) + I)⁻¹, as in ROME and
            MEMIT. "projected" is the projector on the eigenvectors of C below `threshold`, as in the ROCR paper.
        ridge: λ > 0, the weight of a small update against a complete one. The unit is the mean squared length of
            ordinary keys under the metric, tr(C M), if `relative_ridge`; otherwise it is that of a squared key. A ridge
            of 1 closes about 0.8 of a residual. From 0.1 to 1 a single concept is forgotten equally; with 100 concepts
            at once, a small ridge harms other subjects more (benches/search_defaults.py).
        relative_ridge: Whether `ridge` is relative to the length of ordinary keys.
        gamma: γ >= 0, for "whitened": the weight of ordinary keys against the identity. With 100 concepts at once,
            ordinary text loses half as much with 10 as with 1, and other names lose less, for statistics of over
            100,000 tokens; 30 is no better (benches/search_defaults.py).
        threshold: For "projected": eigenvectors of C with an eigenvalue below it are free for the update. The unit
            is that of a squared key, as in the authors' code, unless `relative_threshold`.
        relative_threshold: Whether `threshold` is relative to the mean eigenvalue of C.
        least_closed: 0 <= c < 1: the share of its residual that the last token of a name closes at least, whatever the
            ridge, as far as no other key opposes it: the weight of its row is raised, at most twentyfold
            (`rocr.solve.row_weights`). A ridge of 1 alone closes 0.6 to 0.8 at names that ordinary text contains often,
            mostly names of one token. 0 leaves all rows as they are.
        strength: How far the state at a name is moved, as a share of the distance to its target. 1 is the target;
            larger values go beyond it.
        templates: Contexts in which a concept is read. A plain string is a template without the chat format. Those
            that ask "Who is {}?" ask "What is {}?" about a concept of the kind "thing".
        key_tokens: Which tokens of a name become keys: the "last" one, or "all". "all" forgets far more, since a
            model collects a name from all of its tokens (benches/search_defaults.py).
        keys_per_concept: "mean" averages the keys over the templates; "all" keeps one for each template.
        contexts: Where target and current state are read. "matched" reads both in the template of the key.
            "official" reads the target in the first template and the current state in the text "{name}.", as the
            authors do.
        token_schedule: How far each token of a name is moved towards its target, as a share of the distance. Names that
            begin alike share the keys of their first tokens. "predicted" moves each token by √(2p), at most by the
            full distance, where p is the probability that the model itself gives to the rest of the name after it
            (`rocr.keys.predicted`), and a beginning that stands for the whole name the full distance
            (`rocr.edit.short_names`).
            "full" moves all tokens the full distance. "ramp" moves token j of m by √(j/m) of it. None is "predicted"
            if the model predicts text and all of it is loaded; otherwise "ramp" for lists of 25 concepts or more and
            "full" for shorter lists.
        template_weight: s >= 0, the weight of the tokens of the templates before a name, such as a chat's system
            prompt: C + s mean(k kᵀ) over their keys k takes the place of C. They precede everything that a chat model
            reads, and ordinary text does not contain them. None is 0.03 for lists of 25 concepts or more, and 0 for
            shorter ones.
        retain_weight: w >= 0, the weight of the keys of retained names (the controls, or the names that the caller
            gives) against the keys of the concepts: the system also has the rows √w k with a residual of 0, so that the
            update keeps the outputs there. Tokens that such a name shares with a concept are left out. 0 only measures
            the names.
        variants: Further names of a concept that become keys without being listed. "spelling" adds misspellings in
            one letter, which `seed` draws, initials, and the name without hyphens and diacritics
            (`rocr.keys.variants`). Tokens that they share with the names of the concept are read once. "all" also has
            the model propose aliases, which become names of the concept (`rocr.propose_aliases`). None is "spelling"
            for lists of fewer than 25 concepts if all tokens of a name are keys, and otherwise "none"; in a text
            encoder always "none".
        variant_weight: w > 0, the weight of a key of a variant against that of a name: its row in the system and its
            residual are multiplied by √w.
        measure: "each" reads keys and residuals again after the edit of every layer, as the authors do. "once" reads
            all of them before the first edit and gives every layer an equal share. Concepts can then be removed and
            added later exactly (`Edit.remove`, `Edit.add`), but residuals are closed less.
        seed: Seed of all random choices: of the text that the model writes if there are no statistics.
        chat: Inputs of the chat template, both for the templates and for text that the model writes for its own
            statistics.
        keep_zeros: Whether elements of an edited weight that are exactly zero stay zero, as sparse models need it: each
            row of the update is then solved on its own support (`rocr.solve.support`). None keeps them in layers where
            more than 20% of the weight are zero.
        closing_keys: Whether the tokens that a tokenizer puts after a text, such as EOS, become keys too in a text
            encoder: they have read the name, and an image generator reads their states. Language models have no such
            keys.

    The names of rocr 0.1 are accepted with a DeprecationWarning: `reach` ("whole", "gradual") for `token_schedule`
    ("full", "ramp"), and `held_weight` for `template_weight`.

    Raises:
        InputError: A value is of another type or out of its range.

    Source:
        Ye, Zhang and Wu, arXiv 2506.07795; the authors' code is Acruxos/ORT, train/rocr.
    """

    layers: tuple[int, ...] | Literal["official"] | None = None
    method: Method = "whitened"
    ridge: float = 1.0
    relative_ridge: bool = True
    gamma: float = 10.0
    threshold: float = 0.02
    relative_threshold: bool = False
    least_closed: float = 0.95
    strength: float = 1.0
    templates: tuple[Template, ...] = DEFAULT_TEMPLATES
    key_tokens: KeyTokens = "all"
    keys_per_concept: KeysPerConcept = "mean"
    contexts: Contexts = "matched"
    token_schedule: TokenSchedule | None = None
    template_weight: float | None = None
    retain_weight: float = 1.0
    variants: Variants | None = None
    variant_weight: float = 0.3
    measure: Measure = "each"
    seed: int = 0
    chat: ChatSettings = DEFAULT
    closing_keys: bool = True
    keep_zeros: bool | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers != OFFICIAL_LAYERS:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "templates", _checked_templates(self.templates))
        _check_choice("method", self.method, get_args(Method))
        _check_choice("key_tokens", self.key_tokens, get_args(KeyTokens))
        _check_choice("keys_per_concept", self.keys_per_concept, get_args(KeysPerConcept))
        _check_choice("contexts", self.contexts, get_args(Contexts))
        if self.token_schedule is not None:
            _check_choice("token_schedule", self.token_schedule, get_args(TokenSchedule))
        if self.variants is not None:
            _check_choice("variants", self.variants, get_args(Variants))
        _check_number("variant_weight", self.variant_weight, 0.0, exclusive=True)
        _check_choice("measure", self.measure, get_args(Measure))
        _check_number("ridge", self.ridge, 0.0, exclusive=True)
        _check_number("gamma", self.gamma, 0.0)
        if self.template_weight is not None:
            _check_number("template_weight", self.template_weight, 0.0)
        _check_number("retain_weight", self.retain_weight, 0.0)
        _check_number("threshold", self.threshold, 0.0, exclusive=True)
        _check_number("strength", self.strength, 0.0, exclusive=True)
        _check_number("least_closed", self.least_closed, 0.0)
        if self.least_closed >= 1:
            raise InputError(f"least_closed must be below 1, not {_shown(self.least_closed)}.")
        if self.keep_zeros is not None and not isinstance(self.keep_zeros, bool):
            raise InputError(f"keep_zeros must be true, false or none, not {_shown(self.keep_zeros)}.")
        for name in ("relative_ridge", "relative_threshold", "closing_keys"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {_shown(getattr(self, name))}.")
        if not isinstance(self.chat, ChatSettings):
            raise InputError(f"chat must be ChatSettings, not {_shown(self.chat)}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number from 0 to 2**63 - 1, not {_shown(self.seed)}.")

    @classmethod
    def official(cls, layers: tuple[int, ...] | None = None) -> EditConfig:
        """Return the authors' settings.

        Args:
            layers: Decoder layers to edit. None is "official", the authors' layers scaled to the depth of the model.

        Raises:
            InputError: The layers are not a list of layer numbers.

        Source:
            Acruxos/ORT, train/rocr, rocr_hparams for Llama-3-8B.
        """
        return cls(
            layers=OFFICIAL_LAYERS if layers is None else layers,
            method="projected",
            ridge=1.0,
            relative_ridge=False,
            threshold=0.02,
            templates=OFFICIAL_TEMPLATES,
            key_tokens="last",
            keys_per_concept="mean",
            contexts="official",
            token_schedule="full",
            template_weight=0.0,
            retain_weight=0.0,
            least_closed=0.0,
            variants="none",
        )

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The decoder layers to edit, ascending; empty if they are still to be chosen by the depth of a model."""
        return self.layers if isinstance(self.layers, tuple) else ()

    def unset_by_count(self) -> list[str]:
        """Return the names of the settings that `for_concepts` chooses."""
        return [name for name in BY_COUNT if getattr(self, name) is None]

    def for_concepts(self, count: int) -> EditConfig:
        """Return the settings with a value for every setting that depends on the number of concepts."""
        is_long = count >= LONG_LIST
        default_weight = LONG_LIST_TEMPLATE_WEIGHT if is_long else 0.0
        return dataclasses.replace(
            self,
            token_schedule=self.token_schedule or ("ramp" if is_long else "full"),
            template_weight=default_weight if self.template_weight is None else self.template_weight,
            variants=self.variants or ("none" if is_long or self.key_tokens == "last" else "spelling"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, without those that older files lack if they have the value from then."""
        values = dataclasses.asdict(self)
        del values["chat"]
        for name in ("retain_weight", "least_closed"):
            if not values[name]:
                del values[name]
        if self.variants == "none":
            del values["variants"], values["variant_weight"]
        if self.closing_keys:
            del values["closing_keys"]
        if self.keep_zeros is None:
            del values["keep_zeros"]
        return values | ({"chat": self.chat.to_json()} if self.chat != DEFAULT else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EditConfig:
        """Return the settings of a JSON object, the inverse of `to_json`.

        Old names of settings are accepted with a DeprecationWarning. Files without `token_schedule`,
        `template_weight`, `retain_weight` or `least_closed` get the values that were fixed when they were written:
        "full" and 0.

        Raises:
            InputError: An unknown setting, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"The settings must be an object, not {_shown(values)}.")
        values = with_new_names(values, RENAMED, "setting {!r} of an edit")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"Unknown settings: {_shown(', '.join(unknown))}.")
        weights = {"template_weight": 0.0, "retain_weight": 0.0, "least_closed": 0.0}
        known: dict[str, Any] = {"token_schedule": "full", "variants": "none", **weights, **values}
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
        raise InputError(f"layers must be 'official' or a list of layer numbers, 0 or more, not {_shown(layers)}.")
    if len(set(numbers)) != len(numbers):
        raise InputError(f"layers contains a layer twice: {_shown(numbers)}.")
    return tuple(sorted(numbers))


def _checked_templates(templates: Any) -> tuple[Template, ...]:
    if isinstance(templates, (str, Template)):
        templates = (templates,)
    if not isinstance(templates, (list, tuple)):
        raise InputError(f"templates must be a list, not {_shown(templates)}.")
    checked = tuple(Template(t) if isinstance(t, str) else t for t in templates)
    if not checked or not all(isinstance(template, Template) for template in checked):
        raise InputError("templates must contain at least one text, with {} in the place of the name.")
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
