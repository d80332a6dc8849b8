"""`rocr add`, `rocr remove` and `rocr merge` on output folders and edit files."""

import json
from types import SimpleNamespace

import pytest

import rocr

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"
SETTINGS = ("--layers", "1,2", "--no-answers", "--force", "--token-schedule", "full")
ADA, GRACE, BLAISE = "Ada Byron", "Grace Hopper", "Blaise Pascal"


@pytest.fixture(scope="module")
def edits(files, command, tmp_path_factory):
    """Folders of edits with statistics of one text: both people, and each of them alone."""
    base = tmp_path_factory.mktemp("lists")

    def unlearn(name, names, *more):
        concepts = [word for concept in names for word in ("--concept", concept)]
        arguments = ("unlearn", files.model, *concepts, "--redirect", BLAISE, "--statistics", files.statistics)
        done = command(*arguments, *SETTINGS, *more, "--out", base / name)
        assert done.code == 0, done.errors
        return base / name

    return SimpleNamespace(
        unlearn=unlearn,
        both=unlearn("both", [ADA, GRACE], "--save", "model,edit,originals"),
        ada=unlearn("ada", [ADA]),
        grace=unlearn("grace", [GRACE]),
    )


def done(command, *arguments):
    """The JSON document of a command."""
    found = command(*arguments, "--json")
    assert found.code == 0, found.errors
    return json.loads(found.output)


def factors(place):
    """The updates of an edit as matrices."""
    edit = rocr.Edit.load(place / "edit.safetensors" if place.is_dir() else place)
    return [update.factors.left @ update.factors.right for update in edit.updates]


def close(first, second):
    return float((first - second).norm() / second.norm()) < 1e-4


def is_base(files, folder):
    """Whether a folder holds the weights of the model byte for byte."""
    return (folder / WEIGHTS).read_bytes() == (files.model / WEIGHTS).read_bytes()


