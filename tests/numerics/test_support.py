"""Edits of sparse models keep the zeros of the weights: what the update of a row then is, and what an edit can do."""

import copy
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, Edit, EditConfig, Guards, InputError
from rocr.edit.support import SPARSE, pack_support, unpack_support
from rocr.errors import VerificationError
from rocr.io.tensors import read_tensors, write_tensors
from rocr.solve.factors import Factors
from rocr.solve.metric import build_metric
from rocr.solve.solve import solve_layer
from rocr.solve.support import MAX_ROWS

pytestmark = pytest.mark.usefixtures("one_thread")
CONCEPTS = [Concept("Ada Byron", "Blaise Pascal"), Concept("the engines", "the roses")]
CONFIG = EditConfig(layers=(1, 2), templates=("Who is {}?", "It is about {}."), measure="once")
GUARDS = Guards(force=True)


def unstructured(weight: torch.Tensor) -> torch.Tensor:
    """The half of the elements that are not zero, drawn at random."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two elements of each four of a row with the largest magnitude."""
    fours = weight.abs().unflatten(1, (-1, 4))
    kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
    return kept.flatten(1)


PATTERNS = {"unstructured": unstructured, "2:4": two_of_four}


def down_projections(model):
    return [layer.mlp.down_proj.weight for layer in model.model.layers]


def pruned(model, pattern="unstructured"):
    """A copy of a model with down-projections that are half zeros, some of them negative."""
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        for weight in down_projections(sparse):
            # A product with 0 leaves the sign of an element, as pruning by a mask does.
            weight.mul_(PATTERNS[pattern](weight).to(weight.dtype))
    return sparse


@pytest.fixture(params=PATTERNS)
def sparse(request, model):
    return pruned(model, request.param)


def make(model, tokenizer, statistics, concepts=CONCEPTS, config=CONFIG, **more):
    return rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=GUARDS, retain=[], **more)


@pytest.fixture
def collected(tokenizer, texts):
    def collect(model):
        return rocr.collect_statistics(model, tokenizer, texts, layers=[1, 2])

    return collect


def bits(model):
    return [weight.detach().clone().view(torch.int32) for weight in down_projections(model)]


def problem(d_in=24, d_out=40, n=5):
    keys, residuals = torch.randn(n, d_in), torch.randn(n, d_out)
    samples = torch.randn(300, d_in) @ (torch.randn(d_in, d_in) * torch.linspace(0.1, 2, d_in)) / d_in**0.5
    return keys, residuals, samples.T @ samples / 300


def update_of(factors: Factors) -> torch.Tensor:
    assert factors.support is not None
    return (factors.left.double() @ factors.right.double()) * factors.support


@pytest.mark.parametrize("method", ["whitened", "projected"])
@pytest.mark.parametrize("n", [5, 30], ids=["fewer keys than inputs", "more keys than inputs"])
def test_a_full_support_gives_the_dense_update(method, n):
    keys, residuals, moment = problem(n=n)
    metric = build_metric(moment, EditConfig(method=method, threshold=1.0))
    dense = solve_layer(keys, residuals, metric, 0.7)
    full = solve_layer(keys, residuals, metric, 0.7, support=torch.ones(40, 24, dtype=torch.bool))
    expected = dense.factors.left.double() @ dense.factors.right.double()
    assert (update_of(full.factors) - expected).norm() < 2e-5 * expected.norm()
    at = torch.randn(3, 24)
    for rows in (torch.arange(n), torch.tensor([2])):
        assert torch.allclose(full.coefficients(keys, at)(rows), dense.coefficients(keys, at)(rows).float(), atol=1e-4)


