"""Commands on sparse models, whose zeros an edit keeps."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rocr
from rocr.model.load import find_model, load_model
from rocr.model.quantised.opening import open_down_projections
from tests.support.quantised import write_fp8
from tests.support.vision import stored_tensors

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
LAYERS = ("--layers", "1,2", "--token-schedule", "full")


def two_of_four(weight):
    """The two elements of each four of a row with the largest magnitude."""
    fours = weight.abs().unflatten(-1, (-1, 4))
    kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(-1, fours.topk(2, dim=-1).indices, True)
    return kept.flatten(-2)


PATTERNS = {"unstructured": lambda weight: torch.rand(weight.shape) < 0.5, "2:4": two_of_four}


def is_edited(name):
    return "down_proj" in name


@pytest.fixture
def prune(tokenizer, tmp_path):
    """prune(model, dtype, pattern): the folder of a model with down-projections that are half zeros, signs kept."""

    def pruned(model, dtype=torch.bfloat16, pattern="2:4", folder="sparse"):
        model = model.to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_edited(name):
                    parameter.mul_(PATTERNS[pattern](parameter).to(dtype))
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return pruned


def run(command, *arguments):
    done = command(*arguments)
    assert done.code == 0, done.errors
    return done


def zeros_of(tensors):
    """The places and bits of all zeros of the edited weights."""
    bits = {2: torch.int16, 4: torch.int32}
    found = {}
    for name, values in tensors.items():
        if is_edited(name):
            found[name] = values == 0, values.view(bits[values.element_size()])
    assert found
    return found


def assert_zeros_kept(before, after):
    for name, (zeros, old) in zeros_of(before).items():
        assert 0.4 < zeros.double().mean() < 0.6
        assert torch.equal(old[zeros], after[name].view(old.dtype)[zeros]), name
        assert torch.equal(after[name] == 0, zeros), f"{name} has no other zeros"


@pytest.mark.parametrize(("dtype", "pattern"), [(torch.bfloat16, "2:4"), (torch.float32, "unstructured")], ids=str)
def test_the_zeros_of_the_files_keep_their_bits(model, prune, dtype, pattern, files, concept, command, tmp_path):
    sparse, out = prune(model, dtype, pattern), tmp_path / "out"
    run(command, "unlearn", sparse, *concept, "--text", files.text, *LAYERS, "--force", "--out", out)
    before, after = stored_tensors(sparse), stored_tensors(out)
    assert_zeros_kept(before, after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    report = json.loads((out / "report.json").read_text())
    assert all("of the weight are zeros, which it keeps" in layer["metric"] for layer in report["layers"])
    assert all(min(layer["closed"]) > 0 for layer in report["layers"])
    assert "matches its records" in run(command, "verify", out).output
    run(command, "apply", sparse, out / "edit.safetensors", "--out", tmp_path / "again")
    run(command, "revert", out, "--out", tmp_path / "back")
    again, back = stored_tensors(tmp_path / "again"), stored_tensors(tmp_path / "back")
    assert all(torch.equal(again[name], after[name]) and torch.equal(back[name], before[name]) for name in before)


def test_lists_that_change_keep_the_zeros(model, prune, files, command, tmp_path):
    sparse = prune(model, torch.float32)
    given = ("--text", files.text, *LAYERS, "--force", "--no-answers")
    names = ("--concept", "Ada Byron", "--concept", "the engines", "--redirect", "Blaise Pascal")
    run(command, "unlearn", sparse, *names, *given, "--out", tmp_path / "out")
    run(command, "remove", tmp_path / "out", "the engines", "--out", tmp_path / "removed")
    more = (
        "--concept",
        "Robert Downey Jr.",
        "--redirect",
        "a gardener",
        "--text",
        files.text,
        "--force",
        "--no-answers",
    )
    run(command, "add", tmp_path / "removed", *more, "--out", tmp_path / "added")
    before = stored_tensors(sparse)
    for name in ("out", "removed", "added"):
        assert_zeros_kept(before, stored_tensors(tmp_path / name))
    done = command("add", tmp_path / "removed", *more, "--save", "lora", "--out", tmp_path / "refused")
    assert done.code == 2 and "an adapter adds a product of low rank" in done.errors
    edit = tmp_path / "out" / "edit.safetensors"
    done = command("apply", sparse, edit, "--save", "lora", "--out", tmp_path / "refused")
    assert done.code == 2 and "leave lora out of --save" in done.errors
    assert not (tmp_path / "refused").exists()


def test_the_options(model, prune, files, concept, command, tmp_path):
    sparse = prune(model)
    given = ("--text", files.text, *LAYERS, "--force", "--no-answers")
    run(
        command,
        "unlearn",
        sparse,
        *concept,
        *given,
        "--fill-zeros",
        "--save",
        "model,edit,lora",
        "--out",
        tmp_path / "a",
    )
    filled = stored_tensors(tmp_path / "a")["model.layers.1.mlp.down_proj.weight"]
    assert (filled == 0).double().mean() < 0.1
    done = command("unlearn", sparse, *concept, *given, "--save", "model,lora", "--out", tmp_path / "b")
    assert done.code == 2
    assert "50% of the weights are zeros, which the edit keeps, but an adapter adds" in " ".join(done.errors.split())
    done = command("unlearn", sparse, *concept, *given, "--fill-zeros", "--keep-zeros", "--out", tmp_path / "b")
    assert done.code == 2 and "contradict each other" in done.errors
    few = AutoModelForCausalLM.from_pretrained(files.model)
    with torch.no_grad():
        few.model.layers[1].mlp.down_proj.weight[:3] = 0.0
    few.save_pretrained(tmp_path / "few")
    for path in [*files.model.glob("tokenizer*"), *files.model.glob("chat_template*")]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    for options, kept in (((), False), (("--keep-zeros",), True)):
        out = tmp_path / f"few {kept}"
        run(command, "unlearn", tmp_path / "few", *concept, *given, *options, "--out", out)
        weight = stored_tensors(out)["model.layers.1.mlp.down_proj.weight"]
        assert bool((weight[:3] == 0).all()) == kept
    assert not (tmp_path / "b").exists()


def test_a_model_loaded_in_part(model, prune, files, concept, command, tmp_path):
    sparse = prune(model, torch.float32)
    given = ("--text", files.text, *LAYERS, "--force", "--no-answers")
    run(command, "unlearn", sparse, *concept, *given, "--partial", "--out", tmp_path / "part")
    assert_zeros_kept(stored_tensors(sparse), stored_tensors(tmp_path / "part"))


@pytest.mark.parametrize("mixture", ["GPT-OSS", pytest.param("Mixtral", marks=pytest.mark.slow)])
def test_a_mixture_of_experts(mixture, make_model, prune, files, concept, command, tmp_path):
    sparse, out = prune(copy.deepcopy(make_model(mixture)), torch.float32, "unstructured"), tmp_path / "out"
    loaded = AutoModelForCausalLM.from_pretrained(sparse)
    run(command, "unlearn", sparse, *concept, "--text", files.text, *LAYERS, "--force", "--no-answers", "--out", out)
    edit = rocr.Edit.load(out / "edit.safetensors")
    assert all(update.factors.support is not None and len(update.parts) > 1 for update in edit.updates)
    edited = AutoModelForCausalLM.from_pretrained(out)
    changed = 0
    for (name, old), (_, new) in zip(loaded.named_parameters(), edited.named_parameters(), strict=True):
        if is_edited(name):
            assert torch.equal(old == 0, new == 0), name
            changed += not torch.equal(old, new)
    assert changed == 2
    run(command, "revert", out, "--out", tmp_path / "back")
    back, before = stored_tensors(tmp_path / "back"), stored_tensors(sparse)
    assert all(torch.equal(back[name], before[name]) for name in before)


@pytest.fixture
def quantised(tmp_path):
    """An FP8 model with down-projections of which half are zeros."""
    folder = write_fp8(tmp_path / "fp8")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if is_edited(name) and tensors[name].element_size() == 1:
                tensors[name].view(torch.uint8)[:, ::2] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_zeros_of_a_quantisation_are_not_kept(quantised, files, command, tmp_path):
    given = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--text", files.text, *LAYERS, "--force")
    done = command("unlearn", quantised, *given, "--keep-zeros", "--out", tmp_path / "out")
    assert done.code == 2 and "a zero is a value of the quantisation there" in " ".join(done.errors.split())
    assert not (tmp_path / "out").exists()
    done = run(command, "unlearn", quantised, *given, "--out", tmp_path / "out")
    assert "50% of the quantised weights are zeros" in " ".join(done.errors.split())
    edit = rocr.Edit.load(tmp_path / "out" / "edit.safetensors")
    assert edit.updates[0].factors.support is None
    assert edit.config.keep_zeros is False


def test_an_edit_that_keeps_zeros_of_a_quantised_model_is_written_plain(quantised, files, command, tmp_path):
    loaded = load_model(find_model(str(quantised)))
    open_down_projections(loaded, 2)
    with torch.no_grad():
        # Of an own model, in which the zeros are wanted.
        weights = [loaded.architecture.down_projection(layer).module.weight for layer in (1, 2)]
        texts = files.text.read_text().split(". ")
        statistics = rocr.collect_statistics(loaded.model, loaded.tokenizer, texts, layers=[1, 2])
        zeros = [weight == 0 for weight in weights]
    config = rocr.EditConfig(layers=(1, 2), token_schedule="full", keep_zeros=True)
    guards = rocr.Guards(force=True)
    concepts = [rocr.Concept("Ada Byron", "Blaise Pascal")]
    edit = rocr.unlearn(loaded.model, loaded.tokenizer, concepts, statistics, config, guards=guards, retain=[])
    edit.save(tmp_path / "edit.safetensors")
    given = ("apply", quantised, tmp_path / "edit.safetensors", "--out", tmp_path / "out")
    done = command(*given, "--quantised", "keep")
    assert done.code == 2 and "a weight that is quantised again is corrected" in " ".join(done.errors.split())
    assert not (tmp_path / "out").exists()
    run(command, *given, "--quantised", "plain")
    written = stored_tensors(tmp_path / "out")
    for layer, zero in zip((1, 2), zeros, strict=True):
        assert torch.equal(written[f"model.layers.{layer}.mlp.down_proj.weight"] == 0, zero)
