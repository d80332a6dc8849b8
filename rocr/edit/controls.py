"""Choose controls: names that are not unlearned, but that an edit is likely to harm because they are near to a concept.

They come from the package's list of famous names and from the model, which completes the first word of each concept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product, zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import Concept, folded, for_kind
from rocr.config import Template
from rocr.edit.harm import QUESTION, mean_log_probabilities
from rocr.keys.continuations import log_probabilities
from rocr.keys.name_states import cosines, read_name_states
from rocr.model.architecture import Architecture
from rocr.model.chat import render_chats
from rocr.model.generate import Watch, continue_greedily, reporting
from rocr.model.tokenizer import calling_tokenizer, token_texts, tokenize, tokenize_prompt
from rocr.progress import Progress, ProgressCallback, silent

NAMES = Path(__file__).parents[1] / "data" / "names.txt"
STAGE = "proposed names"
PER_CONCEPT, MAX_CONTROLS = 4, 200
MAX_PLACED = 50
"""Largest number of concepts for which the model is asked for names, and whose nearest names are found."""
COMPARED = 100
"""Largest number of listed names of a kind that are compared with a concept if they share no word with any."""
PROPOSALS, LIKELIEST, FURTHER_TOKENS = 2, 20, 4
"""Number of names that the model proposes for a concept, of the next tokens that may begin one, and of the tokens that
it writes after one."""
KNOWS_NAMES = 0.8
"""Largest entropy of the token after a first name, as a share of that of a uniform choice, in a model with names."""
TAKEN = 0.5
"""A name is another spelling of a concept if the model begins its answer about it with the concept's name with at least
this probability."""
_BEGINNING, _CONTEXT = "Who is", Template("This text is about {}.")
_EMPTY_WORDS = {"the", "a", "an", "of", "and", "jr.", "sr.", "jr", "sr", "ii", "iii"}

Reason = Literal["first word", "last word", "proposed", "nearest"]


@dataclass(frozen=True)
class Control:
    """A name whose change by an edit is measured.

    Attributes:
        name: The name.
        concept: Name of the concept for which it was chosen.
        reason: What it has in common with the concept: its "first word", its "last word", the first word in a name
            that the model "proposed", or the "nearest" state of all names of its kind.
        kind: The kind of the name in the package's list, such as "person"; of a name that is not on it, that of the
            concept. None if neither is known.
        listed: Whether the name is on the list.
    """

    name: str
    concept: str
    reason: Reason
    kind: str | None = None
    listed: bool = True


def load_names() -> dict[str, str]:
    """Return the kind of each name of the package's list, in its order."""
    kinds, kind = {}, ""
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kind = line.strip("[]")
        elif line and not line.startswith("#"):
            kinds[line] = kind
    return kinds


def kept_names(retained: Iterable[str] | None) -> list[str]:
    """Return the names that no variant of a concept may be: those that the caller retains, and those of the list."""
    return [*(retained or ()), *load_names()]


