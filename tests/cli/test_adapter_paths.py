"""Where outputs name their base model: so that peft finds it, and without folders that the user did not name."""

import json
import shutil

import pytest
import torch

from tests.support.models import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")


def test_peft_loads_the_adapter_of_a_gguf_file(make_model, tokenizer, concept, command, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # peft asks the hub for a tokenizer of the adapter
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "models").mkdir()
    model = make_model("Llama", intermediate_size=64)
    write_gguf(model, tokenizer, tmp_path / "models" / "m.gguf", "F32")
    given = ("--tokens", 100, "--save", "lora,edit", "--out", "out")
    done = command("unlearn", "models/m.gguf", *concept, *given)
    assert done.code == 0, done.errors
    call = 'AutoPeftModelForCausalLM.from_pretrained("lora", gguf_file="m.gguf")'
    assert call.replace("lora", "out/lora", 1) in done.output.replace("\n", " "), "from where the command ran"
    assert call in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    tokens = torch.tensor([tokenizer("Ada Byron wrote programs.")["input_ids"]])
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("out/lora", gguf_file="m.gguf")
    assert command("apply", "models/m.gguf", "out/edit.safetensors", "--out", "whole").code == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained("whole")
    with torch.no_grad():
        found, wanted, before = (each(tokens).logits for each in (loaded, whole, model))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("place", [".", "models"])
def test_a_gguf_file_is_named_by_its_folder(place, make_model, tokenizer, concept, command, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    write_gguf(make_model("Llama", intermediate_size=64), tokenizer, tmp_path / place / "m.gguf")
    given = ("--tokens", 100, "--save", "lora", "--out", "out")
    assert command("unlearn", f"{place}/m.gguf", *concept, *given).code == 0
    assert json.loads((tmp_path / "out/lora/adapter_config.json").read_text())["base_model_name_or_path"] == place


def test_files_of_an_output_name_no_folder_that_was_not_given(files, concept, command, tmp_path, monkeypatch):
    """Models, lists, texts and statistics that are given by relative paths stay relative."""
    shutil.copytree(files.model, tmp_path / "model")
    shutil.copy(files.text, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    more = ("--tokens", 300, "--save", "model,edit,lora,originals", "--out", "out")
    assert command("unlearn", "model", *concept, "--text", "text.txt", *more).code == 0
    assert command("stats", "model", "--text", "text.txt", "--tokens", 300, "--out", "statistics").code == 0
    assert command("apply", "model", "out/edit.safetensors", "--save", "model,lora", "--out", "copy").code == 0
    written = [path for name in ("out", "copy") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {"report.json", "README.md", "adapter_config.json", "edit.safetensors"} <= {path.name for path in written}
    for path in [*written, tmp_path / "statistics"]:
        assert bytes(tmp_path.name, "utf-8") not in path.read_bytes(), path
    config = json.loads((tmp_path / "out/lora/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "model"
