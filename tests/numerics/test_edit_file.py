import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import rocr
from rocr import Concept, Edit, EditConfig, InputError
from rocr.edit.file import pack_undo, unpack_undo
from rocr.solve.factors import Factors
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(layers=[1, 2], templates=("Who is {}?",), variants="none")


@pytest.fixture
def edit(model, tokenizer, statistics, concepts):
    return rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)


def test_everything_comes_back(edit, tmp_path):
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.concepts == edit.concepts
    assert loaded.config == edit.config
    assert loaded.fingerprint == edit.fingerprint
    assert loaded.concept_of == edit.concept_of
    assert loaded.computed_with == edit.computed_with and edit.computed_with["rms_norm_eps"] > 0
    assert edit.report.seconds and loaded.report == replace(edit.report, seconds={})
    assert loaded.layers == edit.layers
    for found, expected in zip(loaded.updates, edit.updates, strict=True):
        for factor in ("left", "right"):
            assert torch.equal(getattr(found.factors, factor), getattr(expected.factors, factor))
        for rows in ("keys", "residuals"):
            assert torch.equal(getattr(found, rows), getattr(expected, rows))
        assert (found.layer, found.parameter, found.transposed) == (
            expected.layer,
            expected.parameter,
            expected.transposed,
        )
        assert (found.applied.dtype, found.applied.before, found.applied.after) == (
            expected.applied.dtype,
            expected.applied.before,
            expected.applied.after,
        )
        assert torch.equal(found.applied.undo, expected.applied.undo)


def test_saved_again_it_has_the_same_bytes(edit, tmp_path):
    edit.save(tmp_path / "first")
    Edit.load(tmp_path / "first").save(tmp_path / "second")
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("first", "second")}
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["José Martí", "東京", "{} {0}", "🙂", 'quo"te \\'])
def test_names_of_every_kind(model, tokenizer, statistics, tmp_path, name):
    edit = rocr.unlearn(model, tokenizer, [Concept(name, "a key", (f"{name} 2",))], statistics, CONFIG)
    edit.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").concepts == [Concept(name, "a key", (f"{name} 2",))]


def test_the_kind_of_a_concept_is_stored_only_where_it_is_given(model, tokenizer, statistics, tmp_path):
    files = {}
    for kind in (None, "person", "thing"):
        concepts = [Concept("Ada Byron", "a key", kind=kind)]
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG, guards=rocr.Guards(force=True), ask=0)
        edit.revert(model)
        edit.save(tmp_path / str(kind))
        assert Edit.load(tmp_path / str(kind)).concepts == concepts
        with safe_open(tmp_path / str(kind), "pt") as file:
            files[kind] = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(
        ('"kind": ' in " ".join(metadata.values())) == (kind is not None) for kind, (metadata, _) in files.items()
    )
    same = {kind: same_weights(tensors, files[None][1]) for kind, (_, tensors) in files.items()}
    assert same == {None: True, "person": True, "thing": False}


def test_an_edit_of_one_key(model, tokenizer, statistics, tmp_path):
    config = EditConfig(layers=[1], key_tokens="last", templates=("Who is {}?",))
    edit = rocr.unlearn(model, tokenizer, [Concept("Ada Byron", "Blaise Pascal")], statistics, config)
    assert len(edit.concept_of) == 1
    edit.save(tmp_path / "edit")
    assert torch.equal(Edit.load(tmp_path / "edit").updates[0].factors.left, edit.updates[0].factors.left)


def test_a_file_that_exists_is_kept(edit, tmp_path):
    (tmp_path / "edit").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        edit.save(tmp_path / "edit")
    assert (tmp_path / "edit").read_text() == "mine"
    edit.save(tmp_path / "edit", overwrite=True)
    assert Edit.load(tmp_path / "edit").concepts == edit.concepts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
    changed=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_undo_data_is_packed_without_loss(shape, dtype, changed, seed):
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)
    undo = torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator)
    undo *= (torch.rand(shape, generator=generator) < changed).to(dtype)
    packed, described = pack_undo(undo)
    found = unpack_undo(packed, **json.loads(json.dumps(described)))
    assert found.dtype == dtype and torch.equal(found, undo)


