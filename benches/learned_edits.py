"""Unlearn people from a model that learned facts about them, and ask it about them and about others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from learned_facts import HELD_OUT, VALUES, Person, Question, ordinary_text, questions, redirect_of
from learned_kinds import Kind
from learned_rank_one import one_after_another
from learned_training import Learned, next_logits
from torch import Tensor, nn

import rocr
from rocr.model.architecture import find_architecture

CHANCE = 1 / len(VALUES["city"].split())
"""Share of right answers of a model that knows nothing: every attribute has equally many values."""
COUNTS = (1, 10, 40)
ALONE = 5
"""Number of people who are unlearned alone; their row is the mean."""
TEXTS = 3000
BATCH = 300
"""Number of questions of a pass: more do not fit the processor's caches."""
FORCED = rocr.Guards(force=True)
"""In models this small, the updates of many people are larger than their weights, which the guards refuse."""
Revert = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """What an edit did, as shares of right answers to held-out questions, before and after.

    Attributes:
        method: The method.
        people: Number of people who are unlearned together.
        forget: About these people.
        sharing: About others who share a first name or a last name with them.
        others: About everybody else together, these included.
    """

    method: str
    people: int
    forget: tuple[float, float]
    sharing: tuple[float, float]
    others: tuple[float, float]


def decrease(before: float, after: float) -> float:
    """Return the share of what was known above chance that is gone; an answer worse than chance counts as chance."""
    return (before - max(after, CHANCE)) / (before - CHANCE)


@dataclass
class Subject:
    """A model that learned facts, with the statistics of text about other people, and its answers before any edit."""

    learned: Learned
    kind: Kind
    statistics: rocr.Statistics
    asked: list[Question]
    before: Tensor

    @classmethod
    def of(cls, learned: Learned, kind: Kind, unlearned: int = max(COUNTS)) -> Subject:
        """Collect statistics from text about all but the first people, who are unlearned, and ask about everybody."""
        texts = list(ordinary_text(learned.people[unlearned:], TEXTS, seed=1))
        options = rocr.CollectOptions(length=64)
        statistics = rocr.collect_statistics(learned.model, learned.tokenizer, texts, kind.layers, options)
        asked = questions(learned.people, HELD_OUT)
        return cls(learned, kind, statistics, asked, right_answers(learned, asked))

    def edit(self, method: str, people: Sequence[Person]) -> Row:
        """Unlearn people together, ask about everybody, and undo it."""
        redirects = [redirect_of(person, self.learned.redirects).name for person in people]
        concepts = [rocr.Concept(person.name, name) for person, name in zip(people, redirects, strict=True)]
        revert = METHODS[method](self, concepts)
        after = right_answers(self.learned, self.asked)
        revert()
        return self.row(method, people, after)

    def row(self, method: str, people: Sequence[Person], after: Tensor) -> Row:
        """Return the means over the questions about people, about those who share a name, and about all others."""
        names = {person.name for person in people}
        words = {word for name in names for word in (("first", name.split()[0]), ("last", name.split()[-1]))}
        asked = [question.person.name for question in self.asked]
        forget = torch.tensor([name in names for name in asked])
        shares = [("first", name.split()[0]) in words or ("last", name.split()[-1]) in words for name in asked]
        parts = (forget, torch.tensor(shares) & ~forget, ~forget)
        means = [(_mean(self.before[part]), _mean(after[part])) for part in parts]
        return Row(method, len(people), *means)

    def limit(self, people: Sequence[Person]) -> Row:
        """Put the redirect's state in the place of each person's, at the last token of the name, without any edit.

        This is what an edit reaches that moves these states completely and changes nothing else.
        """
        asked = [question for question in self.asked if question.person in people]
        others = [replaced(question, redirect_of(question.person, self.learned.redirects)) for question in asked]
        with exchanged_states(self.learned, self.kind.layers[-1], asked, others):
            right = right_in_batch(self.learned, [*asked, *others])
        after = self.before.clone()
        after[torch.tensor([question.person in people for question in self.asked])] = right[: len(asked)]
        return self.row("the redirect's states", people, after)


def _mean(right: Tensor) -> float:
    return float(right.float().mean())


def right_answers(learned: Learned, asked: Sequence[Question]) -> Tensor:
    """Return for each question whether the right value is the most probable of the attribute's.

    A token that a method has added to the vocabulary is an answer too, which is never right.
    """
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].text.split()))
    right = torch.empty(len(asked), dtype=torch.bool)
    for start in range(0, len(asked), BATCH):
        some = order[start : start + BATCH]
        right[some] = right_in_batch(learned, [asked[i] for i in some])
    return right


