import json
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, EditConfig, InputError
from rocr.edit import retain_impact
from rocr.edit.retain_impact import RetainReport, part_moves
from rocr.keys.plan import plan_names
from rocr.keys.read import read_states
from rocr.model.architecture import find_architecture
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(layers=(1, 2), templates=("Who is {}?", "It is about {}."), measure="once", retain_weight=0.0)
PEOPLE = [Concept("Ada Byron", "Blaise Pascal", ("the countess",)), Concept("Robert Downey Jr.", "a gardener")]
STAY = ["Ada Lovelace", "the roses", "rain"]


@pytest.mark.parametrize("keys_per_concept", ["mean", "all"])
@pytest.mark.parametrize("entries", [1, 1 << 22], ids=["concept by concept", "one chunk"])
def test_moves_of_retained_names_are_their_definition(
    model, tokenizer, statistics, keys_per_concept, entries, monkeypatch
):
    monkeypatch.setattr(retain_impact, "CHUNK_ENTRIES", entries)
    config = replace(CONFIG, keys_per_concept=keys_per_concept)
    architecture = find_architecture(model)
    reading, name_of = plan_names(tokenizer, STAY, config)
    own = {layer: read_states(architecture, reading, 2, layer, share=False).keys for layer in (1, 2)}
    weights = {layer: architecture.down_projection(layer).weight.detach().clone() for layer in (1, 2)}
    edit = rocr.unlearn(model, tokenizer, PEOPLE, statistics, config, retain=STAY)
    pairs, whole = {}, {}
    for update in edit.updates:
        keys, outputs = own[update.layer], own[update.layer] @ weights[update.layer].T
        parts = []
        for concept in range(2):
            residuals = update.residuals.clone()
            residuals[[row for row, owner in enumerate(edit.concept_of) if owner != concept]] = 0
            part = rocr.ops.solve_update(update.keys, residuals, _metric(update), update.system.ridge)
            parts.append(part[0].double() @ part[1].double())
        total = update.factors.left.double() @ update.factors.right.double()
        torch.testing.assert_close(sum(parts), total, rtol=1e-4, atol=1e-6)
        for row, name in enumerate(name_of):
            for concept, delta in (*enumerate(parts), (None, total)):
                share = float((delta @ keys[row].double()).norm() / outputs[row].norm())
                found = whole if concept is None else pairs
                place = STAY[name] if concept is None else (STAY[name], PEOPLE[concept].name)
                found[place] = max(found.get(place, (0.0, 0)), (share, update.layer))
    report = edit.report.retained
    assert report.given and report.count == 3
    assert {h.name: h.layer for h in report.moved} == {name: layer for name, (_, layer) in whole.items()}
    for found in report.moved:
        assert found.share == pytest.approx(whole[found.name][0], rel=1e-3)
    assert report.mean == pytest.approx(sum(share for share, _ in whole.values()) / 3, rel=1e-3)
    assert len(report.worst) == 6
    for found in report.worst:
        assert found.share == pytest.approx(pairs[found.name, found.concept][0], rel=1e-3, abs=1e-5)
    assert [h.share for h in report.worst] == sorted((h.share for h in report.worst), reverse=True)


def _metric(update):
    system = update.system
    if system.metric is not None:
        return system.metric

    class Known:
        def apply(self, keys):
            return system.product

    return Known()


def test_parts_of_concepts_of_different_sizes():
    residuals, weights = torch.randn(6, 5), torch.randn(6, 4)
    found = {}
    for concepts, moves in part_moves(lambda rows: weights[rows], 4, residuals, [2, 0, 2, 2, 1, 0]):
        found |= dict(zip(concepts, moves, strict=True))
    for concept, rows in {0: [1, 5], 1: [4], 2: [0, 2, 3]}.items():
        torch.testing.assert_close(found[concept], (residuals[rows].T @ weights[rows]).norm(dim=0))


def test_only_the_worst_are_kept(model, tokenizer, statistics, monkeypatch):
    whole = rocr.unlearn(model, tokenizer, PEOPLE, statistics, CONFIG, retain=STAY)
    whole.revert(model)
    monkeypatch.setattr(retain_impact, "MAX_REPORTED", 2)
    few = rocr.unlearn(model, tokenizer, PEOPLE, statistics, CONFIG, retain=STAY).report.retained
    assert few.worst == whole.report.retained.worst[:2] and few.moved == whole.report.retained.moved[:2]


def test_the_redirects_are_measured_if_no_names_are_given(model, tokenizer, statistics):
    report = rocr.unlearn(model, tokenizer, PEOPLE, statistics, CONFIG).report.retained
    assert not report.given and {h.name for h in report.moved} == {"Blaise Pascal", "a gardener"}
    assert RetainReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_nothing_is_measured_for_an_empty_list(model, tokenizer, statistics):
    edit = rocr.unlearn(model, tokenizer, PEOPLE, statistics, CONFIG, retain=[])
    assert edit.report.retained is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("Ada", "list of retained names"),
        ([""], "list of names"),
        ([3], "list of retained names"),
        (["THE  countess"], "both unlearned and retained"),
    ],
)
def test_names_that_cannot_be_retained_are_refused(model, tokenizer, statistics, weights_of, names, words):
    before = weights_of(model)
    with pytest.raises(InputError, match=words):
        rocr.unlearn(model, tokenizer, PEOPLE, statistics, CONFIG, retain=names)
    assert same_weights(weights_of(model), before)


def test_names_of_rocr_0_1_for_what_is_measured(model, tokenizer, statistics):
    report = rocr.unlearn(model, tokenizer, PEOPLE, statistics, CONFIG, retain=STAY).report
    assert report.neighbours is report.retained
    assert [impact.neighbour for impact in report.retained.moved] == [impact.name for impact in report.retained.moved]
    written = report.to_json()
    assert "retained" not in written
    assert written["neighbours"]["moved"][0].keys() == {"neighbour", "concept", "layer", "share"}
