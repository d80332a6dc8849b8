import copy
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, Edit, EditConfig, GuardError, InputError, VerificationError
from rocr.solve.factors import Factors
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(layers=[1, 2], templates=("Who is {}?",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def edited(model, tokenizer, statistics, concepts):
    """A model with its edit."""
    return model, rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma2"], indirect=True)
def test_undo_and_redo_to_the_last_bit(family, dtype, make_model, tokenizer, texts, concepts, weights_of, tmp_path):
    model = make_model(family).to(dtype)
    other, before = copy.deepcopy(model), weights_of(model)
    statistics = rocr.collect_statistics(model, tokenizer, texts, CONFIG.layers)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    after = weights_of(model)
    assert not same_weights(before, after)

    edit.revert(model)
    assert same_weights(weights_of(model), before)
    edit.apply(model)
    assert same_weights(weights_of(model), after)

    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    loaded.apply(other)
    assert same_weights(weights_of(other), after), "on another copy, the same bytes"
    Edit.load(tmp_path / "edit").revert(model)
    loaded.revert(other)
    assert same_weights(weights_of(model), before) and same_weights(weights_of(other), before)


def test_stacked_edits_come_off_in_reverse_order_only(model, tokenizer, texts, weights_of):
    names = ["Ada Byron", "Robert Downey Jr.", "Æsop"]
    states, edits = [weights_of(model)], []
    for name in names:
        statistics = rocr.collect_statistics(model, tokenizer, texts, CONFIG.layers)
        edits.append(rocr.unlearn(model, tokenizer, [Concept(name, "a gardener")], statistics, CONFIG))
        states.append(weights_of(model))
    with pytest.raises(VerificationError, match="Revert later edits first"):
        edits[0].revert(model)
    assert same_weights(weights_of(model), states[3])
    for edit, state in zip(reversed(edits), states[2::-1], strict=True):
        edit.revert(model)
        assert same_weights(weights_of(model), state)


def test_what_is_off_cannot_come_off_again(edited, weights_of):
    model, edit = edited
    edit.revert(model)
    before = weights_of(model)
    with pytest.raises(VerificationError, match="is not the weight after this edit"):
        edit.revert(model)
    assert same_weights(weights_of(model), before)


def test_what_is_on_cannot_come_on_again(edited, weights_of):
    model, edit = edited
    before = weights_of(model)
    with pytest.raises(InputError, match=r"down_proj\.weight holds this edit already"):
        edit.apply(model)
    assert same_weights(weights_of(model), before)


@pytest.mark.parametrize("difference", ["weights", "depth", "family", "settings"])
def test_another_model_is_refused(edited, make_model, difference, weights_of):
    other = {
        "weights": lambda: make_model("Llama", seed=1),
        "depth": lambda: make_model("Llama", num_hidden_layers=2),
        "family": lambda: make_model("GPT-2"),
        "settings": lambda: make_model("Llama", rms_norm_eps=1e-3),
    }[difference]()
    before = weights_of(other)
    named = r"rms_norm_eps .* but this model has rms_norm_eps 0.001" if difference == "settings" else "fingerprint is"
    with pytest.raises(InputError, match=f"The edit was made for LlamaForCausalLM .*{named}"):
        edited[1].apply(other)
    assert same_weights(weights_of(other), before)


def test_a_relative_of_the_model_is_edited_where_that_is_allowed(edited, make_model, weights_of):
    other = make_model("Llama", seed=1)
    before = weights_of(other)
    edited[1].apply(other, allow_fingerprint_mismatch=True)
    changed = {name for name, weight in weights_of(other).items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    edited[1].revert(other)
    assert same_weights(weights_of(other), before)
    with pytest.raises(InputError, match=r"\(32, 48\), but layer 1 of this model has .* \(32, 40\)"):
        edited[1].apply(make_model("Llama", intermediate_size=40), allow_fingerprint_mismatch=True)


def test_an_edit_that_overflows_leaves_the_model_as_it_was(edited, weights_of):
    model, edit = edited
    edit.revert(model)
    model = model.half()
    before = weights_of(model)
    huge = [
        replace(update, factors=Factors(update.factors.left * 1e9, update.factors.right)) for update in edit.updates
    ]
    with pytest.raises(GuardError, match=r"overflow torch\.float16"):
        replace(edit, updates=huge).apply(model, allow_fingerprint_mismatch=True)
    assert same_weights(weights_of(model), before)


def test_a_temporary_edit(edited, weights_of):
    model, edit = edited
    after = weights_of(model)
    edit.revert(model)
    before = weights_of(model)
    with edit.applied(model) as inside:
        assert inside is model
        assert same_weights(weights_of(model), after)
    assert same_weights(weights_of(model), before)
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        raise ZeroDivisionError
    assert same_weights(weights_of(model), before)


def test_an_edit_saved_without_what_undoes_it(edited, model, weights_of, tmp_path, statistics):
    model, edit = edited
    edit.save(tmp_path / "small", undo=False)
    edit.save(tmp_path / "whole")
    assert (tmp_path / "small").stat().st_size < (tmp_path / "whole").stat().st_size
    small = Edit.load(tmp_path / "small")
    after = weights_of(model)
    with pytest.raises(InputError, match="saved without the undo data of"):
        small.revert(model)
    assert same_weights(weights_of(model), after)
    edit.revert(model)
    small.apply(model)
    assert same_weights(weights_of(model), after), "it is still an edit"
    small.revert(model)
    assert not same_weights(weights_of(model), after)
