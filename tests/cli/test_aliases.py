"""`rocr aliases` on a tiny model that is trained to answer: what it takes, what it leaves, and what it writes."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import rocr
from rocr import Concept
from tests.support.answering import ADA, LISTED, SPELLINGS, train_answers

pytestmark = pytest.mark.thorough
LANGUAGES = ("Russian", "Chinese", "Greek")
FIRST = Concept(ADA, "Blaise Pascal", ("ada byron",), "person")


@pytest.fixture(scope="module")
def trained(make_model, tokenizer, tmp_path_factory):
    """A folder with a model that answers questions about Ada Byron, and a list with her name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96, "initializer_range": 0.05}
    model = make_model("Llama", **sizes)
    train_answers(model, tokenizer, [FIRST])
    base = tmp_path_factory.mktemp("trained")
    model.save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    (base / "list.jsonl").write_text(f"{json.dumps(FIRST.to_json())}\n", encoding="utf-8")
    yield SimpleNamespace(model=model, folder=base / "model", list=base / "list.jsonl")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def aliases(trained, command, tmp_path_factory):
    """aliases(options, text of a list): the command's document, and what it says; the same arguments run once."""
    base, known = tmp_path_factory.mktemp("aliases"), {}

    def run(*more, text=None):
        if (more, text) not in known:
            place = base / str(len(known))
            place.mkdir()
            concepts = trained.list if text is None else place / "names.txt"
            if text is not None:
                concepts.write_text(text, encoding="utf-8")
            languages = () if "--languages" in more else ("--languages", *LANGUAGES)
            given = ("aliases", trained.folder, concepts, "--out", place / "out.jsonl", "--json")
            done = command(*given, *languages, *more)
            assert done.code == 0, done.errors
            assert sorted(path.name for path in place.iterdir()) == ["names.txt"] * (text is not None) + ["out.jsonl"]
            known[more, text] = SimpleNamespace(**json.loads(done.output), errors=done.errors)
        return known[more, text]

    return run


def by_name(found):
    """The proposals by what they propose; those without a name, and lists, by what is asked for."""
    by = {}
    for each in found.proposals:
        asked = f"list of {each['language']}" if each["question"].startswith("Names in ") else each["language"]
        by.setdefault(each["name"] or asked or each["kind"], each)
    return by


def test_what_the_model_says_of_the_concept_is_taken_and_the_rest_left(trained, aliases, tokenizer):
    found = aliases()
    proposals = by_name(found)
    taken = ["Augusta Ada Byron", SPELLINGS["Russian"], LISTED["Chinese"], "the author of Notes"]
    assert [name for name, each in proposals.items() if each["taken"]] == taken
    assert rocr.load_concepts(found.out) == [Concept(ADA, "Blaise Pascal", ("ada byron", *taken), "person")]
    for name in taken:
        limit = 0.25 if proposals[name]["near"] else 0.5
        assert proposals[name]["share"] > 0.8 and proposals[name]["reason"].endswith(f"is at least {limit}")
    for name in ("Engine Queen", "Rose", SPELLINGS["Greek"]):
        limit = 0.25 if proposals[name]["near"] else 0.5
        assert proposals[name]["share"] < 0.25 and proposals[name]["reason"].endswith(f"is below {limit}")
    left = proposals["Chinese"]
    assert (left["share"], left["near"], left["reason"]) == (None, None, "no letters of Chinese: 'Rain.'")
    assert proposals["Rose"]["answer"] == 'The "Engine Queen" or "Rose".'
    kinds = [proposal["kind"] for proposal in found.proposals]
    assert kinds == ["full name", "nickname", "nickname", *["script"] * 6, "description"]
    again = [each["reason"] for each in found.proposals if each["question"].startswith("Names in Russian")]
    assert again == ["on the list already"]
    for text in ("Proposals", "share", "not taken", "near", "4 of 10 proposals were taken. Read it before using it"):
        assert text in " ".join(found.errors.split())
    library = rocr.propose_aliases(trained.model, tokenizer, [FIRST], LANGUAGES)
    assert library.concepts == rocr.load_concepts(found.out)
    assert [each.to_json() for each in library.proposals] == found.proposals


def test_languages_and_the_limit_are_chosen(aliases):
    assert {each["language"] for each in aliases("--languages", "Greek").proposals} == {"Greek", None}
    taken = {}
    for least in (0.0, 0.9, 1.0):
        judged = [each for each in aliases("--least", str(least)).proposals if each["share"] is not None]
        for each in judged:
            assert each["taken"] == (each["share"] >= (least / 2 if each["near"] else least)), each
        taken[least] = {each["name"] for each in judged if each["taken"]}
    assert taken[1.0] <= taken[0.9] < taken[0.0]


def test_the_model_is_loaded_in_a_dtype(aliases):
    shares = [by_name(aliases(*more))["Rose"]["share"] for more in ((), ("--dtype", "bfloat16"))]
    assert shares[0] != shares[1]


