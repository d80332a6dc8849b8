import json
import math
from dataclasses import asdict

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.edit import collisions
from rocr.edit.collisions import COLLINEAR, CONFLICT, Collisions, find_collisions, names_inside, nearest_keys
from rocr.edit.update import LayerUpdate
from rocr.solve.factors import Factors
from rocr.solve.metric import build_metric
from rocr.solve.solve import System

pytestmark = pytest.mark.usefixtures("one_thread")


def people(*names):
    return [Concept(name, "a gardener") for name in names]


def update(layer, keys, residuals, system):
    return LayerUpdate(layer, "weight", Factors(residuals.T, keys), keys, residuals, system=system)


@pytest.fixture(params=["product", "metric"])
def crowd(request):
    """Twelve concepts of one to three keys, some nearly the same, and a metric that matters; in mixed order."""
    torch.manual_seed(3)
    moment = torch.randn(60, 16)
    metric = build_metric(moment.T @ moment / 60 + torch.diag(torch.logspace(-2, 2, 16)), EditConfig())
    concept_of = [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 3, 5, 5, 2]
    keys, residuals = torch.randn(18, 16), torch.randn(18, 8)
    for row, like, noise in ((4, 0, 0.01), (11, 2, 0.02), (16, 14, 0.05), (9, 8, 0.0)):
        keys[row] = (keys[like] + noise * torch.randn(16)) * (1 + row)
    residuals[4], residuals[11] = residuals[0], -2 * residuals[2]
    system = System(1.0, product=metric.apply(keys)) if request.param == "product" else System(1.0, metric=metric)
    return people(*(f"name {i}" for i in range(12))), concept_of, keys, residuals, system, metric


def definition(concepts, concept_of, keys, residuals, metric):
    """Every pair of concepts with its cosine and conflict, key by key in float64."""
    gram = keys.double() @ metric.apply(keys).double().T
    found = {}
    for i in range(len(keys)):
        for j in range(len(keys)):
            if concept_of[i] < concept_of[j]:
                cosine = float(gram[i, j] / math.sqrt(gram[i, i] * gram[j, j]))
                r, s = residuals[i].double(), residuals[j].double()
                conflict = float(1 - (r + s).norm() / (r.norm() + s.norm())) if cosine >= COLLINEAR else 0.0
                pair = concepts[concept_of[i]].name, concepts[concept_of[j]].name
                best = found.get(pair, (-2.0, 0.0))
                found[pair] = max(best[0], cosine), max(best[1], conflict)
    return {pair: values for pair, values in found.items() if values[0] >= COLLINEAR}


@pytest.mark.parametrize("entries", [1, 40, 1 << 22], ids=["smallest blocks", "small blocks", "one block"])
def test_collisions_are_their_definition(crowd, entries, monkeypatch):
    monkeypatch.setattr(collisions, "BLOCK_ENTRIES", entries)
    concepts, concept_of, keys, residuals, system, metric = crowd
    expected = definition(concepts, concept_of, keys, residuals, metric)
    found = find_collisions(concepts, concept_of, update(4, keys, residuals, system))
    assert found.layer == 4
    assert found.collinear == len(expected) >= 4
    assert found.conflicting == sum(conflict >= CONFLICT for _, conflict in expected.values()) > 0
    assert {(c.first, c.second) for c in found.worst} == set(expected)
    for collision in found.worst:
        cosine, conflict = expected[collision.first, collision.second]
        assert collision.cosine == pytest.approx(cosine, abs=1e-4)
        assert collision.conflict == pytest.approx(conflict, abs=1e-3)
    sums = [c.cosine + c.conflict for c in found.worst]
    assert sums == sorted(sums, reverse=True)
    same, opposite = ({c.second: c.conflict for c in found.worst}[name] for name in ("name 3", "name 10"))
    assert same == pytest.approx(0.0, abs=1e-3) and opposite == pytest.approx(2 / 3, abs=1e-3)


