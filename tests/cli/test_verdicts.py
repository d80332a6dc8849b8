"""What `rocr unlearn` says in words about its numbers."""

import pytest

import rocr
from rocr.cli.verdicts import next_step, path_note, verdict, weak_sentences


@pytest.mark.parametrize(
    ("distance", "word"),
    [(None, ""), (0.0, "strong"), (0.5, "strong"), (0.51, "partial"), (0.75, "partial"), (0.76, "weak"), (3.0, "weak")],
)
def test_a_distance_has_a_word(distance, word):
    assert verdict(distance) == word


def test_weak_concepts_are_named_with_what_to_try():
    concepts = [{"name": "Ada Byron", "distance": 0.9}, {"name": "Blaise Pascal", "distance": 0.2}]
    answers = [
        {"name": "Blaise Pascal", "on_list": True, "before": "a", "after": "b"},
        {"name": "Robert Downey", "on_list": False, "before": "a", "after": "a"},
    ]
    (sentence,) = weak_sentences(concepts, answers, 1.0)
    assert sentence.startswith("Weak: Ada Byron (90% left).") and "--ridge (0.1)" in sentence
    same = [*answers, {"name": "Ada Byron", "on_list": True, "before": "a", "after": "a"}]
    assert weak_sentences(concepts, same, 1.0)[1].startswith("Answered word for word as before: Ada Byron.")
    assert weak_sentences(concepts[1:], answers, 1.0) == []
    many = weak_sentences([{"name": f"P{i}", "distance": 1.0} for i in range(9)], [], 1.0)
    assert "P4 (100% left) and 4 more" in many[0]


def test_the_next_step_is_a_command_that_the_files_allow():
    report = {"model": "my model", "files": {"edit.safetensors": "", "model.safetensors": ""}}
    assert "rocr eval 'my model' --edit out/edit.safetensors" in next_step(report, "out/")
    for other in ({**report, "files": {}}, {**report, "drift": 0.1}):
        assert next_step(other, "out") == "Next: rocr verify out checks the folder."


def test_a_run_ends_with_words_and_the_next_step(files, command, tmp_path):
    given = (
        "--concept",
        "Ada Byron",
        "--redirect",
        "Blaise Pascal",
        "--layers",
        "1,2",
        "--force",
        "--answer-tokens",
        2,
    )
    out = tmp_path / "out"
    done = command("unlearn", files.model, *given, "--statistics", files.statistics, "--out", out)
    assert done.code == 0, done.errors
    assert "Who is Ada Byron?" in " ".join(done.output.split())
    assert "redirection" in done.output and "Distance left: from the state at the name" in done.output
    assert path_note(str(files.model)) in " ".join(done.errors.split())
    assert all(str(files.model) in (out / name).read_text() for name in ("report.json", "edit.toml")), "what it says"
    last = done.output.splitlines()[-1]
    assert last.startswith("Next: rocr eval") and str(out / "edit.safetensors") in last
    following = last.split("Next: ")[1].split(" measures")[0].replace("evaluation.json", str(tmp_path / "e.json"))
    words = following.split()[1:]
    (tmp_path / "p.jsonl").write_text('{"subject": "Ada Byron", "query": "Who is Ada Byron?", "answer": "rain"}\n')
    asked = command(*words, "--probes", tmp_path / "p.jsonl", "--forms", "qa")
    assert asked.code == 0, asked.errors


def test_a_path_of_this_machine_is_said_to_be_in_the_output(tmp_path):
    assert path_note("models/tiny") is path_note("owner/name") is None
    note = path_note(str(tmp_path))
    assert "publish" in note and str(tmp_path) not in note and len(note) < 150


def test_edits_and_statistics_are_saved_under_a_path_only(files, loaded_edit):
    for saved in (loaded_edit, rocr.Statistics.load(files.statistics)):
        with pytest.raises(rocr.InputError, match="path must be a path, not None"):
            saved.save(None)