def test_each_row_solves_its_least_squares():
    """Row by row in float64, from the formulas of the module."""
    keys, residuals, moment = problem()
    support = torch.rand(40, 24) < 0.6
    share, ridge = support.double().mean(), 0.7
    config = EditConfig()
    metric = build_metric(moment, config, density=float(share))
    solution = solve_layer(keys, residuals, metric, ridge, support=support)
    k, c = keys.double(), moment.double()
    shrunk = share * c + (1 - share) * c.diagonal().diag()
    penalty = config.gamma / c.diagonal().mean() * shrunk + torch.eye(24, dtype=torch.float64)
    product = k @ torch.linalg.inv(penalty)
    values, vectors = torch.linalg.eigh(share * k @ product.T)
    basis = vectors @ (values.rsqrt()[:, None] * vectors.T) @ product
    for row in range(40):
        masked = basis * support[row]
        stacked = torch.cat([k @ masked.T, ridge**0.5 * torch.eye(5, dtype=torch.float64)])
        goal = torch.cat([residuals[:, row].double(), torch.zeros(5, dtype=torch.float64)])
        exact = masked.T @ torch.linalg.lstsq(stacked, goal[:, None]).solution[:, 0]
        found = update_of(solution.factors)[row]
        assert (found - exact).norm() < 1e-4 * exact.norm()
    # tr(C̃ M̃), estimated to some percent.
    assert metric.ordinary == pytest.approx(float((shrunk @ torch.linalg.inv(penalty)).trace()), rel=0.1)


def test_the_objective_is_near_the_exact_minimum_on_the_support():
    """Against the minimiser of (1) on each row's support, and against the dense update with its zeros put back."""
    keys, residuals, moment = problem(d_in=64, d_out=80, n=4)
    support = torch.rand(80, 64) < 0.5
    config = EditConfig()
    metric = build_metric(moment, config, density=0.5)
    ridge = 1.0
    found = update_of(solve_layer(keys, residuals, metric, ridge, support=support).factors)
    dense = solve_layer(keys, residuals, build_metric(moment, config), ridge).factors
    cut = (dense.left.double() @ dense.right.double()) * support
    k, c = keys.double(), moment.double()
    penalty = config.gamma / c.diagonal().mean() * c + torch.eye(64, dtype=torch.float64)
    exact = torch.zeros(80, 64, dtype=torch.float64)
    for row in range(80):
        own = support[row]
        system = k[:, own].T @ k[:, own] + ridge * penalty[own][:, own]
        exact[row, own] = torch.linalg.solve(system, k[:, own].T @ residuals[:, row].double())

    def objective(update):
        missing = update @ k.T - residuals.T.double()
        return float(missing.square().sum() + ridge * ((update @ penalty) * update).sum())

    least, start = objective(exact), objective(torch.zeros_like(exact))
    gain = [(start - objective(update)) / (start - least) for update in (found, cut)]
    assert gain[0] > 0.75, f"{gain[0]:.2f} of the possible gain"
    assert gain[0] > gain[1] + 0.1, f"{gain[1]:.2f} by the dense update with its zeros put back"


def test_the_zeros_keep_their_bits(sparse, tokenizer, collected):
    before = bits(sparse)
    zeros = [weight == 0 for weight in down_projections(sparse)]
    edit = make(sparse, tokenizer, collected(sparse))
    for layer, (old, new, zero) in enumerate(zip(before, bits(sparse), zeros, strict=True)):
        assert torch.equal(old[zero], new[zero]), "the sign of a zero too"
        assert (layer in (1, 2)) == bool((old != new).any())
    for layer in edit.report.layers:
        share = zeros[layer.layer].double().mean()
        assert f"{share:.1%} of the weight are zeros, which it keeps" in layer.metric
        assert all(0.1 < closed <= 1.0 for closed in layer.closed), "the share of the residuals that is closed"
        assert 0.9 * (1 - share) < layer.surviving <= 1 - share
    edit.revert(sparse)
    assert all(map(torch.equal, bits(sparse), before))
    edit.apply(sparse)
    assert torch.equal(bits(sparse)[1][zeros[1]], before[1][zeros[1]])


def test_the_measured_share_is_that_of_the_change_in_the_weights(model, tokenizer, collected):
    sparse = pruned(model)
    before = [weight.detach().double().clone() for weight in down_projections(sparse)]
    edit = make(sparse, tokenizer, collected(sparse), [CONCEPTS[0]])
    update = edit.updates[0]
    change = (down_projections(sparse)[1].double() - before[1]).detach()
    moved, wanted = update.keys.double() @ change.T, update.residuals.double()
    closed = float((moved * wanted).sum() / wanted.square().sum())
    assert edit.report.layers[0].closed[0] == pytest.approx(closed, rel=1e-4)
    norm = edit.report.layers[0].relative_norm
    assert norm == pytest.approx(float(change.norm() / before[1].norm()), rel=1e-4)


