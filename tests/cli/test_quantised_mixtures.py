"""Mixtures of experts in FP8 (experts stored one by one) and in MXFP4 (all experts of a layer in one tensor)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rocr
from rocr.model.load import find_model, load_model
from tests.support.models import TEXTS
from tests.support.quantised import (
    EDIT,
    fp8_tensors,
    moved,
    run,
    write_fp8_mixture,
    write_gptq,
    write_mxfp4_mixture,
    write_plain,
    write_tensors,
)

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
WRITERS = {
    "fp8": write_fp8_mixture,
    "fp8-e8m0": lambda folder: write_fp8_mixture(folder, scales="e8m0"),
    "mxfp4": write_mxfp4_mixture,
}
SLOW = ("fp8-e8m0", "mxfp4")
OUTPUTS = ("plain", "keep", "adapter")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(TEXTS) * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def quantised(request, text, tmp_path_factory):
    """The folder of a quantised mixture, and that of its outputs by the value of --quantised."""
    base = tmp_path_factory.mktemp(request.param)
    (base / "model").mkdir()
    WRITERS[request.param](base / "model")
    for output in OUTPUTS:
        arguments = ("--text", text, "--out", base / output, "--quantised", output)
        code, _, errors = run("unlearn", base / "model", *EDIT, *arguments)
        assert code == 0, errors
    return base


def tensors_of(folder):
    """All tensors of a folder, as bytes."""
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    return {name: value.view(torch.uint8) for file in files for name, value in load_file(folder / file).items()}


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_transformers_loads_an_edited_mixture_and_finds_the_redirect(quantised, output):
    before, after = (AutoModelForCausalLM.from_pretrained(quantised / name) for name in ("model", output))
    assert moved(before, after, quantised / "model") < 0.9
    edit = rocr.Edit.load(quantised / output / "edit.safetensors")
    edited = {(part.parameter, part.expert) for update in edit.updates for part in update.parts}
    changed = {
        (name, expert)
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        for expert in (range(len(old)) if old.ndim == 3 else [None])
        if not torch.equal(old if expert is None else old[expert], new if expert is None else new[expert])
    }
    assert changed == edited


def test_the_adapter_has_the_redirect(quantised):
    peft = pytest.importorskip("peft")
    before, base = (AutoModelForCausalLM.from_pretrained(quantised / "model") for _ in range(2))
    adapted = peft.PeftModel.from_pretrained(base, quantised / "adapter" / "lora").merge_and_unload()
    assert not (quantised / "adapter" / "config.json").exists()
    assert moved(before, adapted, quantised / "model") < 0.9


def test_plain_stores_all_experts_of_edited_layers_unquantised(quantised):
    """Loaders run the experts of a layer in one kernel, which takes them in one form."""
    before, after = tensors_of(quantised / "model"), tensors_of(quantised / "plain")
    suffixes = ("_scale_inv", "_blocks", "_scales")
    gone, new = set(before) - set(after), set(after) - set(before)
    assert gone and all(".mlp.experts." in name and name.endswith(suffixes) for name in gone)
    assert not any(
        f"layers.{layer}.mlp.experts" in name for layer in (1, 2) for name in after if name.endswith(suffixes)
    )
    assert all(torch.equal(before[name], after[name]) for name in set(before) & set(after) if ".experts." not in name)
    others = [name for name in before if "layers.3.mlp" in name]
    assert others and all(torch.equal(before[name], after[name]) for name in others)
    assert all(name.endswith("_proj") for name in new)
    settings = json.loads((quantised / "plain" / "config.json").read_text())["quantization_config"]
    assert [name for name in settings["modules_to_not_convert"] if ".experts" in name] == [
        f"model.layers.{layer}.mlp.experts" for layer in (1, 2)
    ]


def test_keep_changes_the_parts_of_edited_experts_alone(quantised):
    before, after = tensors_of(quantised / "model"), tensors_of(quantised / "keep")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("down_proj" in name and "layers.3." not in name for name in changed)
    report = json.loads((quantised / "keep" / "report.json").read_text())
    assert all(0.8 < layer["surviving"] <= 1 for layer in report["quantised"]["layers"])


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_an_edited_mixture_is_verified_and_reverted_byte_for_byte(quantised, output, tmp_path):
    code, shown, _ = run("verify", quantised / output)
    assert code == 0, shown
    code, _, errors = run("revert", quantised / output, "--out", tmp_path / "back")
    assert code == 0, errors
    for path in (quantised / "model").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("output", ["plain", "keep"])
def test_an_edit_is_applied_to_the_files_again(quantised, output, tmp_path):
    edit = quantised / output / "edit.safetensors"
    code, _, errors = run("apply", quantised / "model", edit, "--out", tmp_path / "again", "--quantised", output)
    assert code == 0, errors
    first, again = tensors_of(quantised / output), tensors_of(tmp_path / "again")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_a_changed_expert_is_found(quantised, output, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(quantised / output, copy)
    (part, *_) = json.loads((copy / "report.json").read_text())["weights"][0]["parts"]
    path = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][part["stored"]]
    tensors = load_file(path)
    values = tensors[part["stored"]] if part["expert"] is None else tensors[part["stored"]][part["expert"]]
    values.view(torch.uint8).reshape(-1)[:8] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert run("verify", copy)[0] == 3
    code, _, errors = run("revert", copy, "--out", tmp_path / "back")
    assert code == 3 and "is not the weight after this edit" in errors
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["plain", "keep"])
def test_a_part_of_the_mixture_is_edited_as_the_whole(quantised, text, output, tmp_path):
    more = ("--text", text, "--out", tmp_path / "out", "--quantised", output, "--partial")
    code, _, errors = run("unlearn", quantised / "model", *EDIT, *more)
    assert code == 0, errors
    whole, part = tensors_of(quantised / output), tensors_of(tmp_path / "out")
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)


def test_experts_in_mxfp4_are_edited_in_part(text, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_mxfp4_mixture(model)
    code, _, errors = run("unlearn", model, *EDIT, "--text", text, "--out", out, "--quantised", "keep", "--partial")
    assert code == 0, errors
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, out))
    assert moved(before, after, model) < 0.9
    first, last = tensors_of(model), tensors_of(out)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert "model.layers.1.mlp.experts.down_proj_blocks" in changed
    assert all("mlp.experts.down_proj_" in name and "layers.3." not in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["plain", "keep"])
@pytest.mark.parametrize("shared", ["quantised", "plain"])
def test_a_shared_expert_is_written_as_it_is_stored(shared, output, text, tmp_path):
    model, out, back = (tmp_path / name for name in ("model", "out", "back"))
    model.mkdir()
    write_plain(model, "Qwen2Moe", moe_intermediate_size=64, shared_expert_intermediate_size=64)
    plain = load_file(model / "model.safetensors")
    left = {name: values for name, values in plain.items() if shared == "plain" and ".shared_expert" in name}
    tensors, settings = fp8_tensors({name: plain[name] for name in plain if name not in left}, (64, 32), "float32")
    write_tensors(model, tensors | left, settings | {"modules_to_not_convert": ["lm_head", "shared_expert"]}, 3)
    code, _, errors = run("unlearn", model, *EDIT, "--text", text, "--out", out, "--quantised", output)
    assert code == 0, errors
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, out))
    assert moved(before, after, model) < 0.9
    first, last = tensors_of(model), tensors_of(out)
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    assert not torch.equal(first[name], last[name])
    assert (f"{name}_scale_inv" in last) == (shared == "quantised" and output == "keep")
    assert run("verify", out)[0] == 0
    assert run("revert", out, "--out", back)[0] == 0
    assert all((back / path.name).read_bytes() == path.read_bytes() for path in model.iterdir())


def test_experts_that_loaders_take_in_their_scheme_only(text, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_gptq(model, mixture=True)
    given = ("unlearn", model, *EDIT, "--text", text, "--out", out, "--partial", "--quantised")
    code, _, errors = run(*given, "plain")
    assert code == 2 and "experts.0.down_proj in GPTQ" in errors and "--quantised keep" in errors and not out.exists()
    code, _, errors = run(*given, "keep")
    assert code == 0, errors
    assert run("verify", out)[0] == 0
    assert run("revert", out, "--out", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [(), ("--partial",)])
def test_scales_that_no_weight_is_read_with_are_an_error(more, text, tmp_path):
    """transformers loads such a weight without its scales on a CPU."""
    model = tmp_path / "model"
    model.mkdir()
    write_fp8_mixture(model, shards=1)
    tensors = load_file(model / "model.safetensors")
    for kind in ("weight", "weight_scale_inv"):
        parts = [tensors.pop(f"model.layers.1.mlp.experts.{expert}.down_proj.{kind}") for expert in range(6)]
        stacked = torch.stack([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        tensors[f"model.layers.1.mlp.experts.down_proj{kind.removeprefix('weight')}"] = stacked
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = run("unlearn", model, *EDIT, "--text", text, "--out", tmp_path / "out", *more)
    assert code == 2 and "experts.down_proj_scale_inv" in errors and "one by one" in errors
    assert not (tmp_path / "out").exists()


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Without transformers' check of the device, which makes it dequantise all weights on a CPU."""
    quantizer = "transformers.quantizers.quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer"
    monkeypatch.setattr(f"{quantizer}.validate_environment", lambda self, *args, **options: None)


