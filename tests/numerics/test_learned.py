"""A tiny model learns made-up facts about people, and forgets those about the people that are unlearned."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

BENCHES = str(Path(__file__).parents[2] / "benches")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, which import each other by name as scripts do."""
    sys.path.insert(0, BENCHES)
    try:
        import learned_edits
        import learned_kinds
        import learned_training
    finally:
        sys.path.remove(BENCHES)
    return learned_edits, learned_kinds, learned_training


@pytest.fixture(scope="module")
def subject(bench):
    """A Llama that knows 60 people, five of whom are to be unlearned."""
    edits, kinds, training = bench
    kind = dataclasses.replace(kinds.KINDS["Llama"], steps=300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield edits.Subject.of(training.learn(kind, None, people=60), kind, unlearned=5)
    torch.set_num_threads(threads)


def test_it_knows_the_facts_in_phrasings_that_it_was_not_trained_on(subject):
    assert subject.before.float().mean() > 0.9


@pytest.mark.parametrize("count", [1, 5])
def test_people_are_forgotten_and_others_kept(bench, subject, count):
    edits, *_ = bench
    row = subject.edit("rocr", subject.learned.people[:count])
    assert edits.decrease(*row.forget) >= 0.85
    assert edits.decrease(*row.others) <= 0.2


def test_an_edit_is_undone(bench, subject):
    edits, *_ = bench
    subject.edit("one after another", subject.learned.people[:5])
    assert torch.equal(edits.right_answers(subject.learned, subject.asked), subject.before)
