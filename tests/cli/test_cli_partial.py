"""The commands on a model of which only the beginning is loaded."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rocr.model import hub

CONCEPT = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal")


@pytest.fixture(scope="module")
def sharded(files, tmp_path_factory):
    """The model of `files` in many small files."""
    folder = tmp_path_factory.mktemp("models") / "sharded"
    AutoModelForCausalLM.from_pretrained(files.model).save_pretrained(folder, max_shard_size="20KB")
    for path in [*files.model.glob("tokenizer*"), *files.model.glob("chat_template*")]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_model_loaded_in_part_is_edited_to_the_same_bytes(files, sharded, concept, command, digests, tmp_path):
    before = digests(sharded)
    statistics = tmp_path / "statistics.safetensors"
    given = ("--statistics", statistics, "--token-schedule", "full", "--retain-weight", 0, "--json")
    collected = command("stats", sharded, "--partial", "--text", files.text, "--out", statistics, "--layers", "1-2")
    assert collected.code == 0, collected.errors
    whole = command("unlearn", files.model, *concept, *given, "--out", tmp_path / "a")
    part = command("unlearn", sharded, *concept, *given, "--out", tmp_path / "b", "--partial")
    assert whole.code == part.code == 0, part.errors
    report = json.loads(part.output)
    assert report["answers"] == [] and len(report["linked"]) > 5
    assert all((tmp_path / "b" / name).samefile(sharded / name) for name in report["linked"])
    assert not set(report["files"]) & set(report["linked"])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b"))
    for (name, mine), (_, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert digests(sharded) == before
    back = command("revert", tmp_path / "b", "--out", tmp_path / "back")
    assert back.code == 0, back.errors
    tensors = {name: digest for name, digest in digests(tmp_path / "back").items() if name.startswith("model-")}
    assert tensors == {name: digest for name, digest in before.items() if name.startswith("model-")}


def test_a_model_loaded_in_part_answers_no_questions(files, sharded, command, tmp_path):
    given = ("--statistics", files.statistics, "--layers", "1,2", "--partial", "--force", "--out", tmp_path / "out")
    done = command("unlearn", sharded, *CONCEPT, *given)
    assert done.code == 0, done.errors
    assert "nothing is asked" in done.errors
    assert "how far the first tokens of a name are moved" in " ".join(done.errors.split())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["config"]["token_schedule"] == "full"


def test_a_model_loaded_in_part_cannot_write_text(sharded, command, tmp_path):
    partial = ("unlearn", sharded, *CONCEPT, "--partial", "--out", tmp_path / "out")
    done = command(*partial)
    assert done.code == 2 and "--text or --statistics" in done.errors
    done = command(*partial, "--dtype", "bfloat16")
    assert done.code == 2 and "as they are stored" in done.errors
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_refused_before_anything_is_written(files, sharded, command, tmp_path, monkeypatch):
    monkeypatch.setattr("rocr.io.disk_space.SPARE_BYTES", 2**60)
    done = command("apply", sharded, files.edit, "--out", tmp_path / "out")
    assert done.code == 2 and "MiB are needed; nothing was written" in done.errors
    assert not list(tmp_path.iterdir())


COMMANDS = {
    "apply": lambda files, out: ("apply", files.model, files.edit, "--out", out),
    "verify": lambda files, out: ("verify", files.edited),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_model_without_its_weights_is_built_once(name, files, command, tmp_path, monkeypatch):
    """Once to know its sizes, and once with its buffers; whether it can be loaded in part asks for no other."""
    built = []
    build = hub.build_skeleton
    monkeypatch.setattr(hub, "build_skeleton", lambda *given: built.append(given) or build(*given))
    done = command(*COMMANDS[name](files, tmp_path / "out"))
    assert done.code == 0, done.errors
    assert len(built) == 2
