"""GGUF files with experts on the command line: unlearn, verify, apply, revert, info and a dry run."""

import json
import shutil

import pytest

import rocr
from rocr.model.gguf_layout import read_gguf_layout
from tests.support.gguf_mixtures import build_mixture, write_mixture_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("gguf")
EXPERTS, SHARED = "blk.2.ffn_down_exps.weight", "blk.2.ffn_down_shexp.weight"


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """A mixture with a shared expert, its matrices in Q8_0."""
    mixture = build_mixture("Qwen2Moe", len(tokenizer))
    return write_mixture_gguf(mixture, "Qwen2Moe", tokenizer, tmp_path_factory.mktemp("plain") / "m.gguf", "Q8_0")


@pytest.fixture(scope="module")
def folder(plain, files, concept, command, tmp_path_factory):
    """What `rocr unlearn` writes for it."""
    base = tmp_path_factory.mktemp("written")
    given = ("--text", files.text, "--layers", "2", "--save", "gguf,gguf-lora,edit", "--json", "--out", base / "edited")
    done = command("unlearn", plain, *concept, *given)
    assert done.code == 0, done.errors
    assert [entry["stored"] for entry in json.loads(done.output)["weights"]] == [[EXPERTS], [SHARED]]
    return base / "edited"


def test_verify_passes_the_output(folder, command):
    done = command("verify", folder, "--json")
    checks = {(check["subject"], check["what"]): check["state"] for check in json.loads(done.output)["checks"]}
    assert checks[f"{EXPERTS} and {SHARED}", "sha256"] == "passed"
    assert checks["other tensors", "as in the model"] == checks["lora.gguf", "agrees with the edit"] == "passed"
    assert set(checks.values()) == {"passed", "unchecked"} and done.code == 0


def test_apply_writes_the_same_files_and_revert_the_first(folder, plain, command, tmp_path):
    given = ("--save", "gguf,gguf-lora,edit", "--out", tmp_path / "again")
    done = command("apply", plain, folder / "edit.safetensors", *given)
    assert done.code == 0, done.errors
    for name in ("m.gguf", "lora.gguf"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    done = command("revert", folder, "--out", tmp_path / "back")
    assert done.code == 0, done.errors
    assert (tmp_path / "back" / "m.gguf").read_bytes() == plain.read_bytes()
    assert command("verify", tmp_path / "back", "--edit", folder / "edit.safetensors").code == 0


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_experts_in_another_type_are_reverted_too(kind, folder, plain, command, tmp_path):
    given = ("--save", "gguf,edit", "--gguf-type", kind, "--out", tmp_path / kind)
    assert command("apply", plain, folder / "edit.safetensors", *given).code == 0
    tensors = read_gguf_layout(tmp_path / kind / "m.gguf").tensors
    assert tensors[EXPERTS].kind == tensors[SHARED].kind == kind.upper()
    assert command("verify", tmp_path / kind).code == 0
    assert command("revert", tmp_path / kind, "--out", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "m.gguf").read_bytes() == plain.read_bytes()


def test_info_and_a_dry_run(folder, plain, files, concept, command):
    found = json.loads(command("info", folder / "m.gguf", "--json").output)
    assert found["qwen2moe.expert_count"] == 8
    assert command("info", folder / "edit.safetensors").code == 0
    given = ("--text", files.text, "--layers", "2", "--save", "gguf,gguf-lora,edit", "--json", "--dry-run")
    done = command("unlearn", plain, *concept, *given)
    assert done.code == 0, done.errors
    written = json.loads(done.output)["written"]
    assert written["GGUF file"] == (folder / "m.gguf").stat().st_size
    assert written["edit"] >= (folder / "edit.safetensors").stat().st_size
    # A dry run loads no weights, so it does not find the shared expert, which has 1 of 9 blocks.
    adapter = read_gguf_layout(folder / "lora.gguf").tensors
    assert written["GGUF adapter"] == sum(adapter[f"{EXPERTS}.lora_{end}"].size for end in "ab")


BOTH = f"{EXPERTS} and {SHARED}"
DAMAGED = [
    ("m.gguf", "edited", BOTH),
    ("m.gguf", SHARED, BOTH),
    ("m.gguf", "blk.2.ffn_up_exps.weight", "other tensors"),
    ("lora.gguf", f"{EXPERTS}.lora_b", "lora.gguf"),
]
"""Files and tensors of an output, with the subject that a flipped bit there fails."""


@pytest.mark.parametrize(("file", "tensor", "subject"), DAMAGED)
def test_verify_names_what_was_changed(file, tensor, subject, folder, command, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    expert = rocr.Edit.load(folder / "edit.safetensors").updates[0].parts[-2].expert
    held = read_gguf_layout(folder / file).tensors[EXPERTS if tensor == "edited" else tensor]
    data = bytearray((folder / file).read_bytes())
    data[held.start + 2 + (expert * held.size // 8 if tensor == "edited" else 0)] ^= 1
    (tmp_path / "copy" / file).write_bytes(data)
    done = command("verify", tmp_path / "copy", "--json")
    assert done.code == 3
    failed = {check["subject"] for check in json.loads(done.output)["checks"] if check["state"] == "failed"}
    assert {subject} <= failed <= {subject, file}
