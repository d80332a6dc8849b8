"""Commands on mixtures of experts, whose files name and arrange experts otherwise than the loaded model."""

import json

import pytest
import torch

import rocr
from tests.support.vision import stored_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def save(make_model, tokenizer, tmp_path):
    def saved(mixture, dtype=torch.float32):
        make_model(mixture).to(dtype).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return saved


def stored_name(part):
    """The name that an expert of Mixtral has in files; transformers 4 has the same one in memory."""
    if part.expert is None:
        return part.parameter
    return f"model.layers.2.block_sparse_moe.experts.{part.expert}.w2.weight"


def run(command, *arguments):
    done = command(*arguments)
    assert done.code == 0, done.errors
    return done


@pytest.mark.parametrize(
    ("mixture", "names"),
    [
        ("Mixtral", [f"model.layers.{{}}.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)]),
        ("GPT-OSS", ["model.layers.{}.mlp.experts.down_proj"]),
    ],
)
def test_only_experts_differ_in_the_files_of_an_output(mixture, names, save, files, concept, command, tmp_path):
    model, out = save(mixture), tmp_path / "out"
    given = ("--text", files.text, "--layers", "1,2", "--save", "model,edit,lora", "--out", out)
    run(command, "unlearn", model, *concept, *given)
    before, after = stored_tensors(model), stored_tensors(out)
    allowed = {name.format(layer) for layer in (1, 2) for name in names}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and changed <= allowed
    report = json.loads((out / "report.json").read_text())
    assert [layer["layer"] for layer in report["routing"]] == [1, 2]
    assert "matches its records" in run(command, "verify", out).output
    run(command, "apply", model, out / "edit.safetensors", "--out", tmp_path / "again")
    run(command, "revert", out, "--out", tmp_path / "back")
    again, back = stored_tensors(tmp_path / "again"), stored_tensors(tmp_path / "back")
    assert all(torch.equal(again[name], after[name]) and torch.equal(back[name], before[name]) for name in before)


def test_experts_stored_in_another_dtype_are_rounded_once(save, files, concept, command, tmp_path):
    model, out = save("Mixtral", torch.bfloat16), tmp_path / "out"
    run(command, "unlearn", model, *concept, "--text", files.text, "--layers", "2", "--dtype", "float32", "--out", out)
    before, after = stored_tensors(model), stored_tensors(out)
    (update,) = rocr.Edit.load(out / "edit.safetensors").updates
    assert update.applied.dtype == "torch.bfloat16"
    change = update.factors.left.double() @ update.factors.right.double()
    for part, place in zip(update.parts, update.columns, strict=True):
        name = stored_name(part)
        exact = before[name].double() + change[:, place]
        # A float32 sum may lie on the other side of a halfway point.
        assert ((after[name].double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6).all()
        assert after[name].dtype == torch.bfloat16
    assert "matches its records" in run(command, "verify", out).output


def test_a_damaged_expert_is_found(save, files, concept, command, tmp_path):
    from safetensors.torch import save_file

    model, out = save("Mixtral"), tmp_path / "out"
    run(command, "unlearn", model, *concept, "--text", files.text, "--layers", "2", "--out", out)
    tensors = stored_tensors(out)
    (update,) = rocr.Edit.load(out / "edit.safetensors").updates
    name = stored_name(update.parts[-1])
    tensors[name] = tensors[name] + 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = command("verify", out, "--json")
    found = [check for check in json.loads(done.output)["checks"] if "experts" in check["subject"]]
    assert done.code == 3 and any(check["state"] == "failed" for check in found)


@pytest.mark.parametrize("part", ["gguf", "gguf-lora"])
def test_a_gguf_output_needs_a_gguf_input(part, save, files, concept, command, tmp_path):
    done = command("unlearn", save("Mixtral"), *concept, "--text", files.text, "--save", part, "--out", tmp_path / "o")
    assert done.code == 2 and not (tmp_path / "o").exists()