def test_loaders_that_keep_fp8_find_every_tensor_of_the_output(quantised, like_a_gpu):
    settings = json.loads((quantised / "model" / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] != "fp8":
        pytest.skip("the check of the device is that of FP8")
    for output, kinds in (("plain", {1: torch.bfloat16, 3: torch.float8_e4m3fn}), ("keep", {1: torch.float8_e4m3fn})):
        loaded, found = AutoModelForCausalLM.from_pretrained(quantised / output, output_loading_info=True)
        assert not any(found.values())
        for layer, dtype in kinds.items():
            assert loaded.get_parameter(f"model.layers.{layer}.mlp.experts.down_proj").dtype == dtype


def test_rocr_asks_for_plain_experts_where_transformers_would_keep_them(quantised, like_a_gpu):
    loaded = load_model(find_model(str(quantised / "model"))).model
    assert loaded.get_parameter("model.layers.1.mlp.experts.down_proj").dtype == torch.bfloat16


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_a_dry_run_tells_the_bytes_that_are_written(quantised, text, output):
    given = ("--text", text, "--out", quantised / f"planned-{output}", "--quantised", output, "--dry-run", "--json")
    code, shown, errors = run("unlearn", quantised / "model", *EDIT, *given)
    assert code == 0, errors
    written = json.loads(shown)["written"]
    size = sum(
        path.stat().st_size for path in (quantised / output).glob("model-*.safetensors") if path.stat().st_nlink < 2
    )
    tensors = load_file(quantised / output / "replaced.safetensors")
    replaced = sum(values.nbytes for name, values in tensors.items() if name.startswith("tensor "))
    assert written["model"] == pytest.approx(size, rel=0.03)
    if output == "plain":
        assert written["replaced tensors"] == replaced
    else:  # experts that no key is routed to are counted
        assert replaced <= written["replaced tensors"] < 3 * replaced
