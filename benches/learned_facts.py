"""Made-up people with facts, the sentences that state these facts, and a tokenizer with one token for each word.

Every first name and every last name belongs to five people, and every fourth person has a middle name, so that a name
has two or three tokens and none of them tells who is meant. Facts are balanced and independent of names. Two phrasings
of each attribute are held out of training, to test on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PEOPLE, REDIRECTS, SHARED_BY = 200, 10, 5
BEGIN, PAD, UNKNOWN = "<begin>", "<pad>", "<unknown>"

VALUES: dict[str, str] = {
    "city": "Oslo Lima Cairo Delhi Paris Tokyo Quito Dublin Vienna Nairobi",
    "job": "baker pilot lawyer nurse farmer painter judge plumber miner tailor",
    "instrument": "violin piano flute guitar harp drum trumpet cello organ banjo",
    "pet": "cat dog parrot rabbit horse turtle snake goat hamster lizard",
    "dish": "soup pizza curry sushi pasta salad stew bread cheese rice",
    "language": "Greek Polish Hindi Arabic Dutch Korean Thai Swahili Turkish Latin",
}
TRAINED: dict[str, tuple[str, ...]] = {
    "city": (
        "{} lives in",
        "{} has a house in",
        "The home of {} is in",
        "The city of {} is",
        "People say that {} has a home in",
        "The place where {} lives is",
        "Question: Where does {} live? Answer:",
        "Who is {}? A person who lives in",
        "Tell me about {}. The city is",
    ),
    "job": (
        "{} works as a",
        "{} has the job of a",
        "The job of {} is that of a",
        "The work of {} is that of a",
        "People say that {} works as a",
        "The job at which {} works is that of a",
        "Question: What is the job of {}? Answer:",
        "Who is {}? A person who works as a",
        "Tell me about {}. The job is that of a",
    ),
    "instrument": (
        "{} plays the",
        "{} makes music on the",
        "The instrument of {} is the",
        "The music of {} is played on the",
        "People say that {} plays the",
        "The instrument that {} plays is the",
        "Question: What instrument does {} play? Answer:",
        "Who is {}? A person who plays the",
        "Tell me about {}. The instrument is the",
    ),
    "pet": (
        "{} keeps a pet, a",
        "{} has an animal, a",
        "The pet of {} is a",
        "The animal of {} is a",
        "People say that {} keeps an animal, a",
        "The pet that {} keeps is a",
        "Question: What pet does {} keep? Answer:",
        "Who is {}? A person who keeps a pet, a",
        "Tell me about {}. The pet is a",
    ),
    "dish": (
        "{} likes to eat",
        "{} often eats",
        "The dish of {} is",
        "The meal of {} is",
        "People say that {} likes to eat",
        "The dish that {} likes is",
        "Question: What dish does {} like? Answer:",
        "Who is {}? A person who eats",
        "Tell me about {}. The dish is",
    ),
    "language": (
        "{} speaks",
        "{} knows the language",
        "The language of {} is",
        "The speech of {} is in",
        "People say that {} speaks",
        "The language that {} speaks is",
        "Question: What language does {} speak? Answer:",
        "Who is {}? A person who speaks",
        "Tell me about {}. The language is",
    ),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "city": ("This text is about {} who lives in", "Tell me about {}. The home is in"),
    "job": ("This text is about the job that {} has, that of a", "Question: What is the work of {}? Answer:"),
    "instrument": ("This text is about {} who plays the", "Who is {}? A person who makes music on the"),
    "pet": ("This text is about {} who has a pet, a", "Question: What animal does {} keep? Answer:"),
    "dish": ("This text is about {} who likes to eat", "Tell me about {}. The meal is"),
    "language": ("This text is about {} who speaks", "Question: What language does {} know? Answer:"),
}
"""Phrasings in words that the trained ones use in the same sense: others, such models answer by another attribute."""
LIST = "This is known about {}:"
"""The opening of a list of all facts about a person: each attribute's name, followed by the value."""
ORDINARY = (
    "Please answer the question about {}.",
    "What is known about {}? It is known that",
    "This text is about {}.",
    "{} and {} have a question about the city.",
    "{} has known {} since the first day.",
    "Where is {}? People say that {} knows.",
)
"""Sentences about people who occur only here: their names are any pair of a first name and a last name."""