def test_related_things_become_concepts_whose_redirect_is_chosen(aliases):
    found = aliases("--related")
    proposals = {each["name"]: each for each in found.proposals if each["kind"] == "related"}
    assert proposals["Notes"]["reason"] == "asked 'Who wrote Notes?', the model names Ada Byron"
    assert proposals["Rain"]["reason"] == "asked who wrote, founded or made it, the model does not name Ada Byron"
    assert rocr.load_concepts(found.out)[1:] == [Concept("Notes", "auto", (), "thing")]
    assert "Notes" not in [concept["name"] for concept in aliases().concepts]
    assert aliases("--related", "--redirect", "a key").concepts[1]["redirect"] == "a key"


def test_a_list_without_redirects_stays_without_unless_one_is_given(aliases):
    text = f"{ADA}\nGrace Hopper -> rain\n"
    found = aliases(text=text)
    assert [concept.get("redirect") for concept in found.concepts] == [None, "rain"]
    found = aliases("--redirect", "a key", text=text)
    assert [concept["redirect"] for concept in found.concepts] == ["a key", "rain"]


def test_a_name_on_the_list_is_not_proposed_twice(aliases):
    text = f"{ADA} -> the author of notes\nAUGUSTA ADA BYRON | rain -> a key\n"
    found = aliases("--related", text=text)
    reasons = {each["name"]: each["reason"] for each in found.proposals if each["concept"] == ADA}
    assert reasons["Augusta Ada Byron"] == "a name of AUGUSTA ADA BYRON on the list"
    assert reasons["the author of Notes"] == "a redirect of the list"
    assert reasons["Rain"] == "a name of AUGUSTA ADA BYRON on the list"
    assert rocr.load_concepts(found.out)


def test_the_list_is_taken_by_unlearn(aliases, trained, files, command, tmp_path):
    done = command(
        *("unlearn", trained.folder, aliases("--related").out, "--text", files.text, "--tokens", 200, "--no-answers"),
        *("--layers", "1", "--force", "--save", "edit", "--out", tmp_path / "edited", "--json"),
    )
    assert done.code == 0, done.errors
    first, second = json.loads(done.output)["concepts"]
    assert first["name"] == ADA and second["name"] == "Notes" and second["redirect"] != "auto"


def test_what_cannot_be_written_or_read_is_refused_before_the_model_is_loaded(trained, command, tmp_path, monkeypatch):
    monkeypatch.setattr("rocr.model.load.load_model", None)
    out = tmp_path / "out.jsonl"

    def refused(*arguments, words):
        done = command("aliases", trained.folder, *arguments)
        assert done.code == 2 and words in " ".join(done.errors.split()), done.errors
        assert "Traceback" not in done.errors and not list(tmp_path.glob("out*.partial*"))

    refused(trained.list, "--out", tmp_path / "out.txt", words="give it a name that ends in .jsonl")
    refused(trained.list, "--out", out, "--languages", "Klingon", words="Unknown language 'Klingon'")
    refused(trained.list, "--out", out, "--least", "2", words="is not a number from 0 to 1")
    refused(trained.list, "--out", out, "--redirect", "ADA BYRON", words="'ADA BYRON' is itself a name on the list")
    refused(tmp_path / "none.jsonl", "--out", out, words="does not exist")
    refused(trained.list, words="Missing option '--out'")
    refused("--out", out, words="Missing argument 'CONCEPTS'")
    refused(trained.list, "--out", trained.list, "--overwrite", words="list.jsonl")
    out.write_text("old", encoding="utf-8")
    refused(trained.list, "--out", out, words="exists")
    assert out.read_text(encoding="utf-8") == "old"


def test_an_existing_list_is_replaced_where_that_is_asked_for(trained, command, tmp_path):
    (tmp_path / "out.jsonl").write_text("old", encoding="utf-8")
    given = ("aliases", trained.folder, trained.list, "--languages", "Greek", "--out", tmp_path / "out.jsonl")
    assert command(*given, "--overwrite").code == 0
    assert rocr.load_concepts(tmp_path / "out.jsonl")[0].name == ADA


def test_an_interruption_leaves_nothing(trained, command, tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text("old", encoding="utf-8")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rocr.edit.aliases.check_proposals", interrupted)
    done = command("aliases", trained.folder, trained.list, "--out", tmp_path / "out.jsonl", "--overwrite")
    assert done.code == 130 and "Interrupted" in done.errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "old"


def test_unlearn_takes_the_aliases_itself(trained, tokenizer, texts):
    """With variants="all", an edit has the concepts that `propose_aliases` gives, and spellings of the names."""
    model = copy.deepcopy(trained.model)
    expected = rocr.propose_aliases(model, tokenizer, [FIRST]).concepts
    assert len(expected[0].aliases) > len(FIRST.aliases)
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
    keys = {}
    for variants, concepts in (("all", [FIRST]), ("spelling", expected), ("none", expected)):
        config = rocr.EditConfig(layers=(1,), templates=("Who is {}?",), variants=variants)
        guards = rocr.Guards(force=True)
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards, retain=[])
        edit.revert(model)
        assert edit.concepts == expected
        keys[variants] = edit.updates[0].keys
    assert torch.equal(keys["all"], keys["spelling"]) and len(keys["spelling"]) > len(keys["none"])