def test_packed_undo_data_is_small_where_little_changed():
    weight = torch.randn(256, 256).bfloat16()
    changed = weight + (torch.randn(256, 1) @ torch.randn(1, 256) * 1e-3).bfloat16()
    undo = weight.view(torch.int16) ^ changed.view(torch.int16)
    packed, _ = pack_undo(undo)
    assert packed.numel() < 0.6 * undo.numel() * 2


@pytest.mark.parametrize("change", [("shape", [3, 4]), ("shape", [2, 2]), ("width", 4), ("width", 3)])
def test_undo_data_of_another_size_is_refused(change):
    packed, described = pack_undo(torch.arange(6, dtype=torch.int16).reshape(2, 3))
    with pytest.raises((ValueError, KeyError)):
        unpack_undo(packed, **{**described, change[0]: change[1]})


@pytest.fixture
def rewrite(edit, tmp_path):
    """rewrite(header, tensors) changes an edit file: both are functions that change what they are given."""
    path = tmp_path / "edit"
    edit.save(path)

    def change(header=lambda header: None, tensors=lambda tensors: None):
        with safe_open(path, framework="pt") as file:
            held, found = json.loads(file.metadata()["rocr"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header(held)
        tensors(found)
        save_file(found, path, metadata={"rocr": json.dumps(held)})
        return path

    return change


def test_damaged_files_are_refused(rewrite):
    path = rewrite()
    whole = path.read_bytes()
    Edit.load(path)
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], whole[1:], b"x" * 500):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=str(path)):
            Edit.load(path)


@pytest.mark.parametrize("field", ["concepts", "config", "fingerprint", "layers", "concept_of", "report", "format"])
def test_missing_fields_are_refused(rewrite, field):
    with pytest.raises(InputError):
        Edit.load(rewrite(header=lambda header: header.pop(field)))


@pytest.mark.parametrize("factor", ["left", "right", "keys", "residuals"])
@pytest.mark.parametrize("flaw", ["missing", "half", "narrow", "nan"])
def test_factors_that_do_not_fit_are_refused(rewrite, factor, flaw):
    name = f"layer.2.{factor}"

    def spoil(tensors):
        found = tensors.pop(name)
        spoiled = {"half": found.half(), "narrow": found[:, :-1].contiguous(), "nan": found * float("nan")}
        if flaw != "missing":
            tensors[name] = spoiled[flaw]

    path = rewrite(tensors=spoil)
    with pytest.raises(InputError, match=str(path)):
        Edit.load(path)


def test_concepts_that_keys_name_must_be_there(rewrite):
    with pytest.raises(InputError, match="names concepts that it does not hold"):
        Edit.load(rewrite(header=lambda header: header["concept_of"].__setitem__(0, 7)))


def test_settings_that_are_unknown_or_out_of_range_are_refused(rewrite):
    with pytest.raises(InputError, match="Unknown settings"):
        Edit.load(rewrite(header=lambda header: header["config"].update(rigde=1.0)))


def test_statistics_are_no_edit(statistics, tmp_path):
    statistics.save(tmp_path / "statistics")
    with pytest.raises(InputError, match="has the format 'rocr statistics 1', but 'rocr edit"):
        Edit.load(tmp_path / "statistics")


