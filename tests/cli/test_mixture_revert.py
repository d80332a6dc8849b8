"""`rocr revert` of a mixture with a shared expert, whose blocks are not found without its weights."""

import dataclasses

import pytest
import torch

import rocr
from rocr.model.load import find_model
from rocr.model.load_partial import empty_model
from tests.support.vision import stored_tensors

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def edited(make_model, tokenizer, files, concept, command, tmp_path):
    """A tiny Qwen2-MoE in a folder, and the output of an edit of its experts."""
    make_model("Qwen2Moe").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = command("unlearn", tmp_path / "model", *concept, "--text", files.text, "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    return tmp_path / "model", tmp_path / "out"


def test_every_expert_gets_its_bytes_back(edited, command, tmp_path):
    model, out = edited
    done = command("revert", out, "--out", tmp_path / "back")
    assert done.code == 0, done.errors
    before, after, back = map(stored_tensors, (model, out, tmp_path / "back"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("shared_expert" in name for name in changed) and any(".experts." in name for name in changed)
    assert before.keys() == back.keys() and all(torch.equal(back[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "wrong",
    [{"parameter": "model.layers.1.mlp.none.weight"}, {"width": 7}, {"experts": 5, "expert": 4}, {"parameter": ""}],
)
def test_an_edit_of_another_mixture_is_refused(wrong, edited):
    model, out = edited
    edit = rocr.Edit.load(out / "edit.safetensors")
    parts = tuple(dataclasses.replace(part, **wrong) for part in edit.updates[0].parts)
    other = dataclasses.replace(edit, updates=[dataclasses.replace(edit.updates[0], parts=parts), *edit.updates[1:]])
    with pytest.raises(rocr.InputError, match="The edit changes"):
        other.revert(empty_model(find_model(str(model))))
