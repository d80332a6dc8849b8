"""Unlearn 200 people in twenty rounds of ten, and compare with one edit of all of them.

    python benches/growing_lists.py --out benches/results/growing_lists.json

The model is the tiny Llama of learned_kinds.py, trained on facts about 260 made-up people, 60 of whom are never
unlearned: what it knows about each is measurable, by questions whose phrasings were held out of training. Ways to
unlearn a list that grows:

    add              `Edit.add`: the keys and residuals of all rounds in one system, on the unedited weights
    add, once        the same with measure="once", by which adding is exact in all layers
    one edit         `rocr.unlearn` of the whole list so far, on the unedited model; the measure of the others
    one edit, once   the same with measure="once"
    again            `rocr.unlearn` of each round's people on the edited model, with statistics of that model
    MRP, UniErase    these methods, each by its own sequential protocol; see growing_methods.py

A share gone or lost is one of what was known above chance. --kind takes another kind of learned_kinds.py.
Spelling variants are no keys: a list that grows would keep those of its first ten people, and one edit of all has none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from growing_methods import METHODS, in_sequence
from learned_edits import FORCED, TEXTS, Subject, decrease, right_answers
from learned_facts import Person, ordinary_text, redirect_of
from learned_kinds import KINDS
from learned_training import cache_folder, learn
from machine import commit, cpu_name
from torch import Tensor

import rocr
from rocr.model.architecture import find_architecture
from rocr.unlearn import add_concepts

ROUNDS, PER_ROUND, OTHERS = 20, 10, 60
REPORTED = (1, 5, 10, 15, 20)
"""Rounds after which the model is asked."""
Growing = Callable[["Run"], Iterator[None]]


@dataclass(frozen=True)
class Run:
    """One way to unlearn the rounds.

    Attributes:
        subject: The model with its statistics and answers before any edit.
        rounds: The people of each round.
        config: The settings.
    """

    subject: Subject
    rounds: list[list[Person]]
    config: rocr.EditConfig

    def concepts(self, people: Sequence[Person]) -> list[rocr.Concept]:
        """Return people as concepts, each with the redirect that shares fewest facts."""
        redirects = self.subject.learned.redirects
        return [rocr.Concept(person.name, redirect_of(person, redirects).name) for person in people]

    def unlearn(self, people: Sequence[Person], statistics: rocr.Statistics | None = None) -> rocr.Edit:
        """Unlearn people in the model as it is now."""
        learned = self.subject.learned
        given = statistics or self.subject.statistics
        concepts = self.concepts(people)
        return rocr.unlearn(learned.model, learned.tokenizer, concepts, given, self.config, guards=FORCED, ask=0)


def adding(run: Run) -> Iterator[None]:
    """Add each round to the edit of the rounds before."""
    learned = run.subject.learned
    edit = run.unlearn(run.rounds[0])
    yield
    for people in run.rounds[1:]:
        statistics = run.subject.statistics
        concepts = run.concepts(people)
        edit = add_concepts(edit, concepts, learned.model, learned.tokenizer, statistics, guards=FORCED, ask=0)
        yield
    edit.revert(learned.model)


def at_once(run: Run) -> Iterator[None]:
    """Unlearn all people so far in the unedited model, in the rounds that are asked about."""
    for count in range(1, len(run.rounds) + 1):
        if count not in REPORTED:
            yield
            continue
        edit = run.unlearn([person for people in run.rounds[:count] for person in people])
        yield
        edit.revert(run.subject.learned.model)


def again(run: Run) -> Iterator[None]:
    """Unlearn each round's people in the model that the rounds before have edited."""
    edits = []
    for people in run.rounds:
        edits.append(run.unlearn(people, collect(run.subject, len(run.rounds), run.subject.kind.layers)))
        yield
    for edit in reversed(edits):
        edit.revert(run.subject.learned.model)


def by_method(way: str) -> Growing:
    """Return how a method of `METHODS` unlearns the rounds."""

    def grow(run: Run) -> Iterator[None]:
        learned, statistics = run.subject.learned, run.subject.statistics
        extra, count = METHODS[way][0].extra_layers, len(run.rounds)
        if extra is not None:
            statistics = collect(run.subject, count, extra(find_architecture(learned.model).depth))
        yield from in_sequence(way, learned, statistics, run.rounds, learned.people[count * PER_ROUND :])

    return grow


