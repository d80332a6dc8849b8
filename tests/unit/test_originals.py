import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from rocr.errors import InputError, VerificationError
from rocr.export.copying import ORIGINALS_FOLDER as FOLDER
from rocr.export.originals import LIST, original_files, read_list, restore_originals, save_originals
from rocr.model.load import find_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kept(files, concept, command, tmp_path_factory):
    """A model with a card, and its edited copy, which keeps the original files."""
    base = tmp_path_factory.mktemp("originals")
    shutil.copytree(files.model, base / "model")
    (base / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The first card\n", encoding="utf-8")
    given = ("--statistics", files.statistics, "--save", "model,originals", "--out", base / "edited")
    done = command("unlearn", base / "model", *concept, *given)
    assert done.code == 0, done.errors
    return base


@pytest.fixture
def copied(kept, tmp_path):
    """The edited copy without its model."""
    shutil.copytree(kept / "edited", tmp_path / "edited")
    return tmp_path / "edited"


def test_revert_gives_back_the_first_files_byte_for_byte(kept, copied, command, digests, tmp_path):
    first = digests(kept / "model")
    assert digests(copied) != first
    done = command("revert", copied, "--out", tmp_path / "back", "--json")
    assert done.code == 0, done.errors
    assert digests(tmp_path / "back") == first == json.loads(done.output)["originals"]


def test_nothing_is_stored_twice(kept):
    first, store = kept / "model" / "model.safetensors", kept / "edited" / FOLDER
    assert (store / "model.safetensors").samefile(first)
    assert {path.name for path in store.iterdir()} == {LIST, "model.safetensors", "README.md"}
    assert read_list(kept / "edited")["config.json"].kept


def test_the_report_has_the_sha256_of_every_file(kept, digests):
    report = json.loads((kept / "edited" / "report.json").read_text(encoding="utf-8"))
    found = digests(kept / "edited")
    del found["report.json"]
    assert report["files"] == found


def test_weights_beside_the_model_are_given_back_too(files, concept, command, digests, tmp_path):
    shutil.copytree(files.model, tmp_path / "model")
    (tmp_path / "model" / "vision").mkdir()
    for name in ("projector.safetensors", "vision/model.safetensors"):
        save_file({"weight": torch.ones(3, 5)}, tmp_path / "model" / name)
    given = ("--statistics", files.statistics, "--save", "model,edit,originals", "--out", tmp_path / "edited")
    for arguments in (
        ("unlearn", tmp_path / "model", *concept, *given),
        ("revert", tmp_path / "edited", "--out", tmp_path / "back"),
    ):
        done = command(*arguments)
        assert done.code == 0, done.errors
    assert digests(tmp_path / "back") == digests(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", f"{FOLDER}/model.safetensors"])
def test_a_file_that_claims_a_terabyte_is_named_at_once(name, copied, command, tmp_path):
    with (copied / name).open("ab") as file:
        file.truncate(2**40)
    done = command("revert", copied, "--out", tmp_path / "back")
    assert done.code == 3 and f"{copied / name} differs from the original file" in done.errors.replace("\n", "")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["config.json", f"{FOLDER}/model.safetensors"])
def test_a_changed_file_is_named_and_nothing_is_left(name, copied, command, tmp_path):
    content = bytearray((copied / name).read_bytes())
    content[-2] ^= 1
    (copied / name).write_bytes(content)
    done = command("revert", copied, "--out", tmp_path / "back")
    assert done.code == 3 and str(copied / name) in done.errors.replace("\n", "")
    (copied / name).unlink()
    done = command("revert", copied, "--out", tmp_path / "back")
    assert done.code == 3 and "is missing" in done.errors
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize("name", ["../x", "a/../b", "a//b", "./a", "..", "", "/etc/passwd"])
def test_a_list_that_points_elsewhere_is_refused(name, copied):
    listed = {"format": "rocr originals 1", "files": {name: {"sha256": "0", "bytes": 1, "kept": False}}}
    (copied / FOLDER / LIST).write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(InputError, match="no name of a file"):
        read_list(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "rocr originals 1", "files": {}}'])
def test_a_damaged_list_is_refused(text, copied, command, tmp_path):
    (copied / FOLDER / LIST).write_text(text, encoding="utf-8")
    done = command("revert", copied, "--out", tmp_path / "back")
    assert done.code == 2 and LIST in done.errors
    assert not (tmp_path / "back").exists()


def test_a_link_in_place_of_a_file_is_not_followed(copied, tmp_path):
    (copied / "config.json").unlink()
    (copied / "config.json").symlink_to("tokenizer.json")
    (tmp_path / "back").mkdir()
    with pytest.raises(VerificationError, match="missing"):
        restore_originals(copied, tmp_path / "back")


def test_where_links_are_refused_files_are_copied(kept, tmp_path, monkeypatch, digests):
    def refuse(*_args, **_options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    stored = save_originals(find_model(str(kept / "model")), tmp_path)
    assert not (tmp_path / FOLDER / "model.safetensors").samefile(kept / "model" / "model.safetensors")
    assert {f"{FOLDER}/{name}": digest for name, digest in digests(tmp_path / FOLDER).items()} == stored
    monkeypatch.setattr("rocr.io.disk_space.SPARE_BYTES", 2**60)
    (tmp_path / "back").mkdir()
    with pytest.raises(InputError, match="nothing was written"):
        restore_originals(tmp_path, tmp_path / "back")


def test_what_keeps_no_originals_is_refused_before_anything_is_loaded(files, concept, command, tmp_path):
    with pytest.raises(InputError, match="id of a model on a hub"):
        original_files(find_model("owner/name"))
    given = ("--statistics", files.statistics, "--out", tmp_path / "out")
    done = command("unlearn", files.model, *concept, *given, "--save", "edit,originals")
    assert done.code == 2 and "add model" in done.errors
    done = command("unlearn", files.model, *concept, *given, "--lora-rank", "2")
    assert done.code == 2 and "add lora" in done.errors
    assert not list(tmp_path.iterdir())