@torch.no_grad()
def right_in_batch(learned: Learned, asked: Sequence[Question]) -> Tensor:
    """Return the same as `right_answers`, from one pass over all questions."""
    tokenizer = learned.tokenizer
    encoded = tokenizer([question.text for question in asked], padding=True, return_tensors="pt")
    logits = next_logits(learned.model, encoded["input_ids"], encoded["attention_mask"])
    choices = torch.tensor([tokenizer.convert_tokens_to_ids(question.choices) for question in asked])
    answers = torch.tensor([question.choices.index(question.answer) for question in asked])
    added = logits[:, len(tokenizer) :]
    return torch.cat([logits.gather(1, choices), added], 1).argmax(1) == answers


def replaced(question: Question, person: Person) -> Question:
    """Return the same question about another person."""
    return replace(question, person=person, text=question.text.replace(question.person.name, person.name))


@contextmanager
def exchanged_states(
    learned: Learned, layer: int, asked: Sequence[Question], others: Sequence[Question]
) -> Iterator[None]:
    """Give a batch of both lists' questions the states of the second at the names' last tokens in the first."""

    def last_tokens(some: Sequence[Question]) -> Tensor:
        ends = [question.text.index(question.person.name) + len(question.person.name) for question in some]
        texts = [question.text[:end] for question, end in zip(some, ends, strict=True)]
        return torch.tensor([len(tokens) - 1 for tokens in learned.tokenizer(texts)["input_ids"]])

    to, origin, rows = last_tokens(asked), last_tokens(others), torch.arange(len(asked))

    def exchange(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[rows, to] = hidden[rows + len(asked), origin]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_architecture(learned.model).layers[layer].register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


def _edit(subject: Subject, concepts: Sequence[rocr.Concept], config: rocr.EditConfig) -> Revert:
    model, tokenizer = subject.learned.model, subject.learned.tokenizer
    edit = rocr.unlearn(model, tokenizer, concepts, subject.statistics, config, guards=FORCED)
    return lambda: edit.revert(model)


def of_rocr(subject: Subject, concepts: Sequence[rocr.Concept]) -> Revert:
    """Edit with the default settings, in the layers of the kind."""
    return _edit(subject, concepts, rocr.EditConfig(layers=subject.kind.layers))


def of_rocr_at_last_tokens(subject: Subject, concepts: Sequence[rocr.Concept]) -> Revert:
    """Edit with the default settings but at the last token of a name only, where these models recognise it."""
    return _edit(subject, concepts, rocr.EditConfig(layers=subject.kind.layers, key_tokens="last"))


def of_the_authors(subject: Subject, concepts: Sequence[rocr.Concept]) -> Revert:
    """Edit with the authors' settings, in the same layers."""
    return _edit(subject, concepts, rocr.EditConfig.official(subject.kind.layers))


def of_rank_one_updates(subject: Subject, concepts: Sequence[rocr.Concept]) -> Revert:
    """Edit as ROME does: an update of rank one for each concept, in the last of the layers, without joint system."""
    learned = subject.learned
    return one_after_another(learned.model, learned.tokenizer, concepts, subject.statistics, subject.kind.layers[-1])


METHODS: dict[str, Callable[[Subject, Sequence[rocr.Concept]], Revert]] = {
    "rocr": of_rocr,
    "rocr, last tokens": of_rocr_at_last_tokens,
    "the authors' settings": of_the_authors,
    "one after another": of_rank_one_updates,
}


def measure(subject: Subject, log: Callable[[str], None]) -> list[Row]:
    """Return the rows of all methods and counts. A count of 1 is the mean over some people, each alone."""
    people = subject.learned.people
    rows = [subject.limit(people[: max(COUNTS)])]
    for method in METHODS:
        log(method)
        alone = [subject.edit(method, [person]) for person in people[:ALONE]]
        rows.append(mean_row(alone))
        rows += [subject.edit(method, people[:count]) for count in COUNTS[1:]]
    return rows


def mean_row(rows: Sequence[Row]) -> Row:
    """Return the means of rows of the same method and number of people."""

    def mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        before, after = zip(*pairs, strict=True)
        return sum(before) / len(before), sum(after) / len(after)

    parts = ([row.forget for row in rows], [row.sharing for row in rows], [row.others for row in rows])
    return Row(rows[0].method, rows[0].people, *map(mean, parts))
