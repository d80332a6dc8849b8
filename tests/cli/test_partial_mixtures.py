"""`--partial` on mixtures whose files hold the experts one by one, while transformers stacks them in memory."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import rocr
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.load import find_model, load_model
from rocr.model.load_partial import can_load_partially, load_partial
from tests.support.models import MIXTURES, TEXTS, build_model
from tests.support.quantised import EDIT, EXPERTS, fp8_tensors, run, write_plain, write_shards

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
LAYER = "model.layers."


def write_mixture(folder, kind):
    """Write a tiny Qwen3-MoE, plain or in FP8, with a shard for each layer and expert and one for the rest."""
    write_plain(folder, "Qwen3Moe", **EXPERTS, head_dim=32)
    tensors = load_file(folder / "model.safetensors")
    if kind == "fp8":
        tensors, settings = fp8_tensors(tensors, (64, 32), "float32")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, {name: shard(name) for name in tensors})
    return folder


def shard(name):
    if not name.startswith(LAYER):
        return "head" if name.startswith("lm_head") else "rest"
    layer, _, inner = name.removeprefix(LAYER).partition(".")
    return f"{layer}-{inner.split('.')[2]}" if ".experts." in name else layer


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_only_the_needed_tensors_of_a_sharded_mixture_are_read(kind, tmp_path, monkeypatch):
    model, broken, text = tmp_path / "model", tmp_path / "broken", tmp_path / "text.txt"
    model.mkdir()
    write_mixture(model, kind)
    text.write_text(" ".join(TEXTS) * 40)
    shutil.copytree(model, broken)
    unneeded = [path for path in broken.glob("model-*.safetensors") if path.name[6:].startswith(("3", "head"))]
    assert len(unneeded) == 8
    for path in unneeded:
        path.write_bytes(b"not a safetensors file")
    read = {}

    def counting(method):
        def counted(stored):
            read[stored.file.name, stored.name] = stored.size
            return method(stored)

        return counted

    code, _, errors = run("unlearn", model, *EDIT, "--text", text, "--out", tmp_path / "whole")
    assert code == 0, errors
    for name in ("read", "map"):
        monkeypatch.setattr(StoredTensor, name, counting(getattr(StoredTensor, name)))
    code, _, errors = run("unlearn", broken, *EDIT, "--text", text, "--out", tmp_path / "part", "--partial")
    assert code == 0, errors
    needed = sum(size for (file, _), size in read.items() if file.startswith("model-"))
    whole = sum(path.stat().st_size for path in model.glob("model-*.safetensors"))
    assert needed < 0.8 * whole
    for path in (tmp_path / "part").glob("model-*.safetensors"):
        if path.name in {file.name for file in unneeded}:
            assert os.path.samefile(path, broken / path.name)
        else:
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", [name for name in MIXTURES if name != "Qwen3Moe"])
def test_the_beginning_of_a_mixture_has_the_values_of_the_whole(family, tokenizer, tmp_path):
    build_model(family, len(tokenizer)).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    assert can_load_partially(source, 2)
    whole, part = load_model(source).model, load_partial(source, 2).model
    loaded = {name: values for name, values in part.named_parameters() if values.device.type != "meta"}
    assert any("layers.2." in name and values.ndim == 3 for name, values in loaded.items())
    assert all(torch.equal(values, whole.get_parameter(name)) for name, values in loaded.items())


def test_an_expert_that_is_missing_is_an_error(tmp_path):
    write_mixture(tmp_path, "plain")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = "model.layers.1.mlp.experts.4.down_proj.weight"
    del index["weight_map"][gone]
    path.write_text(json.dumps(index))
    with pytest.raises(rocr.InputError, match=r"mlp\.experts\.down_proj"):
        load_partial(find_model(str(tmp_path)), 1)


def test_experts_that_do_not_fit_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    write_mixture(tmp_path, "fp8")
    monkeypatch.setattr("rocr.model.load_partial.free_memory", lambda: 2**19)
    with pytest.raises(rocr.InputError, match=r"take [\d,]+ bytes of memory, and 524,288 are free"):
        load_partial(find_model(str(tmp_path)), 2)
