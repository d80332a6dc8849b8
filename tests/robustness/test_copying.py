"""Files copied to an output: sparse files stay sparse, absurd sizes are refused, permissions are ordinary."""

import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from rocr.errors import InputError
from rocr.export.copying import MAX_CARRIED_BYTES, carried_files, copy_file, other_weights
from rocr.io.output import new_directory
from rocr.io.tensors import write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
HUGE = 2**40


def sparse(path, size, *places):
    """A file of a size with some bytes at places and holes between."""
    with path.open("wb") as file:
        for place in places:
            file.seek(place)
            file.write(b"data")
        file.truncate(size)


def room(path):
    return path.stat().st_blocks * 512


@pytest.fixture
def model(files, tmp_path):
    shutil.copytree(files.model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("places", [(), (0,), (5_000_000,), (0, 3_000_001, 9_999_996)])
def test_a_copy_has_the_bytes_and_the_holes(places, tmp_path):
    sparse(tmp_path / "first", 10_000_000, *places)
    copy_file(tmp_path / "first", tmp_path / "below" / "copy")
    assert (tmp_path / "below" / "copy").read_bytes() == (tmp_path / "first").read_bytes()
    assert room(tmp_path / "below" / "copy") <= max(room(tmp_path / "first"), 2**20 * len(places))


def test_a_system_that_does_not_tell_holes_copies_all(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    sparse(tmp_path / "first", 3_000_000, 1_500_000)
    monkeypatch.setattr("os.lseek", refuse)
    copy_file(tmp_path / "first", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "first").read_bytes()


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "first").write_bytes(b"x" * 3_000_000)

    def cut(descriptor, start, end):
        os.truncate(tmp_path / "first", 1_000_000)
        yield start, end

    monkeypatch.setattr("rocr.export.copying._extents", cut)
    with pytest.raises(OSError, match="the file shrank"):
        copy_file(tmp_path / "first", tmp_path / "copy")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "processor_config.json", "sub/x.txt"])
@pytest.mark.parametrize("parts", ["model,edit", "model,originals", "dry run"])
def test_a_file_that_claims_a_terabyte_is_refused_by_name(name, parts, model, files, concept, refused, tmp_path):
    (model / name).parent.mkdir(exist_ok=True)
    sparse(model / name, HUGE)
    more = ("--dry-run",) if parts == "dry run" else ("--save", parts)
    done = refused("unlearn", model, *concept, "--statistics", files.statistics, *more, "--out", tmp_path / "out")
    said = done.errors.replace("\n", "")
    assert str(model / name) in said
    assert f"{HUGE:,}" in said and f"{MAX_CARRIED_BYTES:,}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool.jinja", "added_tokens.json"])
@pytest.mark.parametrize("size", [HUGE, MAX_CARRIED_BYTES])
def test_files_of_a_tokenizer_are_bounded_where_nothing_is_copied(name, size, model, files, refused, tmp_path):
    (model / name).parent.mkdir(exist_ok=True)
    sparse(model / name, size)
    done = refused("stats", model, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert f"{model / name} has {size:,} bytes" in done.errors.replace("\n", "")


@pytest.mark.parametrize("name", ["README.md", "report.json", "edit.safetensors"])
def test_originals_of_a_terabyte_are_refused_by_name(name, model, files, concept, refused, tmp_path):
    sparse(model / name, HUGE)
    given = ("--statistics", files.statistics, "--save", "model,originals", "--out", tmp_path / "out")
    assert str(model / name) in refused("unlearn", model, *concept, *given).errors.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_weights_of_a_terabyte_that_are_not_loaded_are_left_alone(
    model, files, concept, command, within_limits, tmp_path
):
    sparse(model / "other.safetensors", HUGE)
    sparse(model / "other.bin", HUGE)
    given = ("--statistics", files.statistics, "--out", tmp_path / "out")
    with within_limits():
        done = command("unlearn", model, *concept, *given)
    assert done.code == 0, done.errors
    assert "other.bin, other.safetensors" in done.errors.replace("\n", " ")
    assert not [*(tmp_path / "out").glob("other.*")]
    assert other_weights(model, ["model.safetensors"]) == ["other.bin", "other.safetensors"]


def test_a_link_out_of_a_folder_below_is_refused(model, tmp_path):
    (model / "sub").mkdir()
    (model / "sub" / "x.txt").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="outside the model's folder"):
        carried_files(model)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_has_the_permissions_that_the_umask_gives(mask, model, files, concept, command, tmp_path):
    os.chmod(model / "model.safetensors", 0o640)
    before = os.umask(mask)
    try:
        given = ("--statistics", files.statistics, "--save", "model,edit,lora,originals", "--out", tmp_path / "out")
        assert command("unlearn", model, *concept, *given).code == 0
        write_tensors(tmp_path / "file", {"format": "rocr test"}, {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    own = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    names = {path.name for path in own}
    assert {"model.safetensors", "edit.safetensors", "adapter_model.safetensors", "config.json", "report.json"} <= names
    for path in [*own, tmp_path / "file"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    kept = tmp_path / "out" / "originals" / "model.safetensors"
    assert kept.samefile(model / "model.safetensors") and stat.S_IMODE(kept.stat().st_mode) == 0o640


def test_links_to_inputs_keep_their_permissions(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "input")
    assert stat.S_IMODE((tmp_path / "input").stat().st_mode) == 0o600
    with new_directory(tmp_path / "out") as partial:
        os.link(tmp_path / "input", partial / "linked")
    assert stat.S_IMODE((tmp_path / "input").stat().st_mode) == 0o600


def test_a_model_in_the_hubs_cache_is_rewritten_from_there(files, concept, command, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(files.model, snapshot)
    first = load_file(snapshot / "model.safetensors") | {"mtp.weight": torch.ones(3)}
    (snapshot / "model.safetensors").unlink()
    save_file(first, snapshot / "model.safetensors", {"format": "pt"})
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    done = command("unlearn", "owner/name", *concept, "--statistics", files.statistics, "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    out = load_file(tmp_path / "out" / "model.safetensors")
    edited = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert set(first) == set(out) and {name for name in out if not torch.equal(out[name], first[name])} == edited
    assert command("verify", tmp_path / "out").code == 0
    assert command("revert", tmp_path / "out", "--out", tmp_path / "back").code == 0
    assert all(torch.equal(first[n], back) for n, back in load_file(tmp_path / "back" / "model.safetensors").items())
