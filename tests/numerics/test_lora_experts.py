"""An adapter of experts, laid out as vLLM lays it out, gives the edited weights."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import rocr
from rocr import EditConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5,
        reason="before version 5 of transformers, experts are modules of their own or do not say how they are arranged",
    ),
]
LAYERS = [1, 2]


def read_as_vllm(tensors, module, experts):
    """The change (E, out, in) of the experts of a module, by vLLM's arrangement of an adapter's two tensors.

    With rank r, row e · r + i of A (E · r, in) is row i of A_e, and column i · E + e of B (out, r · E) is column i of
    B_e. vLLM multiplies a token of expert e by B_e A_e, whose shape (out, in) is that of the expert's matrix. Source:
    `LoRAModelManager._stack_moe_lora_weights` in vllm/lora/model_manager.py, which reshapes both, and
    `FusedMoE3DWithLoRA` in vllm/lora/layers/fused_moe.py, whose down-projection is w2.
    """
    a, b = (tensors[f"base_model.model.{module}.lora_{end}.weight"] for end in "AB")
    rank = len(a) // experts
    changes = []
    for expert in range(experts):
        a_of = torch.stack([a[expert * rank + i] for i in range(rank)])
        b_of = torch.stack([b[:, i * experts + expert] for i in range(rank)], dim=1)
        changes.append(b_of @ a_of)
    return torch.stack(changes)


@pytest.fixture
def exported(request, make_model, tokenizer, texts, concepts, tmp_path):
    """A mixture before and after an edit, and the tensors and settings of its adapter."""
    model = make_model(request.param, intermediate_size=40)
    original = copy.deepcopy(model)
    statistics = rocr.collect_statistics(model, tokenizer, texts[:6], LAYERS)
    config = EditConfig(layers=LAYERS, templates=("{}", "Who is {}?"))
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=rocr.Guards(force=True))
    edit.export_lora(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    return original, model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"), settings


def weights_of(exported, layer, mixture):
    """The experts' down-projections (E, out, in) before and after the edit."""
    module = exported[0].model.layers[layer].get_submodule(mixture)
    # Of GPT-OSS and Llama 4, (E, in, out).
    is_transposed = module.down_proj.shape[2] == 32
    found = [each.model.layers[layer].get_submodule(mixture).down_proj.detach() for each in exported[:2]]
    return [weights.transpose(1, 2) if is_transposed else weights for weights in found]


@pytest.mark.parametrize("exported", ["Qwen3Moe", "Qwen2Moe", "Deepseek-V3", "GPT-OSS"], indirect=True)
def test_vllm_reads_the_edited_weights(exported):
    _, _, tensors, settings = exported
    assert settings["lora_alpha"] == settings["r"], "vLLM scales by alpha / r"
    for layer in LAYERS:
        before, after = weights_of(exported, layer, "mlp.experts")
        change = read_as_vllm(tensors, f"model.layers.{layer}.mlp.experts", len(before))
        assert change.shape == before.shape and before.shape[1] != before.shape[2]
        assert (after - before).norm() > 0
        # Each weight is rounded once, and the product once.
        torch.testing.assert_close(before + change, after, rtol=1e-6, atol=1e-6 * float(after.abs().max()))


@pytest.mark.parametrize("exported", ["Llama4"], indirect=True)
def test_the_adapter_of_a_transposed_parameter_that_says_so_nowhere_is_peft_s_alone(exported):
    """PEFT takes Llama 4's parameter for (E, out, in), so that the two sides of its adapter are exchanged."""
    for layer in LAYERS:
        before, after = weights_of(exported, layer, "feed_forward.experts")
        change = read_as_vllm(exported[2], f"model.layers.{layer}.feed_forward.experts", len(before))
        torch.testing.assert_close(before + change.transpose(1, 2), after, rtol=1e-6, atol=1e-6)
