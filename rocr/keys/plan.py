"""Which tokens of which prompts become keys, and which states they are to be sent to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.keys.prompts import Prompt, RenderedTemplate, build_prompts, render_template

BARE_TEXT = RenderedTemplate(before="", after=".")


@dataclass(frozen=True)
class Reading:
    """Token positions to read states at, and how the states are averaged.

    Attributes:
        prompts: the texts to run.
        prompt_of: for each read token, the index of its prompt.
        position_of: for each read token, its position there.
        group_of: for each read token, the group whose mean it enters.
        groups: number of groups.
    """

    prompts: list[Prompt]
    prompt_of: list[int]
    position_of: list[int]
    group_of: list[int]
    groups: int

    def read_tokens(self) -> Iterator[tuple[int, ...]]:
        """For each read token all that a model has read there: the tokens of its prompt up to it."""
        for prompt, position in zip(self.prompt_of, self.position_of, strict=True):
            yield self.prompts[prompt].tokens[: position + 1]

    def check_positions(self, names: Sequence[str], positions: int | None) -> None:
        """Refuse prompts that are longer, up to the last token that is read, than a model has positions for.

        Args:
            names: for each group, the name it belongs to.
            positions: how many the model has (`rocr.model.architecture.positions_of`); None: no such limit.

        Raises:
            InputError: a name does not fit.
        """
        last = max(self.position_of, default=0)
        if positions is not None and last >= positions:
            name = names[self.group_of[self.position_of.index(last)]]
            raise InputError(
                f"{name!r} ends at token {last + 1} of a template, and the model has {positions} positions: shorten "
                "the name or the template."
            )


@dataclass(frozen=True)
class KeyPlan:
    """The readings of an edit; each has one group per key, but for `held`.

    Attributes:
        keys: where the keys are read.
        current: where the current states are read; None: where the keys are.
        targets: where the states to reach are read.
        concept_of: for each key, the index of its concept.
        reach: for each key, the share of the way to its target that it is sent.
        held: the templates' own tokens before a name, once each, which nothing should happen to; None: none is held.
        rendered: the templates as the model reads them.
    """

    keys: Reading
    current: Reading | None
    targets: Reading
    concept_of: list[int]
    reach: list[float]
    held: Reading | None
    rendered: tuple[RenderedTemplate, ...] = ()

    def check_positions(self, concepts: Sequence[Concept], positions: int | None) -> None:
        """Refuse names and redirects that do not fit into a model's positions; see `Reading.check_positions`."""
        names = [concepts[concept].name for concept in self.concept_of]
        for reading in filter(None, (self.keys, self.current)):
            reading.check_positions(names, positions)
        self.targets.check_positions([concepts[concept].redirect for concept in self.concept_of], positions)

    def check_ways(self, concepts: Sequence[Concept]) -> None:
        """Refuse redirects that a model reads as it reads the name, as where a tokenizer drops accents or cases.

        Raises:
            InputError: no name of a concept has a way to its redirect at its last token; names the concepts.
        """
        starts, ends = (self.current or self.keys).read_tokens(), self.targets.read_tokens()
        has_way = [False] * len(concepts)
        for j, (start, end) in enumerate(zip(starts, ends, strict=True)):
            is_last = self.keys.position_of[j] == self.keys.prompts[self.keys.prompt_of[j]].words[-1]
            has_way[self.concept_of[self.keys.group_of[j]]] |= is_last and start != end
        alike = [concept for concept, has in zip(concepts, has_way, strict=True) if not has]
        if alike:
            pairs = ", ".join(f"{each.name!r} and {each.redirect!r}" for each in alike[:5])
            raise InputError(
                f"The tokenizer gives a concept and its redirect the same tokens: {pairs}. A model cannot tell them "
                "apart; choose other redirects."
            )


class _ReadingBuilder:
    """Collects a reading; a prompt that is read in several places runs once."""

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


