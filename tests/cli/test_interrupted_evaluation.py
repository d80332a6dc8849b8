"""An interrupted evaluation: its journal is named, and other questions are refused before the model is loaded."""

import json
import sys

import pytest

from rocr.cli.interruption import Interrupted
from rocr.evaluation.scoring import score_answers

ROWS = [
    {"subject": "Ada Byron", "query": "Where was Ada Byron born?", "answer": "London", "distractors": ["Rome", "Oslo"]},
    {"subject": "Blaise Pascal", "query": "What did Pascal weigh?", "answer": "the air", "distractors": ["a key"]},
]


@pytest.fixture
def probes(tmp_path):
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_the_journal_is_named_and_continued_or_refused_at_once(files, command, probes, tmp_path, monkeypatch):
    def stopped(model, questions, receive, *more):
        def first(*found):
            receive(*found)
            raise Interrupted

        score_answers(model, questions, first, *more)

    given = ("eval", files.model, "--probes", probes, "--out", tmp_path / "out.json")
    journal = tmp_path / "out.json.journal-before"
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["rocr.evaluation.evaluate"], "score_answers", stopped)
        done = command(*given)
    assert done.code == 130 and journal.exists() and not (tmp_path / "out.json").exists()
    assert f"{journal}: the same command continues from there." in done.errors.replace("\n", "")

    for other in (("--forms", "qa"), ("--orders", 2), ("--probes", "namesakes")):
        refused = command(*given, *other)
        assert refused.code == 2 and "which was interrupted" in refused.errors
        assert "load:" not in refused.errors
    assert command(*given).code == 0
    assert not journal.exists() and (tmp_path / "out.json").exists()
