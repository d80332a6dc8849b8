import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rocr
from rocr import Concept, EditConfig, InputError, RocrError
from rocr.model.load import LoadedModel, ModelSource, find_model, load_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.tensor([[5, 61, 72, 83, 94]])


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A model as transformers saves it."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_folder_is_loaded_as_it_was_saved(folder, model, tokenizer, dtype):
    loaded = load_model(find_model(str(folder)), dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype or torch.float32}
    assert not loaded.model.training
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.source.inputs == (folder,)
    if dtype != torch.bfloat16:
        assert torch.equal(logits(loaded.model), logits(model))


def test_weights_keep_the_dtype_they_are_stored_in(model, tokenizer, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path)))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_what_is_saved_is_a_plain_folder(folder, tmp_path):
    loaded = load_model(find_model(str(folder)))
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded.model))
    AutoTokenizer.from_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(loaded.model.state_dict())
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def edit_model(loaded, texts):
    statistics = rocr.collect_statistics(loaded.model, loaded.tokenizer, texts, [1])
    config = EditConfig(layers=[1], templates=("Who is {}?",))
    return rocr.unlearn(loaded.model, loaded.tokenizer, [Concept("Ada Byron", "Blaise Pascal")], statistics, config)


def test_an_edit_beside_the_weights_is_not_taken_for_weights(folder, texts, tmp_path):
    loaded = load_model(find_model(str(folder)))
    edit = edit_model(loaded, texts)
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out")
    edit.save(tmp_path / "out" / "edit.safetensors")
    again = load_model(find_model(str(tmp_path / "out")))
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_a_gguf_file_is_loaded_edited_and_saved_as_a_plain_folder(gguf_file, model, tokenizer, texts, tmp_path):
    source = find_model(str(gguf_file))
    assert source.inputs == (gguf_file,)
    loaded = load_model(source)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    close = (logits(loaded.model) - logits(model)).norm() / logits(model).norm()
    assert close < 0.05, "8-bit weights"
    text = "Who is Robert Downey Jr.?"
    assert loaded.tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]
    edit_model(loaded, texts)
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded.model))
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_models_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "file.gguf").write_text("text")
    for name, sentence in [
        ("empty", r"the folder has no config\.json"),
        ("file", r"neither a \.gguf file nor a folder"),
        ("file.gguf", "it does not begin with the bytes 'GGUF'"),
        ("missing.gguf", "does not exist or is not a file"),
        ("missing", "does not exist and is not the id of a model"),
        ("a/b/c", "does not exist and is not the id of a model"),
    ]:
        with pytest.raises(InputError, match=sentence) as error:
            find_model(str(tmp_path / name))
        assert name in str(error.value)


def test_only_a_local_folder_is_a_checkpoint_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)).checkpoint_folder == tmp_path
    assert find_model(str(tmp_path / "m.gguf")).checkpoint_folder is None
    assert find_model("owner/name").checkpoint_folder is None


def test_a_hub_id_is_not_downloaded_unless_that_was_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = find_model("owner/no-such-model")
    assert source == ModelSource("owner/no-such-model", None) and source.inputs == ()
    with pytest.raises(InputError, match=r"owner/no-such-model failed: .* --download allows it"):
        load_model(source)


@pytest.mark.parametrize("damage", ["config", "kind", "weights", "tokenizer"])
def test_folders_that_are_damaged_are_refused(folder, damage):
    if damage == "config":
        (folder / "config.json").write_text("{broken")
    elif damage == "kind":
        (folder / "config.json").write_text('{"model_type": "no such family"}')
    elif damage == "weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    else:
        (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(InputError, match=str(folder)):
        load_model(find_model(str(folder)))


def test_a_folder_that_cannot_be_written_to(model, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    loaded = LoadedModel(model, tokenizer, ModelSource("tiny", None))
    with pytest.raises(RocrError, match="cannot be written"):
        save_model(loaded, tmp_path / "file" / "below")