def plan_keys(tokenizer: Any, concepts: Sequence[Concept], config: EditConfig) -> KeyPlan:
    """Decide what is read for each concept, by the configuration's templates and choices.

    Keys are averaged over templates position by position, counted from the end of the name, since a tokenizer
    may split the beginning of a name differently from text to text. A template in which the redirect is a single
    token at the very start is left out for that concept: its state there is that of an attention sink.

    Raises:
        InputError: a name has no token that can be a key in any template, or its redirect no state in those where it
            has one; or tokenizer or chat template fail.
    """
    config = config.for_concepts(len(concepts))
    official = config.contexts == "official"
    keys, current, targets = _ReadingBuilder(), _ReadingBuilder(), _ReadingBuilder()
    groups: dict[tuple[int, ...], int] = {}
    concept_of: list[int] = []
    reach: list[float] = []
    held: dict[tuple[int, ...], tuple[Prompt, int]] = {}
    named = [(concept, name) for concept, entry in enumerate(concepts) for name in entry.names]
    names = [name for _, name in named]
    redirects = [concepts[concept].redirect for concept, _ in named]
    bare = build_prompts(tokenizer, BARE_TEXT, names) if official else []
    rendered = [render_template(tokenizer, template, config.chat) for template in config.templates]
    targets_of = [build_prompts(tokenizer, template, redirects) for template in rendered]
    first_target = [next((p[i] for p in targets_of if p[i].name), None) for i in range(len(names))]
    prompts_of = [build_prompts(tokenizer, template, names) for template in rendered]
    for t, prompts in enumerate(prompts_of):
        for position in range(1, prompts[0].shared):
            held.setdefault(prompts[0].tokens[: position + 1], (prompts[0], position))
        for i, prompt in enumerate(prompts):
            target = first_target[i] if official else targets_of[t][i]
            if target is None or not target.name:
                continue
            for from_end, position in enumerate(_key_positions(prompt, config)):
                group_key = (i, from_end) if config.keys_per_concept == "mean" else (i, from_end, t)
                if group_key not in groups:
                    groups[group_key] = len(groups)
                    concept_of.append(named[i][0])
                    reach.append(_reach(from_end, len(prompt.words), config))
                group = groups[group_key]
                keys.read(prompt, position, group)
                targets.read(target, target.name[-1], group)
                if official:
                    current.read(bare[i], _last_position(bare[i]), group)
    _check_every_name_has_a_key(concepts, named, prompts_of, first_target, {i for i, *_ in groups})
    count = len(groups)
    return KeyPlan(
        keys.build(count),
        current.build(count) if official else None,
        targets.build(count),
        concept_of,
        reach,
        _read_each(held.values()) if held and config.held_weight else None,
        tuple(RenderedTemplate(template.before, template.after) for template in rendered),
    )


def plan_names(tokenizer: Any, names: Sequence[str], config: EditConfig) -> tuple[Reading, list[int]]:
    """Where the keys of names that are not redirected are read, each at the tokens and templates of a concept's.

    Returns:
        The reading, and for each of its groups the index of the name.

    Raises:
        InputError: a name has no token that can be a key in any template.
    """
    plan = plan_keys(tokenizer, [Concept(name, name) for name in names], config)
    return plan.keys, plan.concept_of


def _key_positions(prompt: Prompt, config: EditConfig) -> tuple[int, ...]:
    """Positions that become keys, the last one first."""
    positions = prompt.words[::-1]
    return positions[:1] if config.key_tokens == "last" else positions


def _reach(from_end: int, count: int, config: EditConfig) -> float:
    """How far the token goes that has `from_end` of a name's `count` tokens behind it."""
    return 1.0 if config.reach == "whole" else ((count - from_end) / count) ** 0.5


def _read_each(places: Collection[tuple[Prompt, int]]) -> Reading:
    """A reading with a group for every prompt and position."""
    builder = _ReadingBuilder()
    for group, (prompt, position) in enumerate(places):
        builder.read(prompt, position, group)
    return builder.build(len(places))


def _last_position(prompt: Prompt) -> int:
    """Position of a bare name's last token: 0 where it is the only one, as the authors read it."""
    return prompt.name[-1] if prompt.name else 0


def _check_every_name_has_a_key(
    concepts: Sequence[Concept],
    named: Sequence[tuple[int, str]],
    prompts_of: Sequence[Sequence[Prompt]],
    first_target: Sequence[Prompt | None],
    with_key: set[int],
) -> None:
    """Refuse names that are read nowhere, and say whether the name, its redirect or both together are the reason."""
    without = [i for i in range(len(named)) if i not in with_key]
    reasons = (
        ([named[i][1] for i in without if not any(prompts[i].words for prompts in prompts_of)], "name", "be a key"),
        ([concepts[named[i][0]].redirect for i in without if first_target[i] is None], "redirect", "be a target"),
        ([named[i][1] for i in without], "name or its redirect", "be read"),
    )
    for texts, what, use in reasons:
        if texts:
            raise InputError(
                f"{', '.join(map(repr, list(dict.fromkeys(texts))[:5]))}: the {what} is a single token at the very "
                f"start of every template, where it is an attention sink and cannot {use}; use a template with text "
                "before the name."
            )
