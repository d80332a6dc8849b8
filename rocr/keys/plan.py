"""Choose which tokens of which prompts become keys, and which states are their targets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rocr.concepts import Concept, Kind
from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.keys.prompts import Prompt, RenderedTemplate, build_prompts, render_template
from rocr.keys.variants import variants_of
from rocr.model.kind import LANGUAGE_MODEL, ModelKind

BARE_TEXT = RenderedTemplate(before="", after=".")


@dataclass(frozen=True)
class Reading:
    """Token positions where states are read, and the groups over which the states are averaged.

    Attributes:
        prompts: The texts to run.
        prompt_of: For each read token, the index of its prompt.
        position_of: For each read token, its position in the prompt.
        group_of: For each read token, the group whose mean it enters.
        groups: Number of groups.
    """

    prompts: list[Prompt]
    prompt_of: list[int]
    position_of: list[int]
    group_of: list[int]
    groups: int

    def read_tokens(self) -> Iterator[tuple[int, ...]]:
        """Yield, for each read token, the tokens of its prompt up to and including it."""
        for prompt, position in zip(self.prompt_of, self.position_of, strict=True):
            yield self.prompts[prompt].tokens[: position + 1]

    def check_positions(self, names: Sequence[str], positions: int | None) -> None:
        """Raise InputError unless every read token lies within the positions of a model.

        Args:
            names: For each group, the name that it belongs to.
            positions: Number of positions of the model (`rocr.model.architecture.positions_of`). None is no limit.
        """
        last = max(self.position_of, default=0)
        if positions is not None and last >= positions:
            name = names[self.group_of[self.position_of.index(last)]]
            raise InputError(
                f"{name!r} ends at token {last + 1} of a template, but the model has {positions} positions: shorten "
                "the name or the template."
            )


@dataclass(frozen=True)
class KeyPlan:
    """The readings of an edit. Each has one group for each key, except `template_keys`.

    Attributes:
        keys: Where the keys are read.
        current: Where the current states are read. None: at the same tokens as the keys.
        targets: Where the target states are read.
        concept_of: For each key, the index of its concept.
        distance_shares: For each key, the share of the distance to its target that it is moved.
        weights: For each key, its weight in the system.
        is_last: For each key, whether it is that of the last token of one of the concept's own names.
        is_variant: For each key, whether it is that of a variant.
        template_keys: Where the keys of the templates' own tokens before a name are read, one group for each token.
            They are protected like ordinary keys. None: the template weight is 0, or there are no such tokens.
        rendered: The templates as the model reads them.
    """

    keys: Reading
    current: Reading | None
    targets: Reading
    concept_of: list[int]
    distance_shares: list[float]
    weights: list[float]
    is_last: list[bool]
    is_variant: list[bool]
    template_keys: Reading | None
    rendered: tuple[RenderedTemplate, ...] = ()

    def check_positions(self, concepts: Sequence[Concept], positions: int | None) -> None:
        """Raise InputError unless all names and redirects fit into a model; see `Reading.check_positions`."""
        names = [concepts[concept].name for concept in self.concept_of]
        for reading in filter(None, (self.keys, self.current)):
            reading.check_positions(names, positions)
        self.targets.check_positions([concepts[concept].redirect for concept in self.concept_of], positions)

    def check_tokens_differ(self, concepts: Sequence[Concept]) -> None:
        """Raise InputError if a concept and its redirect have the same tokens.

        This happens, for example, if a tokenizer drops accents or case. The tokens are compared at the last token of
        each name; the error names the concepts for which no name differs.
        """
        starts, ends = (self.current or self.keys).read_tokens(), self.targets.read_tokens()
        differs = [False] * len(concepts)
        for group, start, end in zip(self.keys.group_of, starts, ends, strict=True):
            differs[self.concept_of[group]] |= self.is_last[group] and start != end
        alike = [concept for concept, different in zip(concepts, differs, strict=True) if not different]
        if alike:
            pairs = ", ".join(f"{each.name!r} and {each.redirect!r}" for each in alike[:5])
            raise InputError(
                f"The tokenizer gives a concept and its redirect the same tokens: {pairs}. The model cannot "
                "distinguish them; choose other redirects."
            )


@dataclass(frozen=True)
class _Named:
    """A name that is read: one of a concept's own, or a variant of one.

    Attributes:
        concept: Index of the concept.
        name: The name.
        weight: The weight of its keys.
        is_variant: Whether it is no name of the concept's own.
    """

    concept: int
    name: str
    weight: float = 1.0
    is_variant: bool = False


class _ReadingBuilder:
    """Builds a reading in which a prompt that is read at several positions occurs once."""

    def __init__(self) -> None:
        self._prompts: dict[Prompt, int] = {}
        self._prompt_of: list[int] = []
        self._position_of: list[int] = []
        self._group_of: list[int] = []

    def read(self, prompt: Prompt, position: int, group: int) -> None:
        self._prompt_of.append(self._prompts.setdefault(prompt, len(self._prompts)))
        self._position_of.append(position)
        self._group_of.append(group)

    def build(self, groups: int) -> Reading:
        return Reading(list(self._prompts), self._prompt_of, self._position_of, self._group_of, groups)


def plan_keys(
    tokenizer: Any,
    concepts: Sequence[Concept],
    config: EditConfig,
    kind: ModelKind = LANGUAGE_MODEL,
    *,
    base: Sequence[Concept] = (),
    kept: Collection[str] = (),
    positions: int | None = None,
) -> KeyPlan:
    """Choose the tokens that are read for each concept.

    Keys are averaged over the templates for each position, counted from the end of the name, since a tokenizer may
    split the beginning of a name differently in different texts. A template in which the redirect is a single token
    at the very start is skipped for that concept, since the state there is that of an attention sink.

    The result of a text encoder is the states of all tokens. There, each token of a name is moved to the token of the
    redirect at the same distance from its end, and the closing tokens, which have read the name too, are moved to
    those of the redirect's prompt.

    A variant is read from its last token on, in the first and the last template: before that token a model does not
    expect the rest of a misspelt name, so that the tokens would hardly be moved.

    Args:
        tokenizer: The tokenizer of the model.
        concepts: The concepts.
        config: The settings. Settings that depend on the number of concepts may be unset.
        kind: The kind of the model.
        base: Concepts that are unlearned already. No variant is one of their names, see `variants_of`.
        kept: Names that are to stay as they are; no variant is one of them.
        positions: Number of positions of the model; a variant that does not fit is left out. None is no limit.

    Raises:
        InputError: A name has no token that can be a key in any template, or its redirect has no state in a template
            where the name has a key; or the tokenizer or its chat template fails.
    """
    config = config.for_concepts(len(concepts))
    official = config.contexts == "official"
    keys, current, targets = _ReadingBuilder(), _ReadingBuilder(), _ReadingBuilder()
    groups: dict[tuple[int, ...], int] = {}
    concept_of: list[int] = []
    distance_shares: list[float] = []
    weights: list[float] = []
    is_last: list[bool] = []
    is_variant: list[bool] = []
    template_tokens: dict[tuple[int, ...], tuple[Prompt, int]] = {}
    named = list(_names_of(concepts, config, base, kept))
    names = [each.name for each in named]
    redirects = [concepts[each.concept].redirect for each in named]
    read: set[tuple[int, tuple[int, ...]]] = set()
    # A variant that ends with it would redirect every word that the tokenizer does not know.
    unknown_token: int | None = getattr(tokenizer, "unk_token_id", None)
    bare = build_prompts(tokenizer, BARE_TEXT, names, kind) if official else []
    rendered = [render_template(tokenizer, template, config.chat) for template in config.templates]
    written_for = _templates_of_names(tokenizer, rendered, [concepts[each.concept].kind for each in named], config)
    targets_of = [_prompts(tokenizer, templates, redirects, kind) for templates in written_for]
    first_target = [next((p[i] for p in targets_of if p[i].name), None) for i in range(len(names))]
    prompts_of = [_prompts(tokenizer, templates, names, kind) for templates in written_for]
    for t, prompts in enumerate(prompts_of):
        for first in dict(zip(reversed(written_for[t]), reversed(prompts), strict=True)).values():
            for position in range(1, first.shared):
                template_tokens.setdefault(first.tokens[: position + 1], (first, position))
        for i, prompt in enumerate(prompts):
            target = first_target[i] if official else targets_of[t][i]
            if target is None or not target.name or (named[i].is_variant and t not in (0, len(prompts_of) - 1)):
                continue
            ends = _key_positions(prompt, config, kind)
            for from_end, position in ends:
                place = (named[i].concept, prompt.tokens[: position + 1])
                fits = positions is None or position < positions
                unknown = prompt.tokens[position] == unknown_token
                if named[i].is_variant and (from_end > 0 or place in read or not fits or unknown):
                    continue
                read.add(place)
                group_key = (i, from_end) if config.keys_per_concept == "mean" else (i, from_end, t)
                if group_key not in groups:
                    groups[group_key] = len(groups)
                    concept_of.append(named[i].concept)
                    weights.append(named[i].weight)
                    is_last.append(from_end == 0 and not named[i].is_variant)
                    is_variant.append(named[i].is_variant)
                    distance_shares.append(_distance_share(from_end, len(prompt.words), config))
                group = groups[group_key]
                keys.read(prompt, position, group)
                targets.read(target, _target_position(target, from_end, config, kind), group)
                if official:
                    current.read(bare[i], _last_position(bare[i]), group)
    _check_every_name_has_a_key(concepts, named, prompts_of, first_target, {i for i, *_ in groups})
    count = len(groups)
    return KeyPlan(
        keys.build(count),
        current.build(count) if official else None,
        targets.build(count),
        concept_of,
        distance_shares,
        weights,
        is_last,
        is_variant,
        _read_each(template_tokens.values()) if template_tokens and config.template_weight else None,
        tuple(RenderedTemplate(template.before, template.after) for template in rendered),
    )


def plan_names(
    tokenizer: Any,
    names: Sequence[str],
    config: EditConfig,
    kind: ModelKind = LANGUAGE_MODEL,
    kinds: Sequence[Kind | None] | None = None,
) -> tuple[Reading, list[int]]:
    """Choose the tokens where the keys of names that are not redirected are read, as for concepts of some kinds.

    Returns:
        The reading, and for each of its groups the index of the name.

    Raises:
        InputError: A name has no token that can be a key in any template.
    """
    own_kinds = kinds or [None] * len(names)
    concepts = [Concept(name, name, (), own) for name, own in zip(names, own_kinds, strict=True)]
    plan = plan_keys(tokenizer, concepts, replace(config, variants="none"), kind)
    return plan.keys, plan.concept_of


def _names_of(
    concepts: Sequence[Concept], config: EditConfig, base: Sequence[Concept], kept: Collection[str]
) -> Iterator[_Named]:
    """Yield for each concept its names, then the variants of the settings."""
    variants = [[]] * len(concepts) if config.variants == "none" else variants_of(concepts, config.seed, base, kept)
    for concept, entry in enumerate(concepts):
        yield from (_Named(concept, name) for name in entry.names)
        yield from (_Named(concept, name, config.variant_weight, is_variant=True) for name in variants[concept])


def _templates_of_names(
    tokenizer: Any, rendered: Sequence[RenderedTemplate], kinds: Sequence[Kind | None], config: EditConfig
) -> list[list[RenderedTemplate]]:
    """Return for each template of the settings the one that each name is written in, given the kinds of the names.

    Args:
        tokenizer: The tokenizer of the model.
        rendered: The templates of the settings, for names of an unknown kind.
        kinds: The kind of each name.
        config: The settings.

    Raises:
        InputError: The tokenizer's chat template fails.
    """
    found = []
    for template, plain in zip(config.templates, rendered, strict=True):
        own = {kind: template.for_kind(kind) for kind in dict.fromkeys(kinds)}
        of_kind = {
            kind: plain if other == template else render_template(tokenizer, other, config.chat)
            for kind, other in own.items()
        }
        found.append([of_kind[kind] for kind in kinds])
    return found


def _prompts(
    tokenizer: Any, templates: Sequence[RenderedTemplate], names: Sequence[str], kind: ModelKind
) -> list[Prompt]:
    """Tokenise each name in its own template; raises as `build_prompts`."""
    found: dict[int, Prompt] = {}
    for template in dict.fromkeys(templates):
        places = [i for i, other in enumerate(templates) if other == template]
        prompts = build_prompts(tokenizer, template, [names[i] for i in places], kind)
        found.update(zip(places, prompts, strict=True))
    return [found[i] for i in range(len(names))]


def _key_positions(prompt: Prompt, config: EditConfig, kind: ModelKind) -> Iterator[tuple[int, int]]:
    """Yield the positions that become keys, in descending order for the name, each with its distance from the end.

    Closing tokens have negative distances, -1 for the last.
    """
    if not prompt.words:
        return
    positions = prompt.words[::-1]
    yield from enumerate(positions[:1] if config.key_tokens == "last" else positions)
    if not kind.writes_text and config.closing_keys and config.contexts == "matched":
        yield from ((-j, len(prompt.tokens) - j) for j in range(1, prompt.closing + 1))


def _target_position(target: Prompt, from_end: int, config: EditConfig, kind: ModelKind) -> int:
    """Return the position of the target of a key, given the key's distance from the end of the name."""
    if from_end < 0:
        return len(target.tokens) + from_end
    if kind.writes_text or config.contexts == "official":
        return target.name[-1]
    return target.words[-1 - min(from_end, len(target.words) - 1)]