def test_an_edit_of_more_keys_than_inputs_holds_no_identity(model, tokenizer, statistics, concepts, tmp_path):
    config = EditConfig(layers=(1,), keys_per_concept="all", ridge=5.0)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config)
    (update,) = edit.updates
    assert len(update.keys) > update.keys.shape[1]
    edit.save(tmp_path / "edit")
    with safe_open(tmp_path / "edit", framework="pt") as file:
        names = set(file.keys())
    assert "layer.1.right" in names and "layer.1.left" not in names
    loaded = Edit.load(tmp_path / "edit")
    assert torch.equal(loaded.updates[0].factors.matrix, update.factors.matrix)
    loaded.revert(model)
    loaded.apply(model)
    assert loaded.updates[0].applied.after == update.applied.after


def test_a_file_of_0_1_with_an_identity_is_read(model, tokenizer, statistics, concepts, tmp_path):
    config = EditConfig(layers=(1,), keys_per_concept="all", ridge=5.0)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config)
    (update,) = edit.updates
    old = replace(edit, updates=[replace(update, factors=Factors(update.factors.left, update.factors.right))])
    old.save(tmp_path / "edit")
    with safe_open(tmp_path / "edit", framework="pt") as file:
        assert "layer.1.left" in file.keys()  # noqa: SIM118
    assert torch.equal(Edit.load(tmp_path / "edit").updates[0].factors.matrix, update.factors.matrix)


def described(header, **changes):
    for layer in header["layers"]:
        layer["undo"] |= changes


@pytest.mark.parametrize(
    "spoil",
    [
        lambda header: described(header, shape=[48, 32]),
        lambda header: described(header, shape=[32 * 48]),
        lambda header: described(header, shape=[1, 32, 48]),
        lambda header: described(header, width=2),
        lambda header: [layer.update(dtype="torch.bfloat16") for layer in header["layers"]],
        lambda header: [layer.update(dtype="torch.float64") for layer in header["layers"]],
        lambda header: [layer.update(transposed=True) for layer in header["layers"]],
    ],
    ids=["transposed", "flat", "deeper", "narrow", "another dtype", "unknown dtype", "transposed weight"],
)
def test_what_undoes_an_edit_has_the_shape_and_the_width_of_the_weight(rewrite, spoil):
    with pytest.raises(InputError, match=r"undo data|the weight was"):
        Edit.load(rewrite(header=spoil))


def test_nothing_is_undone_where_one_layer_cannot_be(edit, model, weights_of):
    before = weights_of(model)
    update = edit.updates[-1]
    edit.updates[-1] = replace(update, applied=replace(update.applied, undo=update.applied.undo.T.contiguous()))
    with pytest.raises(InputError, match=f"{update.parameter} is torch.int32 of shape .48, 32."):
        edit.revert(model)
    assert same_weights(weights_of(model), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("divergence", "0.1"),
        ("divergence", [0.1]),
        ("divergence", True),
        ("divergence", 10**400),
        ("statistics", []),
        ("statistics", {"tokens": "many"}),
        ("statistics", {"tokens": 1.5}),
        ("statistics", {"tokens": 10**30}),
        ("statistics", {"text": 5}),
        ("statistics", {"dtype": None}),
        ("statistics", {"length": "x"}),
        ("seconds", []),
        ("seconds", {"solve": "long"}),
        ("distance", ["near", "far"]),
        ("limits_passed", [5]),
        ("inexact", ["1"]),
        ("collisions", 5),
        ("collisions", {"layer": 1}),
        ("neighbours", "none"),
        ("layers", []),
        ("layers", None),
    ],
)
def test_a_report_whose_values_are_of_other_types_is_refused(rewrite, field, value):
    def spoil(header):
        if field == "layers" and value == []:
            header["report"]["layers"] = header["report"]["layers"][1:]
        else:
            header["report"][field] = value

    with pytest.raises(InputError):
        Edit.load(rewrite(header=spoil))


def test_numbers_of_a_layer_must_be_numbers(rewrite):
    for name in ("relative_norm", "closed", "surviving", "condition", "ridge", "keys"):
        path = rewrite(header=lambda header, name=name: header["report"]["layers"][0].update({name: "much"}))
        with pytest.raises(InputError, match=r"much|numbers"):
            Edit.load(path)
