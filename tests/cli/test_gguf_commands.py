"""GGUF files on the command line: parts of --save, undo, records, and what is refused."""

import json
import shutil

import numpy as np
import pytest

import rocr
from rocr import InputError
from rocr.model.gguf_layout import read_gguf_layout
from rocr.model.load import find_model
from tests.support.models import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
gguf = pytest.importorskip("gguf")
EDITED = ("blk.1.ffn_down.weight", "blk.2.ffn_down.weight")


@pytest.fixture(scope="module")
def plain(make_model, tokenizer, tmp_path_factory):
    """A GGUF file with matrices in Q8_0."""
    folder = tmp_path_factory.mktemp("plain")
    return write_gguf(make_model("Llama", intermediate_size=64), tokenizer, folder / "m.gguf")


def test_a_part_of_a_split_model_is_refused(command, plain, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("a", np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given = ("--concept", "Ada", "--redirect", "Bob", "--save", "gguf", "--out", tmp_path / "out")
    done = command("unlearn", tmp_path / "part.gguf", *given)
    assert done.code == 2 and "is one of the 3 files of a split model. Join them with" in done.errors


@pytest.mark.parametrize(
    ("save", "more", "sentence"),
    [
        ("gguf", (), "--save gguf needs a model in a .gguf file"),
        ("gguf-lora", (), "--save gguf-lora needs a model in a .gguf file"),
        ("model,gguf", (), "--save takes model or gguf, not both"),
        ("model", ("--gguf-type", "f16"), "--gguf-type applies to a .gguf output: add gguf to --save"),
        ("edit", ("--lora-rank", "2"), "--lora-rank applies to adapters: add lora or gguf-lora"),
        ("originals", (), "add model or gguf"),
    ],
)
def test_parts_that_do_not_fit_are_refused(save, more, sentence, files, concept, command, tmp_path):
    given = ("--statistics", files.statistics, "--save", save, *more, "--out", tmp_path / "out")
    done = command("unlearn", files.model, *concept, *given)
    assert done.code == 2 and sentence in done.errors and "Traceback" not in done.errors
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_fit_a_type_are_refused_before_the_edit(gguf_file, files, concept, command, tmp_path):
    """The rows of the fixture's down-projections have 48 values."""
    given = ("--text", files.text, "--save", "gguf", "--gguf-type", "q8_0", "--out", tmp_path / "out")
    done = command("unlearn", gguf_file, *concept, *given)
    assert (
        done.code == 2 and "has rows of 48 values and cannot be stored as Q8_0, which has blocks of 32" in done.errors
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folder(plain, files, concept, command, tmp_path_factory):
    """What `rocr unlearn` writes for a GGUF file."""
    base = tmp_path_factory.mktemp("written")
    given = ("--text", files.text, "--save", "gguf,gguf-lora,edit", "--json", "--out", base / "edited")
    done = command("unlearn", plain, *concept, *given)
    assert done.code == 0, done.errors
    return base / "edited"


def test_a_folder_with_one_gguf_file_is_a_model(folder, plain, command, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "SHA256SUMS", "edit.safetensors", "edit.toml", "lora.gguf", "m.gguf", "report.json",
    ]  # fmt: skip
    assert find_model(str(folder)).gguf == "m.gguf"
    done = command("revert", folder, "--out", tmp_path / "back", "--json")
    assert done.code == 0, done.errors
    assert (tmp_path / "back" / "m.gguf").read_bytes() == plain.read_bytes()
    assert command("verify", tmp_path / "back", "--edit", folder / "edit.safetensors").code == 0
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(plain, tmp_path / name)
    with pytest.raises(InputError, match=r"Of its 2 \.gguf files, name one"):
        find_model(str(tmp_path))


def test_apply_writes_the_same_file(folder, plain, command, tmp_path):
    given = ("--save", "gguf,gguf-lora,edit", "--out", tmp_path / "again")
    done = command("apply", plain, folder / "edit.safetensors", *given)
    assert done.code == 0, done.errors
    for name in ("m.gguf", "lora.gguf"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    done = command(
        "apply", folder / "m.gguf", folder / "edit.safetensors", "--save", "gguf", "--out", tmp_path / "twice"
    )
    assert done.code == 2 and "holds this edit already" in done.errors


def test_the_name_of_the_model_is_that_of_its_file(folder, plain):
    edit = rocr.Edit.load(folder / "edit.safetensors")
    assert edit.fingerprint.name == str(plain)


def test_info_shows_gguf_files(folder, command):
    found = json.loads(command("info", folder / "lora.gguf", "--json").output)
    assert found["general.type"] == "adapter" and found["tensors"] == {"F32": 4}
    found = json.loads(command("info", folder / "m.gguf", "--json").output)
    assert found["tokenizer.ggml.tokens"].startswith("a list of ") and found["llama.block_count"] == 5
    assert command("info", folder / "edit.safetensors").code == 0


def test_verify_passes_an_output_and_compares_it_with_the_model(folder, command):
    found = {(c["subject"], c["check"] if "check" in c else c["what"]): c for c in checks_of(command, folder)}
    assert found["other tensors", "as in the model"]["state"] == "passed"
    assert all(found[name, "sha256"]["state"] == "passed" for name in EDITED)
    assert found["lora.gguf", "agrees with the edit"]["state"] == "passed"


def checks_of(command, folder):
    done = command("verify", folder, "--json")
    document = json.loads(done.output)
    return document["checks"] if "checks" in document else document["details"]["checks"]


@pytest.mark.parametrize(
    ("file", "tensor", "subject", "what"),
    [
        ("m.gguf", EDITED[0], EDITED[0], "sha256"),
        ("m.gguf", "blk.0.attn_q.weight", "other tensors", "as in the model"),
        ("lora.gguf", f"{EDITED[1]}.lora_b", "lora.gguf", "agrees with the edit"),
    ],
)
def test_verify_names_what_was_changed(file, tensor, subject, what, folder, command, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    place = read_gguf_layout(folder / file).tensors[tensor].start
    data = bytearray((folder / file).read_bytes())
    data[place + 2] ^= 1
    (tmp_path / "copy" / file).write_bytes(data)
    done = command("verify", tmp_path / "copy")
    assert done.code == 3
    failed = {line.split("│")[1].strip() for line in done.output.splitlines() if "│" in line and "failed" in line}
    assert any(subject.startswith(name) for name in failed if name != file) or subject == file


def test_a_dry_run_tells_the_bytes_that_are_written(plain, files, concept, command, folder):
    given = ("--text", files.text, "--save", "gguf,gguf-lora,edit", "--json", "--dry-run")
    done = command("unlearn", plain, *concept, *given)
    assert done.code == 0, done.errors
    written = json.loads(done.output)["written"]
    assert written["GGUF file"] == (folder / "m.gguf").stat().st_size
    assert written["GGUF adapter"] == pytest.approx((folder / "lora.gguf").stat().st_size, abs=1000)
    assert written["edit"] >= (folder / "edit.safetensors").stat().st_size


def test_the_type_of_the_edited_tensors_is_chosen(folder, plain, command, tmp_path):
    for kind in ("f16", "bf16", "f32"):
        out = tmp_path / kind
        given = ("--save", "gguf", "--gguf-type", kind, "--out", out)
        done = command("apply", plain, folder / "edit.safetensors", *given)
        assert done.code == 0, done.errors
        tensors = read_gguf_layout(out / "m.gguf").tensors
        assert {tensors[name].kind for name in EDITED} == {kind.upper()}
        said = f"{EDITED[0]} as {kind.upper()} instead of Q8_0: the file has {(out / 'm.gguf').stat().st_size:,} bytes"
        assert said in " ".join(done.output.split()) + " ".join(done.errors.split())
