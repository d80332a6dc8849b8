import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rocr
from rocr.model.fingerprint import tensor_digest
from rocr.model.load import find_model
from rocr.model.load_partial import load_partial
from tests.support.models import TEXTS
from tests.support.quantised import EDIT, EDITED, check_redirect, run, write_awq, write_fp8, write_gptq, write_plain

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(TEXTS) * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("fp8"), shards=3)


@pytest.fixture(scope="module")
def outputs(fp8, text, tmp_path_factory):
    """The outputs of one edit of the FP8 model, by the value of --quantised."""
    base = tmp_path_factory.mktemp("outputs")
    for output in ("plain", "keep", "adapter"):
        code, _, errors = run("unlearn", fp8, *EDIT, "--text", text, "--out", base / output, "--quantised", output)
        assert code == 0, errors
    return base


@pytest.mark.parametrize(("output", "least"), [("plain", 0.9), ("keep", 0.8)])
def test_an_edited_fp8_model_loads_and_has_the_redirect(fp8, outputs, output, least):
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (fp8, outputs / output))
    check_redirect(before, after, fp8, rocr.Edit.load(outputs / output / "edit.safetensors"), least)
    changed = {
        name
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {f"{module}.weight" for module in EDITED}


@pytest.mark.parametrize("output", ["plain", "keep", "adapter"])
def test_an_edited_fp8_model_is_given_with_its_edit(fp8, outputs, output):
    found = rocr.load(outputs / output, model=fp8 if output == "adapter" else None)
    applied = {update.parameter: update.applied for update in found.edit.updates}

    def now():
        return {name: tensor_digest(found.model.get_parameter(name)) for name in applied}

    after = {name: record.after for name, record in applied.items()}
    assert now() == after
    with found.edit.reverted(found.model):
        assert now() == {name: record.before for name, record in applied.items()}
    assert now() == after


def test_the_adapter_of_a_quantised_model_has_the_redirect(fp8, outputs):
    peft = pytest.importorskip("peft")
    before = AutoModelForCausalLM.from_pretrained(fp8)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(fp8), outputs / "adapter" / "lora"
    ).merge_and_unload()
    assert not (outputs / "adapter" / "config.json").exists()
    check_redirect(before, adapted, fp8, rocr.Edit.load(outputs / "adapter" / "edit.safetensors"), 0.9)


def test_plain_changes_no_other_tensor_and_lists_the_modules(fp8, outputs):
    first, last = (
        {name: value for file in folder.glob("model-*.safetensors") for name, value in load_file(file).items()}
        for folder in (fp8, outputs / "plain")
    )
    assert set(first) - set(last) == {f"{module}.weight_scale_inv" for module in EDITED}
    for name, values in last.items():
        if name.removesuffix(".weight") in EDITED:
            assert values.dtype == torch.bfloat16
        else:
            assert torch.equal(values.view(torch.uint8), first[name].view(torch.uint8))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (fp8, outputs / "plain"))
    settings = after.pop("quantization_config")
    assert settings.pop("modules_to_not_convert") == ["lm_head", *EDITED]
    assert settings == before.pop("quantization_config") and before == after


