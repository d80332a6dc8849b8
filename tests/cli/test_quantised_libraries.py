"""Edited models that the library of their scheme loads: bitsandbytes, compressed-tensors and gptqmodel.

The models of the first two are quantised by the library itself. gptqmodel compiles its kernels when it first runs.
"""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rocr
from rocr.model.architecture import find_architecture
from rocr.model.load import find_model, load_model
from rocr.model.quantised.opening import open_down_projections
from tests.support.models import TEXTS
from tests.support.quantised import (
    EDIT,
    EDITED,
    check_redirect,
    moved,
    run,
    write_awq,
    write_gptq,
    write_int4_mixture,
    write_plain,
)

pytestmark = pytest.mark.slow
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
COMPRESSED = ("W4A16", "NVFP4A16", "MXFP4A16", "FP8_DYNAMIC", "W8A8")
GPTQMODEL = {"GPTQ": write_gptq, "GPTQ-desc_act": lambda folder: write_gptq(folder, ordered=False), "AWQ": write_awq}


def write_bitsandbytes(plain, folder, scheme, **settings):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**BITSANDBYTES[scheme], **settings)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(folder)


def write_compressed(plain, folder, scheme):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(plain)
    apply_quantization_config(model, QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"]))
    for module in model.modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is None:
            continue
        values, more = module.weight.data.float(), {}
        if hasattr(module, "weight_global_scale"):
            module.weight_global_scale.data.fill_(float(448 * 6 / values.abs().max()))
            more["global_scale"] = module.weight_global_scale.data
        parts = values.unflatten(1, (-1, arguments.group_size or values.shape[1]))
        scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments, **more)
        module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.fixture(scope="module", params=[*BITSANDBYTES, *COMPRESSED, *GPTQMODEL])
def quantised(request, tmp_path_factory):
    """The scheme and the folder of a quantised model."""
    if request.param in GPTQMODEL:
        pytest.importorskip("optimum")
        pytest.importorskip("gptqmodel")
        folder = tmp_path_factory.mktemp("quantised")
        GPTQMODEL[request.param](folder)
        return request.param, folder
    plain, folder = (tmp_path_factory.mktemp(name) for name in ("plain", "quantised"))
    write_plain(plain)
    write = write_bitsandbytes if request.param in BITSANDBYTES else write_compressed
    write(plain, folder, request.param)
    copy_tokenizer(plain, folder)
    return request.param, folder


def copy_tokenizer(plain, folder):
    for path in plain.glob("*token*"):
        shutil.copy(path, folder / path.name)
    shutil.copy(plain / "chat_template.jinja", folder / "chat_template.jinja")


@pytest.mark.parametrize("output", ["plain", "keep", "adapter"])
def test_the_library_loads_the_result_and_finds_the_redirect(quantised, output, tmp_path):
    _, folder = quantised
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(TEXTS) * 40)
    code, _, errors = run("unlearn", folder, *EDIT, "--text", text, "--out", out, "--quantised", output)
    assert code == 0, errors
    edit = rocr.Edit.load(out / "edit.safetensors")
    before = AutoModelForCausalLM.from_pretrained(folder)
    if output == "adapter":
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(folder)
        base(torch.zeros((1, 1), dtype=torch.long))
        after = peft.PeftModel.from_pretrained(base, out / "lora").get_base_model()
    else:
        after = AutoModelForCausalLM.from_pretrained(out)
    for model in (before, after):  # compressed-tensors unpacks at the first run
        model(torch.zeros((1, 1), dtype=torch.long))
    check_redirect(before, after, folder, edit, 0.4)
    assert run("verify", out)[0] == 0
    if output != "adapter":
        code, _, errors = run("revert", out, "--out", tmp_path / "back")
        assert code == 0, errors
        for path in folder.iterdir():
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_opened_weights_are_those_of_the_library(quantised):
    scheme, folder = quantised
    loaded, library = (load_model(find_model(str(folder))) for _ in range(2))
    assert open_down_projections(loaded, 2) == ["model.layers.0.mlp.down_proj", *EDITED]
    library.model(torch.zeros((1, 1), dtype=torch.long))
    for layer in range(3):
        weight = find_architecture(loaded.model).down_projection(layer).weight
        keys = torch.eye(weight.shape[1]).to(weight.dtype)
        theirs = library.model.get_submodule(f"model.layers.{layer}.mlp.down_proj")(keys).T
        difference = (theirs - weight).float().norm() / weight.float().norm()
        assert difference < (0.02 if scheme in (*BITSANDBYTES, *GPTQMODEL, "FP8_DYNAMIC", "W8A8") else 1e-6)


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_a_model_is_edited_in_part_as_its_files_say(quantised, output, tmp_path):
    _, folder = quantised
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(TEXTS) * 40)
    more = ("--text", text, "--out", out, "--quantised", output, "--partial")
    code, _, errors = run("unlearn", folder, *EDIT, *more)
    assert code == 0, errors
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, out))
    for model in (before, after):
        model(torch.zeros((1, 1), dtype=torch.long))
    check_redirect(before, after, folder, rocr.Edit.load(out / "edit.safetensors"), 0.4)


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_a_quantised_shared_expert_beside_plain_experts(output, tmp_path):
    """bitsandbytes quantises the matrices of a shared expert, and not the experts that transformers stacks."""
    plain, folder, text, out = (tmp_path / name for name in ("plain", "quantised", "text.txt", "out"))
    text.write_text(" ".join(TEXTS) * 40)
    write_plain(plain, "Qwen2Moe", moe_intermediate_size=64, shared_expert_intermediate_size=64)
    write_bitsandbytes(plain, folder, "nf4", llm_int8_skip_modules=["lm_head", "shared_expert_gate"])
    copy_tokenizer(plain, folder)
    code, _, errors = run("unlearn", folder, *EDIT, "--text", text, "--out", out, "--quantised", output)
    assert code == 0, errors
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, out))
    assert moved(before, after, folder) < 0.9
    assert "matches its records" in run("verify", out)[1]
    assert run("revert", out, "--out", tmp_path / "back")[0] == 0
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("output", ["keep", "adapter"])
def test_experts_of_compressed_tensors(output, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, text, out = (tmp_path / name for name in ("model", "text.txt", "out"))
    text.write_text(" ".join(TEXTS) * 40)
    write_int4_mixture(folder)
    code, _, errors = run("unlearn", folder, *EDIT, "--text", text, "--out", tmp_path / "plain")
    assert code == 2 and "--quantised keep" in errors and not (tmp_path / "plain").exists()
    code, _, errors = run("unlearn", folder, *EDIT, "--text", text, "--out", out, "--quantised", output)
    assert code == 0, errors
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder if output == "adapter" else place) for place in (folder, out)
    )
    for model in (before, after):
        model(torch.zeros((1, 1), dtype=torch.long))
    if output == "adapter":
        peft = pytest.importorskip("peft")
        after = peft.PeftModel.from_pretrained(after, out / "lora").merge_and_unload()
    assert moved(before, after, folder) < 0.9
