import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import rocr
from rocr.cli.main import main
from rocr.io.svg import escaped

ROWS = [
    {"subject": "Ada Byron", "query": "Where was Ada Byron born?", "answer": "London", "distractors": ["Rome", "Oslo"]},
    {"subject": "Blaise Pascal", "query": "What did Pascal weigh?", "answer": "the air", "distractors": ["a key"]},
]


@pytest.fixture
def folder(model: nn.Module, tokenizer: Any, tmp_path: Path) -> Path:
    place = tmp_path / "model"
    model.save_pretrained(place)  # type: ignore[operator]
    tokenizer.save_pretrained(place)
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return place


def test_a_model_is_evaluated_without_and_with_an_edit(
    folder: Path, model: nn.Module, tokenizer: Any, statistics: rocr.Statistics, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    edit = rocr.unlearn(model, tokenizer, [rocr.Concept("Ada Byron", "a gardener")], statistics)
    edit.save(tmp_path / "edit.safetensors")
    probes, out, page = (str(tmp_path / name) for name in ("probes.jsonl", "report.json", "report.html"))
    arguments = ["eval", str(folder), "--probes", probes, "--edit", str(tmp_path / "edit.safetensors")]
    text = tmp_path / "text.txt"
    text.write_text("The gardener waters the roses before the sun is high. " * 900)
    arguments += ["--forms", "qa,mcp", "--known", "0", "--out", out, "--html", page, "--text", str(text)]
    arguments += ["--attacks", "4-bit", "prefixes", "--generate"]
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document == json.loads(Path(out).read_text())
    assert document["verdict"]["sentence"] in " ".join(said.err.split()), "the verdict ends what is printed"
    assert "qa: a plain question" in said.err and "mcp: the question with up to four options" in said.err
    about = document["about"]
    assert (about["model"], about["edit"]) == ("model", "edit.safetensors") and "torch" in about["versions"]
    assert about["redirects"] == {"Ada Byron": "a gardener"} and about["options"]["text"] == ["text.txt"]
    for written in (Path(out).read_text(), Path(page).read_text()):
        assert str(tmp_path) not in written, "no folder of this machine"
    for when in ("before", "evaluation"):
        assert [answer["probe"] for answer in document[when]["answers"]] == [0, 1]
        assert escaped(document[when]["answers"][0]["text"][:30]) in Path(page).read_text()
    assert [c["split"] for c in document["comparison"]["changes"]] == ["forget", "forget", "retain", "retain"]
    assert any(change["fall"] != 0 for change in document["comparison"]["changes"])
    assert list(document["attacks"]) == ["4-bit", "prefixes"]
    outcomes = {each["name"]: each["outcomes"][0] for each in document["study"]}
    for name, attacked in document["attacks"].items():
        for form in ("qa", "mcp"):
            scores = [outcomes[name][when][form] for when in ("before", "after", "attacked")]
            forms = [each["forms"]["forget"][form] for each in (document["before"], document["evaluation"], attacked)]
            assert scores == pytest.approx([score["score"] for score in forms])
    measures = document["evaluation"]["measures"]
    assert measures["KL divergence"] > 0 and measures["perplexity"] != document["before"]["measures"]["perplexity"]
    assert document["evaluation"]["known"] == 2 and Path(page).stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir() if "journal" in path.name) == []
    assert main(arguments) == 2, "a report that exists is not replaced"
    assert "exists" in capsys.readouterr().err


def test_bad_probes_end_with_code_2_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({**ROWS[0], "answer": ""}) + "\n" + json.dumps(ROWS[0]) + "\n")
    (folder / "model.safetensors").unlink()
    assert main(["eval", str(folder), "--probes", str(bad), "--out", str(tmp_path / "report.json")]) == 2
    message = capsys.readouterr().err
    assert "bad.jsonl:1: has no answer" in message.replace("\n", "")
    assert not (tmp_path / "report.json").exists()


def test_an_empty_set_after_the_filter_ends_with_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(folder), "--probes", str(tmp_path / "probes.jsonl"), "--forms", "qa"]
    assert main([*arguments, "--known", "1", "--out", str(tmp_path / "report.json")]) == 2
    assert "knows none of the 2 probes" in capsys.readouterr().err


def test_methods_are_compared_in_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(folder), "--probes", str(tmp_path / "probes.jsonl"), "--targets", "Ada Byron"]
    arguments += ["--redirect", "a gardener", "--methods", "original,in-context,rocr", "--forms", "qa"]
    arguments += ["--tokens", "200", "--out", str(tmp_path / "results.json")]
    assert main([*arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["method"] for result in results] == ["original", "in-context", "rocr"]
    scores = [result["evaluation"]["forms"]["forget"]["qa"]["score"] for result in results]
    assert len(set(scores)) == 3
    assert main([*arguments[:-1], str(tmp_path / "more.json"), "--methods", "magic"]) == 2
    assert main(["eval", str(folder), "--attacks", "magic", "--out", str(tmp_path / "report.json")]) == 2
    assert "Unknown attacks: magic; they are all, relearn" in capsys.readouterr().err
    assert main(["eval", str(folder), "--attacks", "mask", "--out", str(tmp_path / "report.json")]) == 2
    assert "give the edit file with --edit" in " ".join(capsys.readouterr().err.split())


def test_methods_that_cannot_change_a_model_are_left_out_and_named(
    make_model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --methods; one that is asked for by name is an error."""
    monkeypatch.setattr("rocr.evaluation.baselines.methods.METHODS", ("original", "UniErase"))
    make_model("Mixtral").save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    (tmp_path / "probes.jsonl").write_text(json.dumps({"subject": "Ada", "query": "Who is Ada?", "answer": "a poet"}))
    arguments = ["compare", str(tmp_path / "mixture"), "--probes", str(tmp_path / "probes.jsonl"), "--targets", "Ada"]
    arguments += [
        "--redirect",
        "a gardener",
        "--forms",
        "qa",
        "--tokens",
        "64",
        "--out",
        str(tmp_path / "results.json"),
    ]
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    assert [result["method"] for result in json.loads(said.out)["results"]] == ["original"]
    assert "UniErase is left out: UniErase edits dense MLPs" in " ".join(said.err.split())
    assert main([*arguments, "--methods", "UniErase", "--overwrite"]) == 2


def test_a_target_without_a_question_is_named_before_anything_is_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", str(folder), "--probes", str(tmp_path / "probes.jsonl"), "--targets", "Ada Byron", "No One"]
    arguments += ["--redirect", "a gardener", "--forms", "qa", "--tokens", "200"]
    assert main([*arguments, "--out", str(tmp_path / "results.json")]) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert "No probe that counts asks about 'No One'" in errors
    assert "gradient ascent" not in errors
    assert not (tmp_path / "results.json").exists()