def test_settings_and_the_automatic_choice(model, tokenizer, collected):
    sparse = pruned(model)
    statistics = collected(sparse)
    filled = make(sparse, tokenizer, statistics, config=replace(CONFIG, keep_zeros=False))
    assert all(update.factors.support is None for update in filled.updates)
    assert not (down_projections(sparse)[1] == 0).any()
    filled.revert(sparse)
    kept = [
        make(copy.deepcopy(sparse), tokenizer, statistics, config=replace(CONFIG, keep_zeros=each))
        for each in (None, True)
    ]
    for one, other in zip(*(edit.updates for edit in kept), strict=True):
        assert torch.equal(one.factors.left, other.factors.left)
    assert kept[0].config.to_json().get("keep_zeros") is None
    assert EditConfig.from_json(kept[1].config.to_json()).keep_zeros is True
    # Of a dense model nothing changes, with the setting too; a few zeros are kept only with it.
    dense = make(copy.deepcopy(model), tokenizer, collected(model))
    asked = make(copy.deepcopy(model), tokenizer, collected(model), config=replace(CONFIG, keep_zeros=True))
    assert asked.updates[0].factors.support is None
    assert torch.equal(dense.updates[0].factors.left, asked.updates[0].factors.left)
    few = copy.deepcopy(model)
    with torch.no_grad():
        down_projections(few)[1].view(-1)[:: round(1 / SPARSE) + 1] = 0.0
    statistics = collected(few)
    assert make(copy.deepcopy(few), tokenizer, statistics).updates[0].factors.support is None
    asked = make(few, tokenizer, statistics, config=replace(CONFIG, keep_zeros=True))
    assert asked.updates[0].factors.support is not None
    assert asked.updates[1].factors.support is None, "that layer has no zeros"


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_a_wrong_setting(value):
    with pytest.raises(InputError, match="keep_zeros must be true, false or none"):
        EditConfig(keep_zeros=value)


def test_a_file_holds_what_applies_and_changes_the_edit(sparse, tokenizer, collected, tmp_path):
    first = copy.deepcopy(sparse)
    edit = make(sparse, tokenizer, collected(sparse))
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    other = copy.deepcopy(first)
    loaded.apply(other)
    assert all(map(torch.equal, bits(other), bits(sparse)))
    loaded.revert(other)
    assert all(map(torch.equal, bits(other), bits(first)))
    for mine, theirs in zip(edit.updates, loaded.updates, strict=True):
        assert torch.equal(mine.factors.support, theirs.factors.support)
        assert torch.equal(mine.system.support, theirs.system.support)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == (tmp_path / "edit.safetensors").read_bytes()


def test_a_model_with_other_zeros_is_refused(model, tokenizer, collected, tmp_path):
    sparse = pruned(model)
    edit = make(sparse, tokenizer, collected(sparse))
    edit.revert(sparse)
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        zeros = (down_projections(other)[2] == 0).nonzero()[:3]
        down_projections(other)[2][zeros[:, 0], zeros[:, 1]] = 0.01
    before = bits(other)
    with pytest.raises(InputError, match=r"keeps the zeros of model.layers.2.mlp.down_proj.weight, but 3 of its"):
        edit.apply(other, allow_fingerprint_mismatch=True)
    assert all(map(torch.equal, bits(other), before))


def test_remove_add_and_merge_solve_on_the_support(model, tokenizer, collected):
    sparse = pruned(model)
    statistics, zeros = collected(sparse), [weight == 0 for weight in down_projections(sparse)]
    both = make(copy.deepcopy(sparse), tokenizer, statistics)
    one, other = (make(copy.deepcopy(sparse), tokenizer, statistics, [concept]) for concept in CONCEPTS)
    held = copy.deepcopy(sparse)
    first = make(held, tokenizer, statistics, [CONCEPTS[0]])
    added = first.add([CONCEPTS[1]], held, tokenizer, statistics, guards=GUARDS)
    changed = {"removed": (both.remove("the engines"), one), "merged": (one.merge(other), both), "added": (added, both)}
    for name, (found, expected) in changed.items():
        for mine, theirs in zip(found.updates, expected.updates, strict=True):
            exact = update_of(theirs.factors)
            assert (update_of(mine.factors) - exact).norm() < 1e-3 * exact.norm(), name
    for weight, zero in zip(down_projections(held), zeros, strict=True):
        assert torch.equal(weight == 0, zero)
    merged = one.merge(other, copy.deepcopy(sparse))
    assert merged.updates[0].applied is not None