def choose_controls(
    architecture: Architecture,
    tokenizer: Any,
    concepts: Sequence[Concept],
    layer: int,
    per_concept: int = PER_CONCEPT,
    most: int = MAX_CONTROLS,
    propose: bool = True,
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
    variants: Collection[str] = (),
) -> list[Control]:
    """Choose names that an edit of concepts is likely to harm.

    For each concept in turn these are a name with the same first word that the model proposes, another one of the list,
    one with the same last word, and one of the same kind. Of several, those of the concept's kind come first, then
    those whose state is nearest to the concept's. A concept has the kind of its name on the list, or else that of the
    nearest name there that is of `Concept.kind`. Of a list of more than 50 concepts, only 50 at equal distances are
    given proposals and nearest names. A proposal that the model takes for the concept, such as a misspelling, is left
    out, since it is to be forgotten too.

    Args:
        architecture: The model before the edit, with its kind.
        tokenizer: Its tokenizer.
        concepts: The concepts.
        layer: The decoder layer at whose output names are compared.
        per_concept: Largest number of names for a concept.
        most: Largest number of names in all.
        propose: Whether the model proposes names too, for which it writes some tokens.
        progress: Called after every batch.
        chat: Settings of the chat template, in which the model is asked whom it takes its proposals for.
        variants: Spellings of the concepts that the edit redirects too; a proposal that is one of them is left out.

    Returns:
        The names, those of all concepts in turn. None for a text encoder, or for a model whose predictions after
        the first words of the concepts are nearly uniform, since it has no names.

    Raises:
        InputError: The tokenizer or the model's own code fails.
    """
    if not architecture.kind.writes_text:
        return []
    step = max(1, math.ceil(len(concepts) / MAX_PLACED))
    placed = list(range(0, len(concepts), step))
    proposed: dict[int, list[str]] = {}
    if not architecture.is_partial:
        # Passes of the first words, of each token of the proposals, and of the questions about them.
        passes = FURTHER_TOKENS + 2 if propose else 1
        beginnings = _Beginnings.read(architecture, tokenizer, [_words(concepts[i].name)[0] for i in placed])
        if not beginnings.has_names:
            progress(Progress(STAGE, passes, passes, "passes"))
            return []
        if propose:
            progress(Progress(STAGE, 1, passes, "passes"))
            watch = reporting(progress, STAGE, passes, before=1)
            known = [name for concept in concepts for name in concept.names]
            redirected = set(map(folded, variants))
            proposed = dict(zip(placed, beginnings.names(architecture, tokenizer, known, watch), strict=True))
            taken = taken_for_concepts(architecture, tokenizer, proposed, concepts, chat)
            proposed = {
                i: [name for name in names if (i, name) not in taken and folded(name) not in redirected]
                for i, names in proposed.items()
            }
        progress(Progress(STAGE, passes, passes, "passes"))
    kinds = load_names()
    names_of_others = list(without_concepts(kinds, concepts))
    # A tokenizer without some letters gives no token for a name in them.
    listed = [name for name, ids in zip(names_of_others, tokenize(tokenizer, names_of_others), strict=True) if ids]
    first, last = _by_word(listed, 0), _by_word(listed, -1)
    sharing = {
        name
        for words in (_words(concepts[i].name) for i in placed)
        for name in (*first.get(words[0], []), *last.get(words[-1], []))
    }
    proposals = (name for names in proposed.values() for name in names)
    compared = {kind for kind in set(kinds.values()) if any(_may_have_kind(concepts[i], kind, kinds) for i in placed)}
    near_by = [name for name in listed if kinds[name] in compared or name in sharing]
    pool = [*_some_of_each_kind(near_by, kinds, sharing), *without_concepts(dict.fromkeys(proposals), concepts)]
    pool = list(dict.fromkeys(pool))
    names = [*pool, *(concepts[i].name for i in placed)]
    states = read_name_states(architecture, tokenizer, names, layer, [_CONTEXT], progress=progress)
    near = cosines(states, range(len(pool), len(names)))[:, : len(pool)]
    nearest = {i: _order(row) for i, row in zip(placed, near, strict=True)}
    chosen: list[list[Control]] = []
    in_pool = set(pool)
    for i, concept in enumerate(concepts):
        order = nearest.get(i)
        words = _words(concept.name)
        kind = kinds.get(concept.name)
        if kind is None:
            near_kinds = (kinds[pool[j]] for j in order or [] if pool[j] in kinds)
            kind = next((found for found in near_kinds if _may_have_kind(concept, found, kinds)), concept.kind)
        of_kind_first = partial(_of_kind_first, kinds=kinds, kind=kind)
        groups: dict[Reason, list[str]] = {
            "proposed": [name for name in proposed.get(i, []) if name in in_pool],
            "first word": of_kind_first(_sorted(first.get(words[0], []), pool, order)),
            "last word": of_kind_first(_sorted(last.get(words[-1], []), pool, order)) if len(words) > 1 else [],
            "nearest": [pool[j] for j in order or [] if kinds.get(pool[j]) == kind],
        }
        controls = (
            Control(name, concept.name, reason, kinds.get(name, kind), name in kinds)
            for names in zip_longest(*groups.values())
            for reason, name in zip(groups, names, strict=True)
            if name is not None
        )
        chosen.append(list(islice(_different(controls), per_concept)))
    in_turn = (control for controls in zip_longest(*chosen) for control in controls if control is not None)
    return list(islice(_different(in_turn), most))