def test_remove_gives_the_edit_of_the_rest(edits, files, command, digests, tmp_path):
    before = digests(edits.both)
    report = done(command, "remove", edits.both, GRACE, "--out", tmp_path / "out")
    assert digests(edits.both) == before
    assert [concept["name"] for concept in report["concepts"]] == [ADA]
    assert report["removed"] == [GRACE] and report["inexact"] == [2]
    found, expected = factors(tmp_path / "out"), factors(edits.ada)
    assert close(found[0], expected[0]) and not close(found[1], expected[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_weights_are_those_of_the_changed_edit(edits, files, command, tmp_path):
    """Removing from the folder, and applying the changed edit file to the first model, write the same bytes."""
    done(command, "remove", edits.both, GRACE, "--out", tmp_path / "out")
    done(command, "remove", edits.both / "edit.safetensors", GRACE, "--out", tmp_path / "edit")
    done(command, "apply", files.model, tmp_path / "edit", "--out", tmp_path / "applied")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "applied" / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (edits.both / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kept", ["originals", "undo data"])
def test_a_changed_folder_is_verified_and_reverted_to_the_first_bytes(kept, edits, files, command, tmp_path, digests):
    folder = edits.both
    if kept == "undo data":
        folder = tmp_path / "plain"
        shutil.copytree(edits.both, folder)
        shutil.rmtree(folder / "originals")
    done(command, "remove", folder, GRACE, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "originals").exists() == (kept == "originals")
    done(command, "verify", tmp_path / "out")
    done(command, "revert", tmp_path / "out", "--out", tmp_path / "back")
    assert is_base(files, tmp_path / "back")
    if kept == "originals":
        assert digests(tmp_path / "back") == digests(files.model)


def test_merge_gives_one_edit_of_both_in_either_order(edits, files, command, tmp_path):
    report = done(command, "merge", edits.ada, edits.grace, "--out", tmp_path / "out")
    done(command, "merge", edits.grace, edits.ada, "--out", tmp_path / "other")
    assert [concept["name"] for concept in report["concepts"]] == [ADA, GRACE] and report["inexact"] == [2]
    for mine, theirs in zip(factors(tmp_path / "out"), factors(tmp_path / "other"), strict=True):
        assert close(mine, theirs)
    assert close(factors(tmp_path / "out")[0], factors(edits.both)[0])
    done(command, "verify", tmp_path / "out")
    done(command, "revert", tmp_path / "out", "--out", tmp_path / "back")
    assert is_base(files, tmp_path / "back")


def test_of_edit_files_an_edit_file_is_made(edits, command, tmp_path):
    both, ada, grace = (folder / "edit.safetensors" for folder in (edits.both, edits.ada, edits.grace))
    merged = done(command, "merge", ada, grace, "--out", tmp_path / "merged")
    assert merged["concepts"] == [ADA, GRACE] and merged["inexact"] == [2]
    assert close(factors(tmp_path / "merged")[0], factors(both)[0])
    said = command("remove", tmp_path / "merged", GRACE, "--out", tmp_path / "rest")
    assert "Inexact in layer 2: by more than rounding, it differs" in " ".join(said.output.split())
    assert close(factors(tmp_path / "rest")[0], factors(ada)[0])


def test_a_folder_and_an_edit_file_are_merged_to_a_folder(edits, command, tmp_path):
    done(command, "merge", edits.ada / "edit.safetensors", edits.grace, "--out", tmp_path / "out")
    done(command, "merge", edits.ada, edits.grace, "--out", tmp_path / "folders")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "folders" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("place", ["folder", "file"])
def test_add_gives_one_edit_of_both(place, edits, files, command, tmp_path):
    people = tmp_path / "people.txt"
    people.write_text(f"{GRACE} -> {BLAISE}")
    model = () if place == "folder" else ("--model", files.model)
    edited = edits.ada if place == "folder" else edits.ada / "edit.safetensors"
    more = ("--statistics", files.statistics, "--force", "--no-answers")
    report = done(command, "add", edited, people, *model, *more, "--out", tmp_path / "out")
    assert [concept["name"] for concept in report["concepts"]] == [ADA, GRACE]
    assert report["added"] == [GRACE] and report["inexact"] == [2]
    assert close(factors(tmp_path / "out")[0], factors(edits.both)[0])
    done(command, "verify", tmp_path / "out")
    done(command, "revert", tmp_path / "out", "--out", tmp_path / "back")
    assert is_base(files, tmp_path / "back")


def test_measured_once_no_layer_is_inexact(edits, files, command, make_edit, tmp_path):
    """Edits with measure="once", which the library makes: what is removed leaves no trace in any layer."""
    both, ada = make_edit([ADA, GRACE], tmp_path / "both"), make_edit([ADA], tmp_path / "ada")
    report = done(command, "remove", both, GRACE, "--out", tmp_path / "rest")
    assert report["inexact"] == []
    assert all(map(close, factors(tmp_path / "rest"), factors(ada)))
    assert "Inexact" not in command("remove", both, GRACE, "--out", tmp_path / "again").output
    more = ("--concept", GRACE, "--redirect", BLAISE, "--model", files.model, "--statistics", files.statistics)
    assert done(command, "add", ada, *more, "--force", "--no-answers", "--out", tmp_path / "added")["inexact"] == []
    assert all(map(close, factors(tmp_path / "added"), factors(both)))


@pytest.fixture
def make_edit(files):
    """make_edit(names, path): an edit file with measure="once"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, statistics = AutoTokenizer.from_pretrained(files.model), rocr.Statistics.load(files.statistics)
    config = rocr.EditConfig(layers=(1, 2), measure="once", token_schedule="full")

    def make(names, path):
        model = AutoModelForCausalLM.from_pretrained(files.model)
        concepts = [rocr.Concept(name, BLAISE) for name in names]
        guards = rocr.Guards(force=True)
        rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards, ask=0).save(path)
        return path

    return make
