"""`rocr add`, `rocr remove` and `rocr merge` on output folders and edit files."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

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


def check_no_temporary_names(folder):
    """No file of an output names the folder in which the first model was restored."""
    for path in folder.rglob("*"):
        assert path.is_dir() or b".partial-" not in path.read_bytes(), path


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
    check_no_temporary_names(tmp_path / "out")
    assert f"# {files.model.name}, edited by rocr" in (tmp_path / "out" / "README.md").read_text()


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


@pytest.mark.parametrize(
    ("place", "alias", "removed"), [("folder", "", GRACE), ("file", " | Amazing Grace", "amazing grace")]
)
def test_add_gives_one_edit_of_both(place, alias, removed, edits, files, command, tmp_path):
    people = tmp_path / "people.txt"
    people.write_text(f"{GRACE}{alias} -> {BLAISE}")
    model = () if place == "folder" else ("--model", files.model)
    edited = edits.ada if place == "folder" else edits.ada / "edit.safetensors"
    more = ("--statistics", files.statistics, "--force", "--no-answers")
    report = done(command, "add", edited, people, *model, *more, "--out", tmp_path / "out")
    assert [concept["name"] for concept in report["concepts"]] == [ADA, GRACE]
    assert report["added"] == [GRACE] and report["inexact"] == [2]
    added = factors(tmp_path / "out")[0]
    assert close(added, factors(edits.both)[0]) == (alias == "")
    check_no_temporary_names(tmp_path / "out")
    done(command, "verify", tmp_path / "out")
    done(command, "revert", tmp_path / "out", "--out", tmp_path / "back")
    assert is_base(files, tmp_path / "back")
    done(command, "remove", tmp_path / "out" / "edit.safetensors", removed, "--out", tmp_path / "rest")
    rest = factors(tmp_path / "rest")[0]
    assert close(rest, factors(edits.ada)[0]) and not close(added, rest)


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


@pytest.mark.slow
def test_the_text_of_the_edit_stands_for_its_statistics(edits, files, command, tmp_path):
    """The same text and number of tokens give the same edit as its statistics; fewer tokens are refused."""
    made = ("unlearn", files.model, "--concept", ADA, "--redirect", BLAISE, *SETTINGS, "--text", files.text)
    done(command, *made, "--tokens", 400, "--seed", 3, "--save", "model,edit", "--out", tmp_path / "ada")
    more = ("--concept", GRACE, "--redirect", BLAISE, "--text", files.text, "--force", "--no-answers")
    done(command, "add", tmp_path / "ada", *more, "--tokens", 400, "--out", tmp_path / "out")
    both = (*made, "--concept", GRACE, "--tokens", 400, "--seed", 3, "--out", tmp_path / "both")
    done(command, *both)
    assert close(factors(tmp_path / "out")[0], factors(tmp_path / "both")[0])
    refused = command("add", tmp_path / "ada", *more, "--tokens", 300, "--out", tmp_path / "other")
    assert refused.code == 2 and "400" in refused.errors and "300" in refused.errors


def test_a_list_that_grows_beyond_the_limit_is_refused_unless_allowed(edits, files, command, tmp_path, monkeypatch):
    import rocr.cli.add
    import rocr.cli.unlearn

    monkeypatch.setattr(rocr.cli.unlearn, "MAX_CONCEPTS", 1)
    more = ("--concept", GRACE, "--redirect", BLAISE, "--statistics", files.statistics, "--force", "--no-answers")
    arguments = ("add", edits.ada, *more, "--out", tmp_path / "out")
    refused = command(*arguments)
    assert refused.code == 2 and "2 concepts, above the limit of 1" in refused.errors
    assert command(*arguments, "--allow-long-list").code == 0


def test_limits_of_the_edit_of_all_are_passed_by_force_only(edits, files, command, tmp_path):
    hard = edits.unlearn("hard", [ADA], "--strength", "100")
    more = ("--concept", GRACE, "--redirect", BLAISE, "--statistics", files.statistics, "--no-answers")
    arguments = ("add", hard, *more, "--out", tmp_path / "out")
    found = command(*arguments)
    assert found.code == 4 and "--force" in found.errors and not list(tmp_path.iterdir())
    assert done(command, *arguments, "--force")["limits_passed"]


@pytest.fixture(scope="module")
def others(edits, files, tmp_path_factory):
    """Edits that cannot be merged with the others, models that are not theirs, and damaged folders."""
    base = tmp_path_factory.mktemp("others")
    shutil.copytree(edits.both, base / "damaged")
    original = base / "damaged" / "originals" / WEIGHTS
    data = bytearray(original.read_bytes())
    data[-1] ^= 1
    original.unlink()
    original.write_bytes(data)
    (base / "edit-only").mkdir()
    shutil.copy(edits.ada / "edit.safetensors", base / "edit-only")
    shutil.copytree(edits.ada, base / "changed")
    tensors = load_file(base / "changed" / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, base / "changed" / WEIGHTS, {"format": "pt"})
    shutil.copytree(files.model, base / "model")
    tensors = load_file(base / "model" / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.5
    save_file(tensors, base / "model" / WEIGHTS, {"format": "pt"})
    return SimpleNamespace(
        base=base,
        statistics=base / "statistics",
        strong=edits.unlearn("strong", [GRACE], "--ridge", "3"),
        other=base / "other",
    )


@pytest.fixture(scope="module")
def of_another_model(others, files, command):
    for arguments in (
        ("stats", others.base / "model", "--text", files.text, "--layers", "1,2", "--out", others.statistics),
        (
            *("unlearn", others.base / "model", "--concept", GRACE, "--redirect", BLAISE, *SETTINGS),
            *("--statistics", others.statistics, "--out", others.other),
        ),
    ):
        found = command(*arguments)
        assert found.code == 0, found.errors
    return others


def refused(command, tmp_path, code, words, *arguments):
    """A command ends with a code and one sentence with some words, and writes nothing."""
    before = sorted(tmp_path.iterdir())
    found = command(*arguments, *(() if "--out" in arguments else ("--out", tmp_path / "out")))
    assert found.code == code, found.errors
    assert words in " ".join(found.errors.split()) and "Traceback" not in found.errors
    assert sorted(tmp_path.iterdir()) == before


REFUSED = {
    "an unknown name": (2, "holds no 'Alan Turing'", lambda e, o: ("remove", e.both, "Alan Turing")),
    "nothing left": (2, "All 2 concepts would be removed", lambda e, o: ("remove", e.both, ADA, GRACE)),
    "a name twice": (2, "'ada byron' is given twice", lambda e, o: ("remove", e.both, ADA, "ada byron")),
    "an empty name": (2, "The name", lambda e, o: ("remove", e.both, "")),
    "no edit": (2, "There is no edit file at", lambda e, o: ("remove", e.both / "originals", ADA)),
    "no model": (2, "To change its edit alone, give", lambda e, o: ("remove", o.base / "edit-only", ADA)),
    "an option for folders": (
        *(2, "--lora-rank is for output folders"),
        lambda e, o: ("remove", e.both / "edit.safetensors", ADA, "--lora-rank", 1),
    ),
    "damaged originals": (3, "differs from the original file", lambda e, o: ("remove", o.base / "damaged", ADA)),
    "changed weights": (3, "is not the weight after this edit", lambda e, o: ("merge", o.base / "changed", e.grace)),
    "one edit": (2, "give at least two", lambda e, o: ("merge", e.ada)),
    "an edit twice": (2, ADA, lambda e, o: ("merge", e.ada, e.ada)),
    "other settings": (2, "different settings", lambda e, o: ("merge", e.ada, o.strong)),
    "another model": (2, "different models", lambda e, o: ("merge", e.ada, o.other)),
    "an output in an input": (2, "input", lambda e, o: ("merge", e.ada, e.grace, "--out", e.grace / "out")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_changed_is_refused(what, edits, of_another_model, command, tmp_path):
    code, words, arguments = REFUSED[what]
    refused(command, tmp_path, code, words, *arguments(edits, of_another_model))


def test_what_cannot_be_added_is_refused(edits, of_another_model, files, command, tmp_path):
    new = ("--concept", GRACE, "--redirect", BLAISE, "--force", "--no-answers")
    right, its = (("--statistics", place) for place in (files.statistics, of_another_model.statistics))
    file = edits.ada / "edit.safetensors"
    cases = [
        ("give the model that it was made for with --model", file, *new, *right),
        ("leave out --model", edits.ada, *new, *right, "--model", files.model),
        ("holds this edit already", file, *new, *right, "--model", edits.ada),
        ("were collected on", file, *new, *right, "--model", of_another_model.base / "model"),
        ("The edit was made for", file, *new, *its, "--model", of_another_model.base / "model"),
        ("The edit was made for", file, *new, "--text", files.text, "--model", of_another_model.base / "model"),
        ("were collected on", edits.ada, *new, *its),
        (GRACE, edits.both, *new, *right),
        ("--concept needs a redirect", edits.ada, "--concept", GRACE, *right),
    ]
    for words, *arguments in cases:
        refused(command, tmp_path, 2, words, "add", *arguments)
