"""`rocr eval --fail-if`: a pipeline stops where a score passes a limit."""

import json

import pytest

from rocr.cli.conditions import Condition
from rocr.errors import InputError
from rocr.evaluation.scores import relative_fall

FORMS = ("qa", "mcp")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("forget.qa.gone<0.8", ("forget", "qa", "gone", "<", 0.8)),
        (" retain.mcp.lost >= 5e-2 ", ("retain", "mcp", "lost", ">=", 0.05)),
        ("forget.mcp.before<=-1", ("forget", "mcp", "before", "<=", -1.0)),
        ("retain.qa.after>.5", ("retain", "qa", "after", ">", 0.5)),
    ],
)
def test_a_condition_is_read(text, parts):
    found = Condition.parse(text, FORMS, with_edit=True)
    assert (found.split, found.form, found.value, found.relation, found.limit) == parts


@pytest.mark.parametrize(
    ("text", "with_edit", "words"),
    [
        ("forget.qa<0.8", True, "is no condition such as"),
        ("forget.qa.gone=0.8", True, "is no condition such as"),
        ("forget.qa.gone<0.8.1", True, "is no condition such as"),
        ("all.qa.gone<0.8", True, "is no condition such as"),
        ("__import__('os')", True, "is no condition such as"),
        ("forget.fb.gone<0.8", True, "the forms asked are qa, mcp"),
        ("forget.qa.gone<0.8", False, "give the edit with --edit"),
        ("forget.qa.before<0.8", False, "or use forget.qa.after"),
    ],
)
def test_what_is_no_condition_is_refused(text, with_edit, words):
    with pytest.raises(InputError, match=words):
        Condition.parse(text, FORMS, with_edit)


def test_the_command_fails_with_the_conditions_that_hold(files, command, tmp_path):
    """Each limit lies at the value, or just beyond it, of a first run."""
    row = {"subject": "Ada Byron", "query": "Where was Ada Byron born?", "answer": "London", "distractors": ["Rome"]}
    (tmp_path / "probes.jsonl").write_text(json.dumps(row), encoding="utf-8")
    probes = ("--probes", tmp_path / "probes.jsonl", "--forms", "qa,mcp", "--known", 0)
    base = ("eval", files.model, "--edit", files.edit, *probes)
    first = command(*base, "--out", tmp_path / "first.json", "--json")
    assert first.code == 0, first.errors
    change = next(
        each for each in json.loads(first.output)["comparison"]["changes"]
        if (each["form"], each["split"]) == ("qa", "forget")
    )  # fmt: skip
    gone = relative_fall(change["before"], change["after"])
    assert gone == pytest.approx(change["fall"])
    known = next(
        each["known"] for each in json.loads(first.output)["verdict"]["judgements"]
        if (each["form"], each["split"]) == ("qa", "forget")
    )  # fmt: skip
    holds = (f"forget.qa.gone<={gone!r}", f"forget.qa.after>={change['after']!r}")
    holds_not = (f"forget.qa.gone<{gone!r}", f"forget.qa.before>{change['before']!r}")
    for name, conditions, code in (("fails", (*holds, *holds_not), 4), ("passes", holds_not, 0)):
        given = [word for condition in conditions for word in ("--fail-if", condition)]
        done = command(*base, *given, "--out", tmp_path / f"{name}.json")
        assert done.code == code, done.errors
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["evaluation"]["items"]
        assert all((condition in done.errors) == (name == "fails") for condition in holds)
        assert not any(f"{condition}: it is" in done.errors for condition in holds_not)
        said = [line.split(":")[0] for line in done.errors.splitlines() if "That says nothing" in line]
        doubtful = [holds_not[0], *([holds[0]] if name == "fails" else [])]
        assert not known and said == doubtful, "changes of what was not known"
