"""Families of models are edited right, or refused; the whole sweep is slow."""

import re

import pytest
import torch

from tests.families import table
from tests.families.checks import CHECKS, CheckFailed, Made, examine
from tests.families.shrink import TokenIds, shrink
from tests.families.sweep import chosen, counts, sweep
from tests.families.tiny_models import Family, all_families, tiny_config

pytestmark = pytest.mark.thorough

EXPECTED = {
    "causal/llama": "ok",
    "causal/gpt2": "ok",
    "causal/gemma3_text": "ok",
    "causal/qwen3": "ok",
    "causal/falcon": "ok",
    "causal/opt": "ok",
    "causal/phi3": "ok",
    "causal/olmo2": "ok",
    "causal/granite": "ok",
    "causal/qwen3_moe": "ok",
    "causal/gpt_oss": "ok",
    "causal/mixtral": "ok",
    "causal/deepseek_v3": "ok",
    "causal/mamba": "ok",
    "causal/falcon_h1": "ok",
    "causal/qwen3_next": "ok",
    "causal/bart": "ok",
    "image-text/llava": "ok",
    "image-text/qwen2_5_vl": "ok",
    "seq2seq/t5": "ok",
}
"""What comes of one family of each kind. "wrong" and "traceback" are never accepted."""
ONLY_FOR = {
    "same_in_batches": ("gpt2", "qwen3", "falcon", "gpt_oss", "mamba", "qwen3_next", "bart", "qwen2_5_vl", "t5"),
    "gain_of_larger_weights": ("llama", "gemma3_text", "olmo2", "deepseek_v3", "mamba", "llava", "t5"),
}
"""Checks of several edits each, and the families of the sample that have them: positions and masks of each sort, and
norms behind and before the MLP. The whole sweep runs every check of every family."""
MINIMUM = {"causal": 0.85, "image-text": 0.9, "seq2seq": 0.4}
"""The share of the classes with a tiny model that must be edited."""
FAMILIES = {family.key: family for family in all_families()}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """One thread, as elsewhere for tiny models."""


@pytest.mark.parametrize("key", EXPECTED)
def test_a_family_of_each_kind(key):
    family = FAMILIES[key]
    result = examine(family, without=[check for check, types in ONLY_FOR.items() if family.model_type not in types])
    assert EXPECTED[key] in ("ok", "refused")
    assert result.status == EXPECTED[key], result


@pytest.mark.slow
def test_every_family():
    results = sweep(chosen([]))
    bad = {key: found["message"] for key, found in results.items() if found["status"] in ("wrong", "traceback")}
    assert not bad
    for group, found in counts(results).items():
        if group in MINIMUM:
            built = sum(found.values()) - found["unbuilt"]
            assert found["ok"] >= MINIMUM[group] * built, (group, found)


def test_the_checks_of_some_families_are_those_of_the_sample():
    sampled = {FAMILIES[key].model_type for key in EXPECTED}
    assert all(check in CHECKS and set(types) <= sampled for check, types in ONLY_FOR.items())


def test_a_refusal_says_why():
    refused = {key: found for key, found in table.load().items() if found["status"] == "refused"}
    assert all(len(found["message"]) > 30 and found["message"].endswith(".") for found in refused.values())


def test_the_page_is_that_of_the_results():
    assert table.PAGE.read_text(encoding="utf-8") == table.page(table.load())


def test_the_results_are_of_known_families():
    assert set(table.load()) <= set(FAMILIES)


@pytest.fixture
def made(monkeypatch):
    """The edit of a tiny Llama, before its checks."""
    kept = []
    monkeypatch.setattr(Made, "failed_checks", lambda self, _without: kept.append(self) or {})
    examine(FAMILIES["causal/llama"])
    return kept[0]


def test_a_change_outside_of_the_edit_is_found(made):
    made.only_edited_blocks()
    name = next(name for name in made.edited if "up_proj" in name)
    made.edited[name] += 1
    with pytest.raises(CheckFailed, match="up_proj"):
        made.only_edited_blocks()


def test_a_state_that_does_not_move_is_found(made, monkeypatch):
    made.reverts()
    made.gain()
    monkeypatch.setattr(made, "_gain", lambda: 0.2)
    with pytest.raises(CheckFailed, match=re.escape("0.20")):
        made.gain()


def test_weights_that_do_not_come_back_are_found(made):
    name, _ = next(made.model.named_parameters())
    made.first[name] = made.first[name] + 1
    with pytest.raises(CheckFailed):
        made.reverts()


def test_a_process_that_ends_is_a_result():
    found = sweep([Family("causal", "llama", "LlamaForCausalLM"), Family("causal", "none", "None")], seconds=1)
    assert found["causal/none"]["status"] == "unbuilt"
    assert found["causal/llama"]["status"] in ("ok", "traceback", "unbuilt")


def test_special_tokens_stay_apart_in_a_small_vocabulary():
    ids = TokenIds()
    small = shrink({"image_token_id": 151655, "video_token_id": 151656, "bos_token_id": 151643}, tokens=ids)
    assert small == {"image_token_id": 1022, "video_token_id": 1021, "bos_token_id": 1}
    assert ids.small(151655) == 1022


def test_lists_by_layer_are_cut_to_the_small_depth():
    small = shrink({"num_hidden_layers": 24, "layer_types": ["full_attention"] * 24, "rope_theta": 1e4})
    assert small == {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6, "rope_theta": 1e4}


def test_a_variant_has_its_own_settings():
    variant = FAMILIES["variants/llama@bfloat16"]
    assert (variant.model_type, tiny_config(variant).dtype) == ("llama", torch.bfloat16)
