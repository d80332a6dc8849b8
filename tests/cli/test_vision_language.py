"""The commands on vision-language checkpoints: the whole class is loaded, and all but the edited tensors stays."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers

import rocr
from rocr.model.architecture import find_architecture
from rocr.model.load import find_model, load_model
from rocr.model.load_partial import load_partial, needed_tensors
from rocr.model.weight_files import find_weight_files
from tests.support.vision import KINDS, build, qwen3_5, read_image, stored_tensors

pytest.importorskip("PIL")
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
LAYERS = (1, 3)
CONCEPT = (
    *("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,3"),
    *("--token-schedule", "full", "--retain-weight", "0", "--no-answers", "--force"),
)
PROBE = {"subject": "Ada Byron", "query": "What did Ada Byron write?", "answer": "programs"}
ALL = [pytest.param(kind, marks=[] if kind in ("LLaVA", "Mllama") else [pytest.mark.slow]) for kind in KINDS]
TOWERS = ("vision", "visual", "projector", "connector")


@pytest.fixture(scope="module")
def edited(vision_folder, files, command, tmp_path_factory):
    """edited(kind): the output of an edit, and its report."""
    found = {}

    def edit(kind):
        if kind not in found:
            out = tmp_path_factory.mktemp("edited") / "out"
            given = ("--text", files.text, "--save", "model,edit,lora", "--json", "--out", out)
            done = command("unlearn", vision_folder(kind), *CONCEPT, *given)
            assert done.code == 0, done.errors
            found[kind] = out, json.loads(done.output)
        return found[kind]

    return edit


@pytest.mark.parametrize("kind", ALL)
def test_all_but_the_edited_tensors_keeps_its_bytes(kind, vision_folder, edited, digests, command, tmp_path):
    folder, (out, report) = vision_folder(kind), edited(kind)
    before, after = stored_tensors(folder), stored_tensors(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for weight in report["weights"] for name in weight["stored"]} and len(changed) == 2
    assert not any(tower in name for name in changed for tower in TOWERS)
    assert any(tower in name for name in before for tower in TOWERS)
    carried = {name: digest for name, digest in digests(folder).items() if not name.startswith("model")}
    assert {"config.json", "processor_config.json", "video_preprocessor_config.json"} <= carried.keys()
    assert {name: digests(out)[name] for name in carried} == carried
    done = command("verify", out, "--json")
    assert done.code == 0 and {check["state"] for check in json.loads(done.output)["checks"]} == {"passed"}
    assert command("revert", out, "--out", tmp_path / "back").code == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored_tensors(tmp_path / "back").items())


@pytest.mark.parametrize("kind", ALL)
def test_an_image_in_the_prompt_is_read_as_before_the_edit(kind, edited):
    out, _ = edited(kind)
    original, _, token = build(kind)
    model = transformers.AutoModelForImageTextToText.from_pretrained(out)
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert type(model) is type(original)
    first, second = (read_image(model, processor, token, seed) for seed in (0, 1))
    before = read_image(original, processor, token)
    assert (first - second).norm() > 0.1 * first.norm(), "the answer depends on the image"
    assert (first - before).norm() > 0.01 * before.norm(), "and on the edit"
    rocr.Edit.load(out / "edit.safetensors").apply(original)
    assert torch.equal(read_image(original, processor, token), first)


@pytest.mark.parametrize(
    "kind", ["Idefics 3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "Idefics 3")]
)
def test_the_beginning_of_the_language_model_without_the_tower(kind, vision_folder, files, edited, command, tmp_path):
    folder, (out, _) = vision_folder(kind), edited(kind)
    given = ("--text", files.text, "--partial", "--json", "--out", tmp_path / "out")
    forecast = command("unlearn", folder, *CONCEPT, *given, "--dry-run")
    assert forecast.code == 0, forecast.errors
    done = command("unlearn", folder, *CONCEPT, *given)
    assert done.code == 0, done.errors
    whole, part = stored_tensors(out), stored_tensors(tmp_path / "out")
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())
    source = find_model(str(folder))
    model, loaded = load_partial(source, LAYERS[-1]).model, load_model(source).model
    assert type(model) is type(loaded)
    read = {name for name, parameter in model.named_parameters() if parameter.device.type != "meta"}
    assert read and not any(tower in name for name in read for tower in TOWERS)
    needed = needed_tensors(find_weight_files(folder), find_architecture(model), LAYERS[-1])
    assert json.loads(forecast.output)["read"]["model"] == sum(tensor.size for tensor in needed)


@pytest.mark.parametrize("kind", ["LLaVA", pytest.param("Mllama", marks=pytest.mark.slow)])
def test_every_command_reads_the_checkpoint(kind, vision_folder, files, edited, command, tmp_path):
    folder, (out, _) = vision_folder(kind), edited(kind)
    (tmp_path / "probes.jsonl").write_text(json.dumps(PROBE))
    probes = ("--probes", tmp_path / "probes.jsonl", "--forms", "qa")
    between = ("--among", "Blaise Pascal", "a gardener")
    compared = ("--redirect", "Blaise Pascal", "--text", files.text, "--methods", "rocr")
    for arguments in (
        ("stats", folder, "--text", files.text, "--layers", "1,3", "--out", tmp_path / "statistics"),
        ("unlearn", folder, *CONCEPT, "--statistics", tmp_path / "statistics", "--out", tmp_path / "again"),
        ("apply", folder, out / "edit.safetensors", "--out", tmp_path / "applied"),
        ("eval", folder, *probes, "--out", tmp_path / "report.json"),
        ("redirects", folder, *probes[:2], *between, "--out", tmp_path / "list.jsonl"),
        ("compare", folder, *probes, "--targets", "Ada Byron", *compared, "--out", tmp_path / "table.json"),
    ):
        if (kind, arguments[0]) == ("Mllama", "compare"):
            continue  # the authors' layers include the one that attends to images only
        done = command(*arguments)
        assert done.code == 0, done.errors
    expected = stored_tensors(out)
    for name in ("again", "applied"):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in stored_tensors(tmp_path / name).items())


def test_an_edit_of_the_language_model_applies_to_its_vision_language_checkpoint(
    tokenizer, texts, concepts, command, tmp_path
):
    folder = tmp_path / "model"
    qwen3_5(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inside = transformers.AutoModelForCausalLM.from_pretrained(folder)
    statistics = rocr.collect_statistics(inside, tokenizer, texts[:6], LAYERS)
    edit = rocr.unlearn(inside, tokenizer, concepts, statistics, rocr.EditConfig(layers=LAYERS))
    names = [update.parameter for update in edit.updates]
    assert names == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS]
    edit.save(tmp_path / "edit.safetensors")
    done = command("apply", folder, tmp_path / "edit.safetensors", "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    written = stored_tensors(tmp_path / "out")
    for name in names:
        assert torch.equal(written[name.replace("model", "model.language_model")], inside.get_parameter(name))
    assert written.keys() == stored_tensors(folder).keys()
    renamed = [dataclasses.replace(u, parameter=u.parameter.replace("down", "up")) for u in edit.updates]
    with pytest.raises(rocr.InputError, match=r"The edit changes .*up_proj\.weight"):
        dataclasses.replace(edit, updates=renamed).apply(transformers.AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.slow
def test_real_processes_edit_a_checkpoint_and_read_an_image(vision_folder, files, tmp_path):
    given = ("--text", files.text, "--out", tmp_path / "out")
    run = [sys.executable, "-m", "rocr", "unlearn", vision_folder("LLaVA"), *CONCEPT, *given]
    subprocess.run(list(map(str, run)), check=True)
    code = (
        "import sys, torch, transformers as t\n"
        "from tests.support.vision import image, QUESTION\n"
        "m = t.AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "p = t.AutoProcessor.from_pretrained(sys.argv[1])\n"
        "x = p(images=image(0), text='<image>' + QUESTION, return_tensors='pt')\n"
        "print(len(p.batch_decode(m.generate(**x, max_new_tokens=5, do_sample=False))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
