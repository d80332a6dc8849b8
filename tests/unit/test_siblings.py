"""Edits applied to other models: only to fine-tuned relatives, only if allowed, and reverted exactly."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import rocr

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def sibling(files, tmp_path):
    """sibling(*names): the model, fine-tuned a little in these tensors."""

    def make(*names):
        folder = tmp_path / "sibling"
        shutil.copytree(files.model, folder)
        tensors = load_file(folder / "model.safetensors")
        for name in names:
            tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_a_sibling_takes_an_edit_only_where_that_is_allowed(files, sibling, command, digests, tmp_path):
    folder, out = sibling("model.layers.0.self_attn.q_proj.weight", WEIGHT), tmp_path / "out"
    first = digests(folder)
    done = command("apply", folder, files.edit, "--out", out)
    assert done.code == 2 and "fingerprint" in done.errors
    assert not out.exists()
    done = command("apply", folder, files.edit, "--allow-fingerprint-mismatch", "--out", out, "--json")
    assert done.code == 0, done.errors
    assert "evaluate the result" in done.errors
    assert "was made for" in json.loads(done.output)["fingerprint_mismatch"]
    assert "was made for" in (out / "README.md").read_text(encoding="utf-8")
    update = rocr.Edit.load(files.edit).updates[0]
    before, after = (load_file(path / "model.safetensors")[WEIGHT] for path in (folder, out))
    torch.testing.assert_close(after, before + update.factors.left @ update.factors.right, rtol=1e-5, atol=1e-6)
    # The edit now holds the sibling's own bytes; the first edit file does not.
    done = command("revert", out, "--out", tmp_path / "back")
    assert done.code == 0, done.errors
    assert (
        digests(tmp_path / "back")["model.safetensors"]
        == first["model.safetensors"]
        == digests(folder)["model.safetensors"]
    )
    done = command("revert", out, "--edit", files.edit, "--out", tmp_path / "wrong")
    assert done.code == 3 and WEIGHT in done.errors.replace("\n", "")
    assert not (tmp_path / "wrong").exists()


def test_a_sibling_that_differs_after_the_edited_layers_takes_it_as_the_model_does(files, sibling, command, tmp_path):
    folder = sibling("model.layers.4.self_attn.q_proj.weight")
    done = command("apply", folder, files.edit, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.errors
    assert json.loads(done.output)["fingerprint_mismatch"] is None
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[WEIGHT], load_file(files.edited / "model.safetensors")[WEIGHT]
    )


def test_a_model_of_another_shape_is_refused_whatever_is_allowed(files, make_model, tokenizer, command, tmp_path):
    make_model("Llama", intermediate_size=56).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    done = command("apply", tmp_path / "other", files.edit, "--allow-fingerprint-mismatch", "--out", tmp_path / "out")
    assert done.code == 2 and "(32, 48)" in done.errors and "(32, 56)" in done.errors
    assert not (tmp_path / "out").exists()
