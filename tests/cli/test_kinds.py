"""Kinds of concepts on the command line: in the list, in the questions, and in what is written and checked."""

import json

import pytest

import rocr

pytestmark = pytest.mark.usefixtures("one_thread")
LIST = """name,redirect,kind
Ada Byron,Blaise Pascal,
the roses,a key,thing
Robert Downey Jr.,a gardener,person
"""


def test_a_thing_is_asked_what_it_is_and_its_kind_is_recorded(files, command, tmp_path):
    (tmp_path / "list.csv").write_text(LIST, encoding="utf-8")
    shown = json.loads(command("info", tmp_path / "list.csv", "--json").output)
    assert (shown["persons"], shown["things"]) == (1, 1)

    settings = ("--statistics", files.statistics, "--layers", "1,2", "--force", "--save", "model,edit")
    ask = ("--ask", "Who is {}?", "--ask", "Where is {}?", "--control", "rain", "--answer-tokens", "2")
    done = command("unlearn", files.model, tmp_path / "list.csv", *settings, *ask, "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [answer["question"] for answer in report["answers"]] == [
        *("Who is Ada Byron?", "Where is Ada Byron?", "What is the roses?", "Where is the roses?"),
        *("Who is Robert Downey Jr.?", "Where is Robert Downey Jr.?", "Who is rain?", "Where is rain?"),
    ]
    assert [answer["name"] for answer in report["answers"]][::2] == [
        "Ada Byron",
        "the roses",
        "Robert Downey Jr.",
        "rain",
    ]
    assert [concept.get("kind", "unset") for concept in report["concepts"]] == ["unset", "thing", "person"]
    edit = rocr.Edit.load(tmp_path / "out" / "edit.safetensors")
    assert [concept.kind for concept in edit.concepts] == [None, "thing", "person"]

    assert command("verify", tmp_path / "out").code == 0
    report["concepts"][1]["kind"] = "person"
    (tmp_path / "out" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    done = command("verify", tmp_path / "out", "--json")
    assert done.code == 3 and "they differ in concepts" in done.output