def taken_for_concepts(
    architecture: Architecture,
    tokenizer: Any,
    proposed: Mapping[int, Sequence[str]],
    concepts: Sequence[Concept],
    chat: ChatSettings,
) -> set[tuple[int, str]]:
    """Return the proposals for which the model answers with a name of the concept, with the index of the concept."""
    places = [(i, name) for i, names in proposed.items() for name in names]
    questions = [for_kind(QUESTION, concepts[i].kind).format(name) for i, name in places]
    prompts, answers, asked = [], [], []
    for place, text in zip(places, render_chats(tokenizer, questions, chat), strict=True):
        prompt = tokenize_prompt(tokenizer, text)
        spaces = ("",) if text[-1:].isspace() else ("", " ")
        for own_name, space in product(concepts[place[0]].names, spaces):
            tokens = tokenize_prompt(tokenizer, f"{text}{space}{own_name}")
            if tokens[: len(prompt)] == prompt and len(tokens) > len(prompt):
                prompts.append(prompt)
                answers.append(tokens[len(prompt) :])
                asked.append(place)
    means = mean_log_probabilities(architecture, prompts, answers)
    least = math.log(TAKEN)
    return {place for place, answer, mean in zip(asked, answers, means, strict=True) if mean * len(answer) >= least}


@dataclass(frozen=True)
class _Beginnings:
    """First words of names, and how a model continues them.

    Attributes:
        words: The words, which may occur more than once.
        prompts: Token ids of a text that ends with each different word.
        following: For each different word (vocabulary,) log-probabilities of the next token.
    """

    words: list[str]
    prompts: dict[str, list[int]]
    following: dict[str, Tensor]

    @classmethod
    def read(cls, architecture: Architecture, tokenizer: Any, words: list[str]) -> _Beginnings:
        """Run the model on the words; raises as `choose_controls`."""
        prompts = {word: tokenize_prompt(tokenizer, f"{_BEGINNING} {word}") for word in words}
        rows = log_probabilities(architecture.reader, list(prompts.values()), [()] * len(prompts))
        return cls(words, prompts, {word: row[0] for word, row in zip(prompts, rows, strict=True)})

    @property
    def has_names(self) -> bool:
        """Whether the model expects some words after a first name more than others."""
        rows = torch.stack(list(self.following.values()))
        entropy = -(rows.exp() * rows).sum(dim=1).mean()
        return float(entropy) <= KNOWS_NAMES * math.log(rows.shape[1])

    def names(
        self, architecture: Architecture, tokenizer: Any, known: Sequence[str], watch: Watch | None = None
    ) -> list[list[str]]:
        """Let the model complete the words to names: its likeliest next tokens, each continued greedily.

        Args:
            architecture: The model.
            tokenizer: Its tokenizer.
            known: Names that are not wanted; a token that begins their second word is left out.
            watch: As for `continue_greedily`.

        Returns:
            The names for each word, the likeliest first.
        """
        text_of = token_texts(tokenizer)
        begun: list[tuple[str, int]] = []
        for word, row in self.following.items():
            tokens = (
                token
                for token in _beginning_words(row, text_of)
                if not any(name.startswith(word + text_of(token)) for name in known)
            )
            begun += ((word, token) for token in islice(tokens, PROPOSALS))
        found: dict[str, list[str]] = {word: [] for word in self.prompts}
        if begun:
            prompts = [[*self.prompts[word], token] for word, token in begun]
            written = continue_greedily(architecture.reader, tokenizer, prompts, FURTHER_TOKENS, True, watch)
            with calling_tokenizer(tokenizer):
                texts = [str(tokenizer.decode(more.tokens, skip_special_tokens=True)) for more in written]
            for (word, token), text in zip(begun, texts, strict=True):
                name = name_at_start(word + text_of(token) + text)
                if name is not None and name not in found[word]:
                    found[word].append(name)
        return [found[word] for word in self.words]


