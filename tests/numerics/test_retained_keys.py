"""Retained names are rows of the system with a residual of 0: what the update then is, and how such edits change."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, Edit, EditConfig, Guards, InputError
from rocr.edit.retained_keys import SHARED, labels_from_json, labels_to_json, rows_apart
from rocr.io.tensors import read_tensors, write_tensors
from rocr.solve.metric import build_metric
from rocr.solve.solve import solve_layer

pytestmark = pytest.mark.usefixtures("one_thread")
CONCEPTS = [Concept("Ada Byron", "Blaise Pascal"), Concept("the engines", "the roses")]
NAMES = ["Grace Hopper", "Ada Quux", "a mill"]
CONFIG = EditConfig(layers=(1, 2), templates=("Who is {}?", "It is about {}."), measure="once")
# Relative to the norm of the update. The keys are measured in batches of other sizes: 3e-6 was measured.
ROUNDING = 5e-5


def matrices(edit: Edit) -> list[torch.Tensor]:
    return [update.factors.left.double() @ update.factors.right.double() for update in edit.updates]


def difference(edit: Edit, expected: Edit) -> float:
    """The largest distance of the updates of a layer, relative to the expected one."""
    pairs = zip(matrices(edit), matrices(expected), strict=True)
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)


@pytest.fixture
def make(model, tokenizer, statistics):
    """make(concepts, names, config): the edit of a fresh model, and that model."""

    def edited(concepts=CONCEPTS, names=NAMES, config=CONFIG):
        fresh = copy.deepcopy(model)
        guards = Guards(force=True)
        return rocr.unlearn(fresh, tokenizer, concepts, statistics, config, guards=guards, retain=names), fresh

    return edited


@pytest.mark.parametrize("n", [3, 30], ids=["fewer keys than inputs", "more keys than inputs"])
@pytest.mark.parametrize("method", ["whitened", "projected"])
def test_the_update_is_the_minimiser_with_the_retained_rows(n, method):
    """Against the (d_in, d_in) system in float64: Δ (KᵀK + HᵀH + λ M⁻¹) = RᵀK; for a projector, in its free space."""
    d_in, d_out, h, ridge = 12, 9, 5, 0.7
    keys, residuals, retained = torch.randn(n, d_in), torch.randn(n, d_out), torch.randn(h, d_in)
    samples = torch.randn(200, d_in, dtype=torch.float64) * torch.linspace(0.1, 2, d_in, dtype=torch.float64)
    moment = samples.T @ samples / 200
    metric = build_metric(moment, EditConfig(method=method, threshold=1.0))
    used = torch.tensor([True, True, False, True, True])
    solution = solve_layer(keys, residuals, metric, ridge, retained, used)
    k, r, kept = keys.double(), residuals.double(), retained[used].double()
    root = metric.root(torch.eye(d_in, dtype=torch.float64)).double()  # M = B Bᵀ
    reduced, other = k @ root, kept @ root
    system = reduced.T @ reduced + other.T @ other + ridge * torch.eye(root.shape[1], dtype=torch.float64)
    expected = r.T @ reduced @ torch.linalg.inv(system) @ root.T
    found = solution.factors.left.double() @ solution.factors.right.double()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert solution.factors.shape == (d_out, d_in)
    assert solution.factors.left.shape == (d_out, n if n <= d_in else d_out) or n > d_in
    without = solve_layer(keys, residuals, metric, ridge)
    free = without.factors.left.double() @ without.factors.right.double()
    change, before = ((kept @ each.T).norm() for each in (found, free))
    assert change < 0.9 * before, "the outputs at the retained keys are kept"
    rows = torch.arange(n)
    at = torch.randn(4, d_in)
    moves = solution.coefficients(keys, at)(rows).double().T @ r
    assert torch.allclose(moves, at.double() @ expected.T, atol=1e-4 * float(expected.norm()))


@pytest.mark.parametrize("layers", [(1,), (1, 2)])
@pytest.mark.parametrize("measure", ["once", "each"])
def test_a_larger_weight_moves_a_retained_name_less(make, layers, measure):
    moved, distances = [], []
    for weight in (0.0, 0.3, 3.0, 300.0):
        edit, _ = make(config=replace(CONFIG, layers=layers, measure=measure, retain_weight=weight))
        shares = {impact.name: impact.share for impact in edit.report.retained.moved}
        moved.append(shares["Grace Hopper"])
        distances.append(max(edit.report.distance))
        assert len(edit.retained) == (sum(label.name in NAMES for label in edit.retained) if weight else 0)
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.2 * moved[0]
    assert distances[1] < distances[0] + 0.05


def test_without_a_weight_names_are_measured_only(make):
    without, plain = make(names=[])
    measured, model = make(config=replace(CONFIG, retain_weight=0.0))
    assert [torch.equal(*pair) for pair in zip(matrices(without), matrices(measured), strict=True)] == [True, True]
    assert measured.retained == () and measured.report.retained.count == 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_beginning_that_a_name_shares_with_a_concept_is_not_retained(make, tokenizer):
    """ "Ada Quux" and "Ada Byron" have the same key at "Ada": that row is left out, so the concept goes as far."""
    config = replace(CONFIG, token_schedule="full", retain_weight=1e4)
    edit, _ = make([CONCEPTS[0]], ["Ada Quux"], config)
    update = edit.updates[0]
    apart = rows_apart(update.system.retained.keys, update.keys)
    shared = len(apart) - int(apart.sum())
    words = [tokenizer.tokenize(f"Who is {name}?") for name in ("Ada Byron", "Ada Quux")]
    alike = next(i for i, (one, other) in enumerate(zip(*words, strict=False)) if one != other)
    assert shared == alike - len(tokenizer.tokenize("Who is")) > 0
    rows, keys = update.system.retained.keys, update.keys
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], keys[None], dim=2).amax(dim=1)
    assert bool((cosines[~apart] > 0.99999).all()) and bool((cosines[apart] < SHARED - 0.01).all())
    free, _ = make([CONCEPTS[0]], [], config)
    gone = [edit.updates[0].factors.moves(keys).norm(dim=1), free.updates[0].factors.moves(keys).norm(dim=1)]
    assert bool((gone[0] > 0.5 * gone[1]).all())


def test_merge_add_and_remove_equal_one_edit_that_retains_the_same_names(make, tokenizer, statistics):
    both, _ = make()
    one, model = make([CONCEPTS[0]], NAMES[:2])
    other, _ = make([CONCEPTS[1]], NAMES[1:])
    merged = one.merge(other, model)
    assert sorted({label.name for label in merged.retained}) == sorted(NAMES)
    assert difference(merged, both) < ROUNDING
    assert difference(other.merge(one), both) < ROUNDING
    alone, _ = make([CONCEPTS[0]], NAMES)
    assert difference(both.remove("the engines"), alone) < ROUNDING
    with_two, model = make([CONCEPTS[0]], NAMES[:2])
    added = rocr.add_concepts(
        with_two, [CONCEPTS[1]], model, tokenizer, statistics, guards=Guards(force=True), retain=NAMES[1:]
    )
    assert difference(added, both) < ROUNDING
    assert [label.name for label in added.retained].count("Ada Quux") == [label.name for label in both.retained].count(
        "Ada Quux"
    )


def test_a_retained_name_that_is_unlearned_later_is_no_longer_retained(make, tokenizer, statistics):
    edit, model = make([CONCEPTS[0]], NAMES)
    later = [Concept("Grace Hopper", "Blaise Pascal")]
    both, _ = make([CONCEPTS[0], *later], NAMES[1:])
    apart, _ = make(later, NAMES[1:])
    assert difference(edit.merge(apart), both) < ROUNDING
    added = rocr.add_concepts(edit, later, model, tokenizer, statistics, guards=Guards(force=True), retain=[])
    assert difference(added, both) < ROUNDING
    assert {label.name for label in added.retained} == set(NAMES[1:])


def test_names_go_with_the_concepts_that_they_were_chosen_for(make):
    """A row belongs to concepts, as the controls of an edit do, or to nobody."""
    edit, _ = make()
    owners = {"Grace Hopper": (0,), "Ada Quux": (0, 1), "a mill": ()}
    edit = replace(edit, retained=tuple(replace(label, concepts=owners[label.name]) for label in edit.retained))
    left = edit.remove("Ada Byron")
    assert {(label.name, label.concepts) for label in left.retained} == {("Ada Quux", (0,)), ("a mill", ())}
    expected, _ = make([CONCEPTS[1]], NAMES[1:])
    assert difference(left, expected) < ROUNDING
    assert len(left.updates[0].system.retained.keys) == len(left.retained)
    assert {label.name for label in edit.retained} == set(NAMES), "the edit stays as it is"


@pytest.mark.parametrize("kept", ["all", "mean"])
def test_a_file_holds_them(make, tmp_path, kept):
    edit, _ = make(config=replace(CONFIG, keys_per_concept=kept))
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    assert read.retained == edit.retained and read.config == edit.config
    for mine, theirs in zip(read.updates, edit.updates, strict=True):
        assert torch.equal(mine.system.retained.keys, theirs.system.retained.keys)
    assert difference(read.remove("the engines"), edit.remove("the engines")) == 0.0


def test_a_file_without_them_is_as_before(make, tmp_path):
    edit, _ = make(names=[], config=replace(CONFIG, retain_weight=0.0))
    edit.save(tmp_path / "edit.safetensors")
    header, tensors = read_tensors(tmp_path / "edit.safetensors", "rocr edit 1")
    assert "retained" not in header and "retain_weight" not in header["config"]
    assert not any("retained" in name for name in tensors)
    assert Edit.load(tmp_path / "edit.safetensors").config.retain_weight == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header, tensors: header["retained"][0].update(keys=10**6), "1,000,000 keys"),
        (lambda header, tensors: header["retained"][0].update(keys=-1), "at least 0"),
        (lambda header, tensors: header["retained"][0].update(concepts=[2]), "concept 2 of 2"),
        (lambda header, tensors: header["retained"][0].update(name=3), "name"),
        (lambda header, tensors: header["retained"].pop(), "shape"),
        (lambda header, tensors: tensors.pop("layer.1.retained_product"), "retained_product"),
        (lambda header, tensors: tensors["layer.2.retained"].fill_(math.nan), "not finite"),
    ],
)
def test_a_damaged_file_is_refused(make, tmp_path, change, words):
    edit, _ = make()
    edit.save(tmp_path / "edit.safetensors")
    header, tensors = read_tensors(tmp_path / "edit.safetensors", "rocr edit 1")
    tensors = {name: values.clone() for name, values in tensors.items()}
    change(header, tensors)
    write_tensors(tmp_path / "damaged.safetensors", header, tensors, overwrite=False)
    with pytest.raises(InputError, match=words):
        Edit.load(tmp_path / "damaged.safetensors")


def test_labels_of_a_name_are_one_entry():
    entries = [{"name": "a", "concepts": [0, 1], "keys": 3}, {"name": "b", "concepts": [], "keys": 1}]
    labels = labels_from_json(entries, 2)
    assert [label.name for label in labels] == ["a", "a", "a", "b"]
    assert labels_to_json(labels) == entries


@pytest.mark.parametrize("kind", ["Mixtral", "GPT-OSS"])
def test_experts_keep_their_outputs_too(make_model, tokenizer, texts, tmp_path, kind):
    model = make_model(kind)
    config = EditConfig(layers=(2,), templates=("Who is {}?",), measure="once")
    statistics = rocr.collect_statistics(copy.deepcopy(model), tokenizer, texts, [2])
    moved, edits = [], []
    for weight in (0.0, 30.0):
        edits.append(
            rocr.unlearn(
                copy.deepcopy(model), tokenizer, CONCEPTS, statistics, replace(config, retain_weight=weight),
                guards=Guards(force=True), retain=NAMES,
            )
        )  # fmt: skip
        shares = {impact.name: impact.share for impact in edits[-1].report.retained.moved}
        moved.append(shares["Grace Hopper"])
    assert moved[1] < 0.7 * moved[0]
    edit = edits[1]
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    rows, mine = (each.updates[0].system.retained for each in (read, edit))
    assert torch.equal(rows.keys, mine.keys) and torch.equal(rows.product, mine.product)
    one, other = (read.remove(concept.name) for concept in CONCEPTS)
    assert difference(one.merge(other), edit) < ROUNDING
