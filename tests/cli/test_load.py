"""rocr.load: the model, tokenizer and edit of an output folder, and what it refuses."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rocr
from rocr.model.fingerprint import tensor_digest
from tests.support.models import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")


def holds(model, folder):
    """Whether a model has the weights of a folder, as transformers loads them, bit for bit."""
    mine, its = model.state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return mine.keys() == its.keys() and all(torch.equal(tensor, its[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def edit_only(files, tmp_path_factory):
    """An output folder with the edit alone."""
    folder = tmp_path_factory.mktemp("edit_only")
    for name in ("edit.safetensors", "report.json"):
        shutil.copy(files.edited / name, folder)
    return folder


def test_a_whole_model_is_given_with_its_tokenizer_and_its_edit(files):
    found = rocr.load(files.edited)
    assert isinstance(found, rocr.EditedModel)
    assert holds(found.model, files.edited)
    assert not found.model.training
    text = "Ada Byron waters the roses."
    assert found.tokenizer(text) == AutoTokenizer.from_pretrained(files.model)(text)
    assert [concept.name for concept in found.edit.concepts] == ["Ada Byron"]
    found.edit.revert(found.model)
    assert holds(found.model, files.model)


def test_an_edit_alone_is_applied_to_the_named_model(files, edit_only):
    found = rocr.load(str(edit_only), model=files.model)
    assert holds(found.model, files.edited)
    with found.edit.reverted(found.model):
        assert holds(found.model, files.model)
    assert holds(found.model, files.edited)


def test_a_model_that_is_named_takes_the_place_of_that_of_the_folder(files, tmp_path):
    for name in ("edit.safetensors", "report.json", "config.json"):
        shutil.copy(files.edited / name, tmp_path)
    assert holds(rocr.load(tmp_path, model=files.model).model, files.edited)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "holds an edit without a model. Give the model that the edit was made for ("),
        ({"model": "@edited"}, "holds this edit already"),
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"model": 3}, "model must be the path or the hub id of a model, not 3"),
        ({"folder": None}, "folder must be a path"),
        ({"folder": "@model"}, "There is no edit file at"),
        ({"folder": "@edit"}, "is not a folder. Give the output folder"),
        ({"folder": "nowhere"}, "There is no edit file at"),
        ({"device": "nonsense"}, "nonsense"),
    ],
    ids=lambda part: str(part)[:30] if isinstance(part, dict) else "",
)
def test_what_cannot_be_loaded_is_refused_in_a_sentence(files, edit_only, given, sentence):
    places = {name: getattr(files, name.removeprefix("@")) for name in ("@edited", "@model", "@edit")}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    if "device" in given:
        given["folder"] = files.edited
    with pytest.raises(rocr.InputError) as raised:
        rocr.load(**({"folder": edit_only} | given))
    assert sentence in str(raised.value)


def test_a_report_that_cannot_be_read_names_no_model(edit_only, tmp_path):
    shutil.copy(edit_only / "edit.safetensors", tmp_path)
    with pytest.raises(rocr.InputError, match=r"was made for: model="):
        rocr.load(tmp_path)
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(rocr.InputError, match=r"was made for: model="):
        rocr.load(tmp_path)


def test_a_folder_whose_model_does_not_hold_the_edit_is_refused(files, tmp_path):
    folder = shutil.copytree(files.model, tmp_path / "model")
    shutil.copy(files.edit, folder)
    with pytest.raises(rocr.VerificationError, match="is the weight before this edit"):
        rocr.load(folder)
    model = AutoModelForCausalLM.from_pretrained(files.edited)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(folder)
    with pytest.raises(rocr.VerificationError, match=r"layers\.2\.mlp\.down_proj.*is not the weight after this edit"):
        rocr.load(folder)


def test_an_edited_gguf_file_is_loaded_and_its_edit_taken_off(command, concept, files, make_model, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    plain = write_gguf(make_model("Llama", intermediate_size=64), tokenizer, tmp_path / "m.gguf")
    out = tmp_path / "out"
    given = (*concept, "--text", files.text, "--tokens", 500)
    done = command("unlearn", plain, *given, "--save", "gguf,gguf-lora,edit", "--out", out)
    assert done.code == 0, done.errors
    found = rocr.load(out)
    parameters = [update.parameter for update in found.edit.updates]
    after = [tensor_digest(found.model.get_parameter(name)) for name in parameters]
    assert after == [update.applied.after for update in found.edit.updates]
    with found.edit.reverted(found.model):
        before = [tensor_digest(found.model.get_parameter(name)) for name in parameters]
        assert before == [update.applied.before for update in found.edit.updates] != after
    assert [tensor_digest(found.model.get_parameter(name)) for name in parameters] == after


def test_the_context_without_an_edit_needs_the_edit_and_leaves_a_changed_weight(files):
    found = rocr.load(files.edited)
    found.edit.revert(found.model)
    with pytest.raises(rocr.VerificationError, match="is not the weight after this edit"):
        found.edit.reverted(found.model).__enter__()
    assert holds(found.model, files.model)
    found.edit.apply(found.model)
    with (
        pytest.raises(rocr.VerificationError, match="neither the weights after this edit nor those before"),
        found.edit.reverted(found.model) as model,
        torch.no_grad(),
    ):
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1


def test_the_context_ends_with_the_edit_also_where_the_block_fails(files):
    found = rocr.load(files.edited)
    with pytest.raises(ZeroDivisionError), found.edit.reverted(found.model):
        json.dumps(1 / 0)
    assert holds(found.model, files.edited)