def _beginning_words(row: Tensor, text_of: Callable[[int], str]) -> Iterator[int]:
    """Yield the tokens that begin a capitalised word, of those with the largest values (vocabulary,) in a row."""
    for token in row.topk(min(LIKELIEST, len(row))).indices.tolist():
        text = text_of(token)
        if text[:1].isspace() and text.strip()[:1].isupper():
            yield token


def name_at_start(text: str) -> str | None:
    """Return the capitalised words, two to four, that a text begins with.

    None if there are fewer or more, or if the text ends with them, since the last word may be incomplete.
    """
    words: list[str] = []
    ended = False
    for word in text.split()[:5]:
        bare = word.rstrip(",.?!:;\"'")
        bare = bare.removesuffix("'s")
        if not bare[:1].isupper() or not all(character.isalpha() or character in "-.'" for character in bare):
            ended = True
            break
        words.append(bare)
        if bare != word:
            ended = True
            break
    return " ".join(words) if ended and 2 <= len(words) <= 4 and len(words[-1]) > 1 else None


def _words(name: str) -> list[str]:
    """Return the words of a name that tell something, or all if none does."""
    words = name.split()
    return [word for word in words if folded(word) not in _EMPTY_WORDS] or words


def without_concepts(names: Iterable[str], concepts: Sequence[Concept]) -> Iterator[str]:
    """Yield the names that are no name and no redirect of a concept, and that do not contain one's first and last word.

    A name with both words, such as one with a middle name, is taken for the concept itself.
    """
    known = {folded(name) for concept in concepts for name in (*concept.names, concept.redirect)}
    ends = {(folded(words[0]), folded(words[-1])) for concept in concepts for words in map(_words, concept.names)}
    for name in names:
        words = list(map(folded, _words(name)))
        inner = {(one, other) for j, one in enumerate(words) for other in words[j + 1 :]}
        if folded(name) not in known and not inner & ends:
            yield name


def _some_of_each_kind(names: Sequence[str], kinds: Mapping[str, str], always: Collection[str]) -> Iterator[str]:
    """Yield the names of `always`, and of the others at most COMPARED of each kind at equal distances."""
    of_kind: dict[str, list[str]] = {}
    for name in names:
        of_kind.setdefault(kinds[name], []).append(name)
    for group in of_kind.values():
        step = math.ceil(len(group) / COMPARED)
        yield from (name for i, name in enumerate(group) if i % step == 0 or name in always)


def _by_word(names: Iterable[str], place: int) -> dict[str, list[str]]:
    """Return the names of two words or more by their word at a place."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = _words(name)
        if len(words) > 1:
            found.setdefault(words[place], []).append(name)
    return found


def _order(row: Tensor) -> list[int]:
    """Return the indices of the values of a row, the largest first."""
    found: list[int] = row.argsort(descending=True, stable=True).tolist()
    return found


def _sorted(names: Collection[str], pool: Sequence[str], order: Sequence[int] | None) -> list[str]:
    """Return names of the pool in its order by similarity; as they are without one."""
    wanted = set(names)
    return list(names) if order is None else [pool[j] for j in order if pool[j] in wanted]


def _may_have_kind(concept: Concept, kind: str, kinds: Mapping[str, str]) -> bool:
    """Return whether a concept may have a kind of the list, such as "company".

    A name that is on the list has its kind there, and another one any that fits `Concept.kind`.
    """
    if concept.name in kinds:
        return kinds[concept.name] == kind
    return concept.kind is None or (kind == "person") == (concept.kind == "person")


def _of_kind_first(names: Sequence[str], kinds: Mapping[str, str], kind: str | None) -> list[str]:
    """Return the names of a kind, then the others, each in their order."""
    return sorted(names, key=lambda name: kinds.get(name) != kind)


def _different(controls: Iterable[Control]) -> Iterator[Control]:
    """Yield the first control of each name."""
    seen = set()
    for control in controls:
        if folded(control.name) not in seen:
            seen.add(folded(control.name))
            yield control
