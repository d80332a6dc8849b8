"""Models on several devices: every tensor of an edit is on the device of its weight."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import rocr
from rocr import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = rocr.EditConfig(layers=(1, 2), token_schedule="full", retain_weight=0.0)
FORCE = rocr.Guards(force=True)


def load(files, rest, folder):
    """The model of `files` with the embedding and layers 0 to 2 on the CPU, the rest never loaded or on the disk."""
    if rest == "meta":  # accelerate takes a device_map with it for one that runs on the meta device
        model = AutoModelForCausalLM.from_pretrained(files.model)
        for module in (*model.model.layers[3:], model.model.norm, model.lm_head):
            module.to("meta")
        return model
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": rest, "lm_head": rest}
    places |= {f"model.layers.{layer}": "cpu" if layer <= 2 else rest for layer in range(5)}
    return AutoModelForCausalLM.from_pretrained(files.model, device_map=places, offload_folder=folder)


def places_of(model):
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rest", ["meta", "disk"])
def test_layers_elsewhere_stay_there_and_are_not_needed(rest, files, tokenizer, texts, concepts, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(files.model)
    spread = load(files, rest, tmp_path)
    before = places_of(spread)
    assert set(before.values()) == {"cpu", "meta"}
    assert {name for name, place in before.items() if place == "meta"} >= {"lm_head.weight", "model.norm.weight"}
    statistics = [rocr.collect_statistics(model, tokenizer, texts, (1, 2)) for model in (whole, spread)]
    assert statistics[0].fingerprint.model == statistics[1].fingerprint.model
    first = {name: p.clone() for name, p in spread.named_parameters() if p.device.type == "cpu"}
    edits = [
        rocr.unlearn(model, tokenizer, concepts, own, SETTINGS, guards=FORCE)
        for model, own in zip((whole, spread), statistics, strict=True)
    ]
    assert [u.applied.after for u in edits[0].updates] == [u.applied.after for u in edits[1].updates]
    assert places_of(spread) == before
    assert all(
        tensor.device.type == "cpu" for u in edits[1].updates for tensor in (u.factors.left, u.factors.right, u.keys)
    )
    edits[1].revert(spread)
    edits[0].apply(spread)
    edits[0].revert(spread)
    assert places_of(spread) == before
    for name, parameter in spread.named_parameters():
        assert name not in first or torch.equal(parameter, first[name]), name


@pytest.mark.parametrize("rest", ["meta", "disk"])
def test_layers_elsewhere_are_not_edited(rest, files, tokenizer, concepts, statistics, tmp_path):
    spread = load(files, rest, tmp_path)
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.down_proj\.weight is on the meta device"):
        rocr.unlearn(spread, tokenizer, concepts, statistics, rocr.EditConfig(layers=(2, 3)), guards=FORCE)