@pytest.mark.parametrize("output", ["plain", "keep"])
def test_a_quantised_output_is_verified_and_reverted_byte_for_byte(fp8, outputs, output, tmp_path):
    assert run("verify", outputs / output)[0] == 0
    code, _, errors = run("revert", outputs / output, "--out", tmp_path / "back")
    assert code == 0, errors
    for path in fp8.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    edit = outputs / output / "edit.safetensors"
    assert run("verify", tmp_path / "back", "--edit", edit)[0] == 0
    code, _, errors = run("apply", tmp_path / "back", edit, "--out", tmp_path / "again", "--quantised", output)
    assert code == 0, errors
    for path in (outputs / output).glob("model-*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    code, _, errors = run("apply", tmp_path / "again", edit, "--out", tmp_path / "twice")
    assert code == 2 and "holds this edit already" in errors


def test_a_changed_part_is_found_and_not_reverted(outputs, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (outputs / "keep").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    name = f"{EDITED[0]}.weight_scale_inv"
    path = copy / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert run("verify", copy)[0] == 3
    code, _, errors = run("revert", copy, "--out", tmp_path / "back")
    assert code == 3 and "is not the weight after this edit" in errors
    assert not (tmp_path / "back").exists()


def test_keep_refuses_an_update_that_does_not_survive(fp8, text, tmp_path, monkeypatch):
    monkeypatch.setattr("rocr.export.quantised.MIN_SURVIVING", 0.999)
    arguments = ("unlearn", fp8, *EDIT, "--text", text, "--out", tmp_path / "out", "--quantised", "keep")
    code, _, errors = run(*arguments)
    assert code == 4 and "survives at the concepts' keys in FP8" in errors and "--quantised plain" in errors
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--force")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["limits_passed"]) == 2 and run("verify", tmp_path / "out")[0] == 0


def test_keep_corrects_what_rounding_loses(outputs):
    layers = json.loads((outputs / "keep" / "report.json").read_text())["quantised"]["layers"]
    assert all(0.9 < layer["surviving"] <= 1 and 0 < layer["error"] < 0.05 for layer in layers)


def test_a_part_of_a_sharded_fp8_model_is_edited_as_the_whole(fp8, outputs, text, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for path in fp8.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    # The projections of the last layer are not read: they may hold anything.
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    file = broken / index["weight_map"]["model.layers.3.mlp.down_proj.weight"]
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"].view(torch.uint8).fill_(0x7F)  # NaN
    save_file(tensors, file, metadata={"format": "pt"})
    code, _, errors = run("unlearn", broken, *EDIT, "--text", text, "--out", tmp_path / "out", "--partial")
    assert code == 0, errors
    for module in EDITED:
        first, last = (
            load_file(folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][module])
            for module, folder in ((f"{module}.weight", outputs / "plain"), (f"{module}.weight", tmp_path / "out"))
        )
        assert torch.equal(first[f"{module}.weight"], last[f"{module}.weight"])


@pytest.mark.parametrize(
    ("write", "output"),
    [
        (write_gptq, "keep"),
        pytest.param(write_gptq, "plain", marks=pytest.mark.slow),
        pytest.param(write_awq, "plain", marks=pytest.mark.slow),
        pytest.param(write_awq, "keep", marks=pytest.mark.slow),
    ],
)
def test_4_bit_integers_are_edited_in_part_without_their_library(write, output, text, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    out = tmp_path / "out"
    more = ("--text", text, "--out", out, "--quantised", output, "--partial", "--force")
    code, _, errors = run("unlearn", folder, *EDIT, *more)
    assert code == 0, errors
    before, after = (load_partial(find_model(str(place)), 2).model for place in (folder, out))
    edit = rocr.Edit.load(out / "edit.safetensors")
    for update in edit.updates:
        change = (after.get_parameter(update.parameter) - before.get_parameter(update.parameter)).float()
        moves = update.factors.moves(update.keys)
        assert (update.keys @ change.T - moves).norm() < (0.1 if output == "plain" else 0.5) * moves.norm()
    assert run("verify", out)[0] == 0
    assert run("revert", out, "--out", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_missing_library_is_named(text, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    write_gptq(model)
    monkeypatch.setattr("rocr.model.quantised.checkpoint.importlib.util.find_spec", lambda name: None)
    code, _, errors = run("unlearn", model, *EDIT, "--text", text, "--out", tmp_path / "out")
    assert code == 2 and "pip install gptqmodel optimum accelerate" in errors and "--partial" in errors
    assert not (tmp_path / "out").exists()


def test_the_option_is_for_quantised_models(text, tmp_path):
    write_plain(tmp_path)
    code, _, errors = run("unlearn", tmp_path, *EDIT, "--text", text, "--out", tmp_path / "o", "--quantised", "keep")
    assert code == 2 and "--quantised is for models" in errors


def test_a_scale_that_does_not_fit_is_an_error(text, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    write_fp8(model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{EDITED[0]}.weight_scale_inv"] = torch.ones(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    more = ("--text", text, "--out", tmp_path / "out", "--partial")
    code, _, errors = run("unlearn", model, *EDIT, *more)
    assert code == 2 and f"{EDITED[0]} cannot be read as FP8" in errors