def test_a_long_list_keeps_the_worst_and_counts_all(monkeypatch):
    monkeypatch.setattr(collisions, "BLOCK_ENTRIES", 500)
    keys, residuals = torch.randn(1, 8).repeat(60, 1), torch.randn(60, 4)
    concepts = people(*(f"name {i}" for i in range(60)))
    found = find_collisions(concepts, list(range(60)), update(0, keys, residuals, System(1.0, keys.clone())))
    assert found.collinear == 60 * 59 // 2
    assert len(found.worst) == collisions.MAX_REPORTED
    expected = sorted(
        (float(1 - (r + s).norm() / (r.norm() + s.norm())) for i, r in enumerate(residuals) for s in residuals[:i]),
        reverse=True,
    )
    assert [c.conflict for c in found.worst] == pytest.approx(expected[: collisions.MAX_REPORTED], abs=1e-3)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("Paris", "Paris Hilton"), {(0, 1)}),
        (("Paris Hilton", "paris"), {(1, 0)}),
        (("Art", "Arthur", "Earth"), set()),
        (("King", "Stephen King", "Stephen King, Jr."), {(0, 1), (0, 2), (1, 2)}),
        (("O'Hara", "Scarlett O'Hara", "Hara"), {(0, 1), (2, 0), (2, 1)}),
        (("東京", "東京都庁", "京都"), {(0, 1), (2, 1)}),
        (("...", "Who ... is"), set()),
    ],
)
def test_names_inside_others(names, pairs):
    assert set(names_inside(people(*names))) == pairs


def test_aliases_stand_inside_too():
    concepts = [
        Concept("Paris Hilton", "x", ("the heiress",)),
        Concept("the heiress of Rome", "x"),
        Concept("Rome", "x"),
    ]
    assert set(names_inside(concepts)) == {(0, 1), (2, 1)}
    assert names_inside([Concept("Paris Hilton", "x", ("Paris",))]) == [], "a concept does not collide with itself"


def test_the_nearest_keys(monkeypatch):
    keys = torch.randn(50, 6)
    keys[37] = keys[12] * 3 + 0.01
    for entries in (1, 120, 1 << 22):
        monkeypatch.setattr(collisions, "BLOCK_ENTRIES", entries)
        assert sorted(nearest_keys(keys)) == [12, 37]


CROWDED = [
    Concept("Ada Byron", "Blaise Pascal"),
    Concept("Ada", "a gardener"),
    Concept("Robert Downey Jr.", "a gardener"),
    Concept("Ada Downey", "Blaise Pascal"),
]


def test_an_edit_reports_its_collisions(model, tokenizer, statistics):
    config = EditConfig(
        layers=(1, 2),
        templates=("Who is {}?", "It is about {}."),
        keys_per_concept="all",
        token_schedule="full",
    )
    edit = rocr.unlearn(model, tokenizer, CROWDED, statistics, config)
    found = edit.report.collisions
    assert found.layer == 1 and found.inside == 2
    assert {(c.first, c.second) for c in found.nested} == {("Ada", "Ada Byron"), ("Ada", "Ada Downey")}
    # "Ada" has the same key whatever follows it, and the two redirects need different outputs for it.
    conflicts = {frozenset((c.first, c.second)): (c.cosine, c.conflict) for c in found.worst}
    cosine, conflict = conflicts[frozenset(("Ada", "Ada Byron"))]
    assert cosine == pytest.approx(1.0, abs=1e-4) and conflict > CONFLICT
    cosine, conflict = conflicts[frozenset(("Ada Byron", "Ada Downey"))]
    assert cosine == pytest.approx(1.0, abs=1e-4) and conflict < 1e-2
    assert Collisions.from_json(json.loads(json.dumps(asdict(found)))) == found
    without = edit.remove("Ada").report.collisions
    assert without.inside == 0 and without.collinear < found.collinear


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"collinear": -1}, "collinear"),
        ({"worst": {}}, "worst"),
        ({"nested": [{"first": 1}]}, None),
        ({"more": 1}, None),
    ],
)
def test_damaged_collisions_are_refused(changes, words):
    values = {"layer": 1, "collinear": 0, "conflicting": 0, "inside": 0, "worst": [], "nested": []}
    with pytest.raises((KeyError, TypeError, ValueError), match=words):
        Collisions.from_json({**values, **changes})
