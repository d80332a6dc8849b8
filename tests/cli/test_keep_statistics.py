"""`rocr unlearn --keep-statistics`: what a run collects serves the next one."""

import pytest

import rocr

NAMES = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2", "--no-answers", "--force")


@pytest.mark.parametrize("text", [True, False], ids=["of a text", "of text that the model writes"])
def test_the_next_run_takes_them_and_gives_the_same_weights(files, command, digests, tmp_path, text):
    given = ("--text", files.text) if text else ("--tokens", 300)
    first = ("unlearn", files.model, *NAMES, *given, "--keep-statistics", tmp_path / "kept.safetensors")
    done = command(*first, "--out", tmp_path / "first")
    assert done.code == 0, done.errors
    assert "--statistics of the next run" in done.output + done.errors
    assert rocr.Statistics.load(tmp_path / "kept.safetensors").layers == (1, 2)
    second = (
        "unlearn",
        files.model,
        *NAMES,
        "--statistics",
        tmp_path / "kept.safetensors",
        "--out",
        tmp_path / "second",
    )
    assert command(*second).code == 0
    weights = [digests(tmp_path / out)["model.safetensors"] for out in ("first", "second")]
    assert weights[0] == weights[1]


def test_an_edit_that_is_refused_leaves_them(files, command, tmp_path):
    given = ("unlearn", files.model, *NAMES[:-1], "--strength", "1e6", "--text", files.text)
    done = command(*given, "--keep-statistics", tmp_path / "kept.safetensors", "--out", tmp_path / "out")
    assert done.code == 4 and not (tmp_path / "out").exists()
    assert rocr.Statistics.load(tmp_path / "kept.safetensors").tokens > 0


def test_a_file_that_cannot_be_written_is_refused_first(files, command, tmp_path):
    (tmp_path / "there").write_text("mine", encoding="utf-8")
    base = ("unlearn", files.model, *NAMES, "--out", tmp_path / "out", "--keep-statistics")
    for more, words in (
        ((tmp_path / "there", "--text", files.text), "exists"),
        ((tmp_path / "kept", "--statistics", files.statistics), "leave out --statistics"),
        ((tmp_path / "out" / "kept", "--text", files.text), "beside the folder"),
        ((files.text, "--text", files.text), "is the input"),
    ):
        done = command(*base, *more)
        assert done.code == 2 and words in done.errors, done.errors
    assert (tmp_path / "there").read_text(encoding="utf-8") == "mine" and not (tmp_path / "out").exists()
