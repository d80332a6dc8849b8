import pytest
import torch

from rocr.edit.apply import apply_updates, bits, undo_updates
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight, edited_weights
from rocr.errors import GuardError, InputError, VerificationError
from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import tensor_digest
from rocr.ops.reference import updated_weight
from rocr.solve.factors import Factors

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["Llama", "GPT-2"])
def projections(request, make_model):
    """Two down-projections; those of GPT-2 are stored transposed."""
    architecture = find_architecture(make_model(request.param))
    return [architecture.down_projection(layer) for layer in (1, 3)]


def to(projections, dtype):
    for projection in projections:
        projection.module.to(dtype)
    return projections


def factors(projections, rank=3, scale=0.1):
    shapes = [projection.weight.shape for projection in projections]
    lefts = [scale * torch.randn(d_out, rank) for d_out, _ in shapes]
    return lefts, [scale * torch.randn(rank, d_in) for _, d_in in shapes]


def copies(projections):
    return [bits(projection.parameter.data).clone() for projection in projections]


def of(projections):
    return [Weight((projection,)) for projection in projections]


def paired(lefts, rights):
    return [Factors(left, right) for left, right in zip(lefts, rights, strict=True)]


def same(projections, before):
    return all(torch.equal(bits(p.parameter.data), old) for p, old in zip(projections, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 63])
def test_a_weight_becomes_the_exact_sum_rounded_once_and_back_to_the_last_bit(projections, dtype, rank):
    to(projections, dtype)
    before = copies(projections)
    lefts, rights = factors(projections, rank)
    exact = [updated_weight(p.weight, left, right) for p, left, right in zip(projections, lefts, rights, strict=True)]
    applied = apply_updates(of(projections), paired(lefts, rights))
    for projection, wanted in zip(projections, exact, strict=True):
        # A sum in float32 may lie on the other side of a halfway point, so one unit in the last place is allowed.
        step = torch.finfo(dtype).eps * wanted.abs().clamp(min=torch.finfo(dtype).smallest_normal) + 2e-6
        assert ((projection.weight.double() - wanted).abs() <= step).all()
    assert not same(projections, before)
    undo_updates(of(projections), applied)
    assert same(projections, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_subnormals_and_signs_come_back(projections, dtype):
    to(projections, dtype)
    for projection in projections:
        flat = projection.parameter.data.view(-1)
        flat[::5] = 0.0
        flat[1::5] = -0.0
        flat[2::5] = torch.finfo(dtype).smallest_normal / 4
        flat[3::5] *= 1e4
    before = copies(projections)
    applied = apply_updates(of(projections), paired(*factors(projections)))
    undo_updates(of(projections), applied)
    assert same(projections, before)


def test_the_record_says_what_was_done(projections):
    before = [tensor_digest(projection.parameter.data) for projection in projections]
    old = copies(projections)
    applied = apply_updates(of(projections), paired(*factors(projections)))
    for projection, record, digest, first in zip(projections, applied, before, old, strict=True):
        assert (record.before, record.after) == (digest, tensor_digest(projection.parameter.data))
        assert record.dtype == "torch.float32"
        assert record.undo.shape == projection.parameter.shape and record.undo.dtype == torch.int32
        assert torch.equal(first ^ bits(projection.parameter.data), record.undo)


def test_an_overflow_leaves_every_weight_as_it_was(projections):
    to(projections, torch.float16)
    before = copies(projections)
    lefts, rights = factors(projections)
    lefts[1][0] = 1e30
    with pytest.raises(GuardError, match=rf"{projections[1].parameter_name} overflow torch\.float16\. No update was"):
        apply_updates(of(projections), paired(lefts, rights))
    assert same(projections, before)


def test_factors_that_do_not_fit_leave_every_weight_as_it_was(projections):
    before = copies(projections)
    lefts, rights = factors(projections)
    with pytest.raises(InputError, match=r"weights\[1\]"):
        apply_updates(of(projections), paired(lefts, [rights[0], rights[1][:, :-1]]))
    assert same(projections, before)


def test_a_weight_that_changed_since_is_not_undone_nor_is_any_other(projections):
    applied = apply_updates(of(projections), paired(*factors(projections)))
    projections[1].parameter.data[0, 0] += 1
    before = copies(projections)
    words = f"{projections[1].parameter_name} is not the weight after this edit: its sha256 is"
    with pytest.raises(VerificationError, match=words):
        undo_updates(of(projections), applied)
    assert same(projections, before)


def test_nothing_to_undo(projections):
    before = copies(projections)
    with pytest.raises(InputError, match="was never applied"):
        undo_updates(of(projections), [None, None])
    applied = apply_updates(of(projections), paired(*factors(projections)))
    kept = [Applied(record.dtype, record.before, record.after, None) for record in applied]
    with pytest.raises(InputError, match="saved without the undo data of"):
        undo_updates(of(projections), [applied[0], kept[1]])
    undo_updates(of(projections), applied)
    assert same(projections, before)


def test_updates_find_their_weights(model, make_model):
    architecture = find_architecture(model)
    projection = architecture.down_projection(2)
    left, right = torch.zeros(32, 1), torch.zeros(1, 48)
    update = LayerUpdate(2, projection.parameter_name, Factors(left, right), right, left.T)
    assert edited_weights(architecture, [update])[0].blocks[0].parameter is projection.parameter
    for family, changes in (("GPT-2", {}), ("Llama", {"intermediate_size": 40})):
        other = find_architecture(make_model(family, **changes))
        with pytest.raises(InputError, match=r"edit changes model\.layers\.2\.mlp\.down_proj\.weight \(32, 48\), but"):
            edited_weights(other, [update])
    with pytest.raises(InputError, match="Layer 2 is out of range"):
        edited_weights(find_architecture(make_model("Llama", num_hidden_layers=2)), [update])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_update_gives_the_bytes_of_its_product_with_the_identity(make_model, dtype, monkeypatch):
    monkeypatch.setattr("rocr.edit.apply.BLOCK_ELEMENTS", 5 * 48)
    models = [make_model("Llama").to(dtype) for _ in range(2)]
    change = 0.1 * torch.randn(32, 48)
    for model, factors in zip(models, (Factors(None, change), Factors(torch.eye(32), change)), strict=True):
        apply_updates(of([find_architecture(model).down_projection(1)]), [factors])
    first, second = (find_architecture(model).down_projection(1).weight for model in models)
    assert torch.equal(first, second) and not torch.equal(
        first, make_model("Llama").model.layers[1].mlp.down_proj.weight
    )