def _distance_share(from_end: int, count: int, config: EditConfig) -> float:
    """Return the share of the distance for the token that is followed by `from_end` of a name's `count` tokens.

    A closing token, with a negative distance, is moved the full distance.
    """
    return 1.0 if from_end < 0 or config.token_schedule != "ramp" else ((count - from_end) / count) ** 0.5


def _read_each(places: Collection[tuple[Prompt, int]]) -> Reading:
    """Return a reading with one group for each prompt and position."""
    builder = _ReadingBuilder()
    for group, (prompt, position) in enumerate(places):
        builder.read(prompt, position, group)
    return builder.build(len(places))


def _last_position(prompt: Prompt) -> int:
    """Return the position of the last token of a name without a template.

    It is 0 for a name of a single token, as in the authors' code.
    """
    return prompt.name[-1] if prompt.name else 0


def _check_every_name_has_a_key(
    concepts: Sequence[Concept],
    named: Sequence[_Named],
    prompts_of: Sequence[Sequence[Prompt]],
    first_target: Sequence[Prompt | None],
    with_key: set[int],
) -> None:
    """Raise InputError for names without a key; it says whether the name, the redirect or both are the reason."""
    without = [i for i, each in enumerate(named) if i not in with_key and not each.is_variant]
    reasons = (
        ([named[i].name for i in without if not any(prompts[i].words for prompts in prompts_of)], "name", "be a key"),
        ([concepts[named[i].concept].redirect for i in without if first_target[i] is None], "redirect", "be a target"),
        ([named[i].name for i in without], "name or its redirect", "be read"),
    )
    for texts, what, use in reasons:
        if texts:
            raise InputError(
                f"{', '.join(map(repr, list(dict.fromkeys(texts))[:5]))}: the {what} is a single token at the very "
                f"start of every template; it is an attention sink there and cannot {use}. Use a template with text "
                "before the name."
            )