def test_an_edit_of_other_zeros_is_not_merged(model, tokenizer, collected):
    one, other = pruned(model), pruned(model, "2:4")
    first = make(one, tokenizer, collected(one), [CONCEPTS[0]])
    second = make(other, tokenizer, collected(other), [CONCEPTS[1]])
    with pytest.raises(InputError):
        first.merge(second)


def test_adapters_are_refused(model, tokenizer, collected, tmp_path):
    sparse = pruned(model)
    edit = make(sparse, tokenizer, collected(sparse))
    for rank in (None, 1):
        with pytest.raises(InputError, match="which would fill its zeros"):
            edit.export_lora(tmp_path / "lora", rank)
    assert not (tmp_path / "lora").exists()


def test_retained_names_are_rows_of_each_system(model, tokenizer, collected):
    sparse = pruned(model)
    statistics, names = collected(sparse), ["Grace Hopper", "a mill"]
    moved = []
    for weight in (0.0, 30.0):
        config = replace(CONFIG, retain_weight=weight)
        edit = rocr.unlearn(
            copy.deepcopy(sparse), tokenizer, CONCEPTS, statistics, config, guards=GUARDS, retain=names, ask=0
        )
        moved.append(next(each.share for each in edit.report.retained.moved if each.name == "Grace Hopper"))
    assert moved[1] < 0.6 * moved[0]


def test_too_many_keys(monkeypatch, model, tokenizer, collected):
    monkeypatch.setattr("rocr.solve.support.MAX_ROWS", 1)
    sparse = pruned(model)
    before = bits(sparse)
    with pytest.raises(InputError, match=r"at most 1 keys are possible: .*--fill-zeros"):
        make(sparse, tokenizer, collected(sparse))
    assert all(map(torch.equal, bits(sparse), before))
    assert MAX_ROWS == 2048


def test_damaged_files(model, tokenizer, collected, tmp_path):
    path = tmp_path / "edit.safetensors"
    sparse = pruned(model)
    make(sparse, tokenizer, collected(sparse)).save(path)
    header, tensors = read_tensors(path, "rocr edit 1")
    name = "layer.1.support"
    flaws = {
        "not hold where they are": (header, {key: value for key, value in tensors.items() if key != name}),
        "a support is": (header, tensors | {name: tensors[name][:, :-1].contiguous()}),
        "a support is torch.float32": (header, tensors | {name: tensors[name].float()}),
        "not of a weight|those of a weight": (
            {**header, "layers": [{**layer, "support": [4, 8]} for layer in header["layers"]]},
            tensors | {f"layer.{layer}.support": torch.zeros(4, 1, dtype=torch.uint8) for layer in (1, 2)},
        ),
    }
    for i, (message, (other, values)) in enumerate(flaws.items()):
        damaged = tmp_path / f"{i}.safetensors"
        write_tensors(damaged, other, values)
        with pytest.raises(InputError, match=message):
            Edit.load(damaged)


@pytest.mark.parametrize("columns", [1, 8, 13, 64])
def test_a_support_as_bits(columns):
    support = torch.rand(7, columns) < 0.5
    packed = pack_support(support)
    assert packed.shape == (7, -(-columns // 8))
    assert torch.equal(unpack_support(packed, 7, columns), support)


def test_revert_needs_the_edited_weights(model, tokenizer, collected):
    sparse = pruned(model)
    edit = make(sparse, tokenizer, collected(sparse))
    with torch.no_grad():
        down_projections(sparse)[1][0, 0] += 1.0
    with pytest.raises(VerificationError):
        edit.revert(sparse)
