"""A tiny model learns made-up facts about people, and forgets those about the people that are unlearned."""

import dataclasses
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rocr
from rocr.evaluation.baselines.extra_token import extra_token
from rocr.model.architecture import find_architecture
from rocr.model.blocks import layer_blocks
from rocr.model.causality import with_kind

BENCHES = str(Path(__file__).parents[2] / "benches")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, which import each other by name as scripts do."""
    sys.path.insert(0, BENCHES)
    try:
        import growing_lists
        import growing_methods
        import learned_edits
        import learned_kinds
        import learned_rank_one
        import learned_training
    finally:
        sys.path.remove(BENCHES)
    return SimpleNamespace(
        edits=learned_edits,
        growing=growing_lists,
        kinds=learned_kinds,
        methods=growing_methods,
        rank_one=learned_rank_one,
        training=learned_training,
    )


@pytest.fixture(scope="module")
def subject(bench):
    """A Llama that knows 60 people, five of whom are to be unlearned."""
    kind = dataclasses.replace(bench.kinds.KINDS["Llama"], steps=300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench.edits.Subject.of(bench.training.learn(kind, None, people=60), kind, unlearned=5)
    torch.set_num_threads(threads)


def test_it_knows_the_facts_in_phrasings_that_it_was_not_trained_on(subject):
    assert subject.before.float().mean() > 0.9


@pytest.mark.parametrize("count", [1, 5])
def test_people_are_forgotten_and_others_kept(bench, subject, count):
    row = subject.edit("rocr", subject.learned.people[:count])
    assert bench.edits.decrease(*row.forget) >= 0.85
    assert bench.edits.decrease(*row.others) <= 0.2


def test_an_update_of_rank_one_puts_the_redirects_state_in_the_place_of_the_name_s(bench, subject):
    model, tokenizer, layer = subject.learned.model, subject.learned.tokenizer, subject.kind.layers[-1]
    person, redirect = subject.learned.people[0], subject.learned.redirects[0]
    concept = rocr.Concept(person.name, redirect.name)
    blocks = layer_blocks(find_architecture(model), layer)
    key, residual, _ = bench.rank_one.key_and_residual(
        with_kind(find_architecture(model), layer), tokenizer, concept, layer, ()
    )
    before = blocks.only.weight.double().clone()
    revert = bench.rank_one.one_after_another(model, tokenizer, [concept], subject.statistics, layer)
    change = blocks.only.weight.double() - before
    revert()
    torch.testing.assert_close(change @ key, residual, rtol=0, atol=1e-5 * float(residual.norm()))
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == 1
    ordinary = subject.statistics.second_moments(layer)[0].double()
    plain = torch.outer(residual, key) / key.square().sum()
    moved, moved_by_plain = (torch.einsum("ij,jk,ik->", each, ordinary, each) for each in (change, plain))
    assert moved < 0.5 * moved_by_plain


def test_an_edit_is_undone(bench, subject):
    subject.edit("one after another", subject.learned.people[:5])
    assert torch.equal(bench.edits.right_answers(subject.learned, subject.asked), subject.before)


@pytest.mark.parametrize("way", ["MRP", "UniErase"])
def test_a_compared_method_unlearns_one_round_after_another(bench, subject, monkeypatch, way):
    people, settings = subject.learned.people, bench.methods.SETTINGS
    monkeypatch.setitem(settings, "MRP", {"SCHEDULE": dataclasses.replace(settings["MRP"]["SCHEDULE"], steps=80)})
    monkeypatch.setitem(settings, "UniErase", settings["UniErase"] | {"RIDGE": 1e-3})
    method, module = bench.methods.METHODS[way]
    own = {name: getattr(module, name) for name in settings[way]}
    seen = []

    @contextmanager
    def watched(case):
        with method.unlearned(case) as unlearned:
            seen.append((case, unlearned.state))
            yield unlearned

    monkeypatch.setitem(bench.methods.METHODS, way, (dataclasses.replace(method, unlearned=watched), module))
    run = bench.growing.Run(subject, [people[:1], people[1:2]], rocr.EditConfig(layers=subject.kind.layers))
    rounds = bench.growing.WAYS[way][0](run)
    rows = [bench.growing.row(way, run, count, 0.0) for count, _ in enumerate(rounds, start=1)]
    (first, state), (second, last) = seen
    assert [{p.subject for p in case.probes} for case in (first, second)] == [{people[0].name}, {people[1].name}]
    assert first.earlier is None and second.earlier is state
    if way == "MRP":
        assert [[len(each) for each in directions] for _, directions in (state, last)] == [[2, 2], [4, 4]]
    else:
        assert last is state, "one token serves all rounds"
    one, two = rows
    assert min(one.first, two.first, two.last) >= 0.3 and one.others < 0.7 * one.first, rows
    assert {name: getattr(module, name) for name in own} == own
    assert torch.equal(bench.edits.right_answers(subject.learned, subject.asked), subject.before)


def test_a_token_that_a_method_adds_is_never_right(bench, subject):
    asked = [question for question, right in zip(subject.asked, subject.before, strict=True) if right][:1]
    model, tokenizer = subject.learned.model, subject.learned.tokenizer
    answer = tokenizer.convert_tokens_to_ids(asked[0].answer)
    with extra_token(model, seed=0) as token, torch.no_grad():
        token.row.zero_()
        assert bench.edits.right_answers(subject.learned, asked).tolist() == [True]
        token.row.copy_(2 * model.get_output_embeddings().weight[answer])
        assert bench.edits.right_answers(subject.learned, asked).tolist() == [False]