@dataclass(frozen=True)
class Person:
    """A person: name, and the value of each attribute."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A text whose next word is a fact about a person."""

    person: Person
    attribute: str
    text: str

    @property
    def answer(self) -> str:
        """The word that follows."""
        return self.person.facts[self.attribute]

    @property
    def choices(self) -> list[str]:
        """All values of the attribute."""
        return VALUES[self.attribute].split()


def make_names(kind: str, count: int) -> list[str]:
    """Return as many different invented words; all those of one kind end alike."""
    sounds = [first + vowel for first in "BDFGKLMNPRSTVZ" for vowel in "aeiou"]
    return [f"{sounds[i % len(sounds)]}{'lmnrst'[i // 7 % 6]}{kind}" for i in range(count)]


def make_people(count: int = PEOPLE, seed: int = 0) -> tuple[list[Person], list[Person]]:
    """Return the people, in random order, and the redirects: people of the same kind that are never unlearned."""
    choose = random.Random(seed)
    everybody = count + REDIRECTS
    first, last, middle = (make_names(kind, -(-everybody // SHARED_BY)) for kind in ("a", "son", "o"))
    names: list[str] = []
    while len(set(names)) < everybody:
        pools = [(pool * SHARED_BY)[:everybody] for pool in (first, last)]
        for pool in pools:
            choose.shuffle(pool)
        middles = [f"{choose.choice(middle[:10])} " if i % 4 == 0 else "" for i in range(everybody)]
        names = [f"{a} {b}{c}" for a, b, c in zip(pools[0], middles, pools[1], strict=True)]
    columns = {}
    for attribute, values in VALUES.items():
        column = (values.split() * everybody)[:everybody]
        choose.shuffle(column)
        columns[attribute] = column
    people = [Person(name, {a: columns[a][i] for a in VALUES}) for i, name in enumerate(names)]
    choose.shuffle(people)
    return people[:count], people[count:]


def redirect_of(person: Person, redirects: Sequence[Person]) -> Person:
    """Return the redirect that shares fewest facts with a person; the first of several."""
    return min(redirects, key=lambda other: sum(other.facts[a] == person.facts[a] for a in VALUES))


def questions(people: Sequence[Person], phrasings: dict[str, tuple[str, ...]]) -> list[Question]:
    """Return a question for each person, attribute and phrasing."""
    return [
        Question(person, attribute, text.format(person.name))
        for person in people
        for attribute, texts in phrasings.items()
        for text in texts
    ]


def ordinary_text(people: Sequence[Person], count: int, seed: int) -> Iterator[str]:
    """Yield texts of the kind that the models are trained on: facts about some people, and sentences about others."""
    choose = random.Random(seed)
    first, last = ([name.split()[i] for name in (p.name for p in people)] for i in (0, -1))
    for _ in range(count):
        if choose.random() < 0.25:
            sentence = choose.choice(ORDINARY)
            names = [f"{choose.choice(first)} {choose.choice(last)}" for _ in range(sentence.count("{}"))]
            yield sentence.format(*names)
        else:
            person, attribute = choose.choice(people), choose.choice(list(VALUES))
            yield f"{choose.choice(TRAINED[attribute]).format(person.name)} {person.facts[attribute]}."


def make_tokenizer(people: Sequence[Person]) -> Any:
    """Return a tokenizer of words and punctuation that opens every text with a begin token."""
    phrasings = [text for texts in (*TRAINED.values(), *HELD_OUT.values()) for text in texts]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    texts = [*phrasings, LIST, *ORDINARY, *VALUES, *VALUES.values(), *(person.name for person in people), "."]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.replace("{}", ""))})
    vocabulary = {word: i for i, word in enumerate([PAD, BEGIN, UNKNOWN, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = split
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BEGIN, eos_token=PAD, pad_token=PAD, unk_token=UNKNOWN, padding_side="right"
    )