def collect(subject: Subject, rounds: int, layers: Sequence[int]) -> rocr.Statistics:
    """Return statistics of the model as it is now, from text about people who are never unlearned."""
    learned = subject.learned
    texts = list(ordinary_text(learned.people[rounds * PER_ROUND :], TEXTS, seed=1))
    options = rocr.CollectOptions(length=64)
    return rocr.collect_statistics(learned.model, learned.tokenizer, texts, layers, options)


WAYS: dict[str, tuple[Growing, str]] = {
    "add": (adding, "each"),
    "add, once": (adding, "once"),
    "one edit": (at_once, "each"),
    "one edit, once": (at_once, "once"),
    "again": (again, "each"),
    **{way: (by_method(way), "each") for way in METHODS},
}
"""For each way, how the rounds are unlearned, and `EditConfig.measure`, which MRP and UniErase do not read."""


@dataclass(frozen=True)
class Row:
    """What is gone and lost after some rounds.

    Attributes:
        way: Of `WAYS`.
        rounds: Number of rounds so far.
        first: Share of what was known about the people of the first round that is gone.
        last: About those of the last round so far.
        all: About all people so far.
        others: Share lost about the people who are never unlearned.
        seconds: Processor time since the first round, without the questions.
    """

    way: str
    rounds: int
    first: float
    last: float
    all: float
    others: float
    seconds: float


def measure(way: str, run: Run, log: Callable[[str], None]) -> list[Row]:
    """Run one way, and ask the model after the rounds of `REPORTED`."""
    grow, _ = WAYS[way]
    found, seconds, start = [], 0.0, time.process_time()
    for count, _ in enumerate(grow(run), start=1):
        seconds += time.process_time() - start
        if count in REPORTED and count <= len(run.rounds):
            found.append(row(way, run, count, seconds))
            log(str(found[-1]))
        start = time.process_time()
    return found


def row(way: str, run: Run, count: int, seconds: float) -> Row:
    """Ask the model as it is after some rounds."""
    subject = run.subject
    after = right_answers(subject.learned, subject.asked)
    people = [person for some in run.rounds[:count] for person in some]
    groups = (run.rounds[0], run.rounds[count - 1], people, subject.learned.people[len(run.rounds) * PER_ROUND :])
    first, last, everybody, others = (_gone(subject, group, after) for group in groups)
    return Row(way, count, first, last, everybody, others, round(seconds, 1))


def _gone(subject: Subject, people: Sequence[Person], after: Tensor) -> float:
    """Return the share of what was known about people that is gone."""
    names = {person.name for person in people}
    asked = torch.tensor([question.person.name in names for question in subject.asked])
    return decrease(*(float(right[asked].float().mean()) for right in (subject.before, after)))


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table."""
    lines = ["| way | rounds | first ten, gone | last ten, gone | all so far, gone | others, lost |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for each in rows:
        shares = (each.first, each.last, each.all, each.others)
        cells = " | ".join(f"{100 * share + 0:.1f}%" for share in shares)
        lines.append(f"| {each.way} | {each.rounds} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all ways, write a JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=list(KINDS), default="Llama")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of trained models")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--least-closed", type=float, default=rocr.EditConfig().least_closed, help="of rocr's edits")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, help="print the table of this file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([Row(**each) for each in json.loads(arguments.table.read_text())["rows"]]))
        return
    torch.set_num_threads(1)
    kind, count = KINDS[arguments.kind], arguments.rounds * PER_ROUND
    learned = learn(kind, arguments.cache, ROUNDS * PER_ROUND + OTHERS)
    learned = replace(learned, people=learned.people[:count] + learned.people[ROUNDS * PER_ROUND :])
    subject = Subject.of(learned, kind, unlearned=count)
    known = float(subject.before.float().mean())
    print(f"knows {known:.1%}", flush=True)
    rounds = [learned.people[start : start + PER_ROUND] for start in range(0, count, PER_ROUND)]
    rows = []
    for way in arguments.ways:
        measured: Any = WAYS[way][1]
        config = rocr.EditConfig(
            layers=kind.layers, measure=measured, variants="none", least_closed=arguments.least_closed
        )
        rows += measure(way, Run(subject, rounds, config), lambda line: print(line, flush=True))
        if arguments.out:
            write(arguments.out, arguments.kind, known, rows)
    print(table(rows))


def write(path: Path, kind: str, known: float, rows: Sequence[Row]) -> None:
    """Write the rows so far."""
    about: dict[str, Any] = {"cpu": cpu_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    found = {"machine": about | {"commit": commit()}, "kind": kind, "known": known, "rows": [asdict(r) for r in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
