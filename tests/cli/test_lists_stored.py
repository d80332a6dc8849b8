"""`rocr add`, `rocr remove` and `rocr merge` on folders whose models are stored in other ways: GGUF, FP8, experts."""

import json
import shutil

import pytest

from tests.support.models import write_gguf
from tests.support.quantised import write_fp8

pytestmark = pytest.mark.usefixtures("one_thread")
ADA, GRACE, BLAISE = "Ada Byron", "Grace Hopper", "Blaise Pascal"
TWO = ("--concept", ADA, "--concept", GRACE, "--redirect", BLAISE, "--layers", "1,2", "--no-answers", "--force")
STORED = {
    "gguf": ("--save", "gguf,gguf-lora,edit"),
    "gguf with originals": ("--save", "gguf,edit,originals"),
    "experts": ("--save", "model,edit,lora"),
    "fp8 plain": ("--quantised", "plain"),
    "fp8 keep": ("--quantised", "keep"),
    "fp8 with originals": ("--quantised", "keep", "--save", "model,edit,originals"),
}


@pytest.fixture
def write(make_model, tokenizer, tmp_path):
    """write(kind): a tiny model that is stored in one of these ways."""

    def write(kind):
        if kind == "gguf":
            pytest.importorskip("gguf")
            return write_gguf(make_model("Llama", intermediate_size=64), tokenizer, tmp_path / "m.gguf")
        folder = tmp_path / "model"
        if kind == "fp8":
            return write_fp8(folder, shards=3)
        make_model("Qwen2Moe").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


def done(command, *arguments):
    found = command(*arguments, "--json")
    assert found.code == 0, found.errors
    return json.loads(found.output)


def same_files(model, folder):
    """Whether a folder holds all weight files of a model byte for byte."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    return all((folder / file.name).read_bytes() == file.read_bytes() for file in files)


OFTEN = ("gguf",)
EACH = [pytest.param(kind, marks=() if kind in OFTEN else pytest.mark.slow) for kind in STORED]


@pytest.mark.parametrize("stored", EACH)
def test_a_removal_is_verified_and_reverted_byte_for_byte(stored, write, files, command, tmp_path):
    model = write(stored.split()[0])
    done(command, "unlearn", model, *TWO, "--text", files.text, *STORED[stored], "--out", tmp_path / "two")
    report = done(command, "remove", tmp_path / "two", GRACE, "--out", tmp_path / "one")
    assert [concept["name"] for concept in report["concepts"]] == [ADA] and report["inexact"] == [2]
    before, after = ({path.name for path in (tmp_path / name).iterdir()} for name in ("two", "one"))
    assert before - {"edit.toml"} == after, "the options of the first run do not give this edit"
    assert not same_files(model, tmp_path / "one")
    assert not any(b".partial-" in path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file())
    if "keep" in stored:
        assert report["quantised"]["output"] == "keep"
    done(command, "verify", tmp_path / "one")
    done(command, "revert", tmp_path / "one", "--out", tmp_path / "back")
    assert same_files(model, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["gguf", "experts", "fp8 keep"])
def test_an_addition_is_verified_and_reverted_byte_for_byte(stored, write, files, command, tmp_path):
    model = write(stored.split()[0])
    ada = ("--concept", ADA, *TWO[4:], "--text", files.text)
    done(command, "unlearn", model, *ada, *STORED[stored], "--out", tmp_path / "one")
    more = ("--concept", GRACE, "--redirect", BLAISE, "--text", files.text, "--no-answers", "--force")
    report = done(command, "add", tmp_path / "one", *more, "--out", tmp_path / "two")
    assert [concept["name"] for concept in report["concepts"]] == [ADA, GRACE]
    assert not any(b".partial-" in path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file())
    shutil.rmtree(tmp_path / "one")
    found = command("verify", tmp_path / "two")
    assert found.code == 0, found.errors
    done(command, "revert", tmp_path / "two", "--out", tmp_path / "back")
    assert same_files(model, tmp_path / "back")
