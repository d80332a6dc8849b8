"""Probe files made to do harm: a sentence with the file, soon, and nothing is written."""

import pytest

from rocr import load_probes
from rocr.evaluation.measures import load_choice_questions
from tests.support.hostile import DEEP, DIGITS, HUGE, NO_OBJECTS, PLACES, to_bytes

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
GOOD = '"subject": "A", "query": "B?", "answer": "C"'
PROBES = NO_OBJECTS | {
    "blank lines": "\n \n\n",
    "deep in a field": f'{{{GOOD}, "distractors": {DEEP}}}',
    "UTF-16": f"{{{GOOD}}}".encode("utf-16"),
    "a field twice": f'{{{GOOD}, "answer": "D"}}',
    "a number of 10,000 digits": f'{{{GOOD}, "form": {DIGITS}}}',
    "no subject": '{"query": "B?", "answer": "C"}',
    "no query": '{"subject": "A", "answer": "C"}',
    "no answer": '{"subject": "A", "query": "B?"}',
    "subject empty": '{"subject": "", "query": "B?", "answer": "C"}',
    "query blank": '{"subject": "A", "query": " \\t", "answer": "C"}',
    "answer empty": '{"subject": "A", "query": "B?", "answer": ""}',
    "subject a number": '{"subject": 1, "query": "B?", "answer": "C"}',
    "query null": '{"subject": "A", "query": null, "answer": "C"}',
    "answer a list": '{"subject": "A", "query": "B?", "answer": ["C"]}',
    "answer true": '{"subject": "A", "query": "B?", "answer": true}',
    "answer not a number": '{"subject": "A", "query": "B?", "answer": NaN}',
    "subject infinite": '{"subject": Infinity, "query": "B?", "answer": "C"}',
    "an unknown field": f'{{{GOOD}, "born": 5}}',
    "a path as field": f'{{{GOOD}, "../../etc": 5}}',
    "a field of 10 MB": f'{{{GOOD}, "{HUGE}": 5}}',
    "an invisible field": f'{{{GOOD}, "form\u200b": "qa"}}',
    "a field to steer the terminal": f'{{{GOOD}, "\\u001b[2J\\u202e": 5}}',
    "distractors text": f'{{{GOOD}, "distractors": "D"}}',
    "distractors numbers": f'{{{GOOD}, "distractors": [1]}}',
    "distractors null": f'{{{GOOD}, "distractors": null}}',
    "distractors twice": f'{{{GOOD}, "distractors": ["D", "d"]}}',
    "distractors empty": f'{{{GOOD}, "distractors": [""]}}',
    "the answer a distractor": f'{{{GOOD}, "distractors": ["c"]}}',
    "form unknown": f'{{{GOOD}, "form": "song"}}',
    "form a list": f'{{{GOOD}, "form": []}}',
    "form of 10 MB": f'{{{GOOD}, "form": "{HUGE}"}}',
    "split unknown": f'{{{GOOD}, "split": "test"}}',
    "split a number": f'{{{GOOD}, "split": 1}}',
    "cloze without a blank": f'{{{GOOD}, "cloze": "B."}}',
    "cloze a number": f'{{{GOOD}, "cloze": 1}}',
    "fb without a blank": f'{{{GOOD}, "form": "fb"}}',
    "mcp without a letter": '{"subject": "A", "query": "B?", "answer": "none", "form": "mcp"}',
    "a duplicate": f"{{{GOOD}}}\n{{{GOOD}}}",
    "a duplicate in capitals": f'{{{GOOD}}}\n{{"subject": "a", "query": "b?", "answer": "x"}}',
    "a surrogate": '{"subject": "\\ud800", "query": "B?", "answer": "C"}',
    "a zero byte": '{"subject": "A\\u0000", "query": "B?", "answer": "C"}',
    "a bidirectional subject": '{"subject": "\\u202eA", "query": "B?", "answer": "C"}',
    "a zero-width subject": '{"subject": "A\\u200b", "query": "B?", "answer": "C"}',
    "a subject of 10 MB": f'{{"subject": "{HUGE}", "query": "B?", "answer": "C"}}',
    "a query of 10 MB": f'{{"subject": "A", "query": "{HUGE}", "answer": "C"}}',
    "an answer of 10 MB": f'{{"subject": "A", "query": "B?", "answer": "{HUGE}"}}',
    "a good one, then a bad one": f"{{{GOOD}}}\n{{",
    "a comma too many": f"{{{GOOD},}}",
    "single quotes": "{'subject': 'A'}",
    "two on one line": f"{{{GOOD}}} {{{GOOD}}}",
    "a thousand bad lines": "{\n" * 1000,
    "a byte short": f"{{{GOOD}",
    "a surrogate in a distractor": f'{{{GOOD}, "distractors": ["\\udfff"]}}',
    "a bidirectional distractor": f'{{{GOOD}, "distractors": ["a\\u2066b"]}}',
    "a wording that is a number": f'{{{GOOD}, "translated": 5}}',
    "a wording without a query": f'{{{GOOD}, "translated": {{"answer": "C"}}}}',
    "a million distractors of nothing": f'{{{GOOD}, "distractors": [{", ".join(["[]"] * 10**6)}]}}',
}


@pytest.mark.parametrize("name", PROBES)
def test_hostile_probes(name, tmp_path, on_reader):
    (tmp_path / "probes.jsonl").write_bytes(to_bytes(PROBES[name]))
    on_reader("probe files", load_probes, tmp_path / "probes.jsonl")


@pytest.mark.parametrize("load", [load_probes, load_choice_questions])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_probe_file(place, load, tmp_path, on_reader):
    PLACES[place](tmp_path / "bad.jsonl")
    on_reader("probe files", load, tmp_path / "bad.jsonl")


MANY = ", ".join(['"B"'] * 1000)
CHOICES = NO_OBJECTS | {
    "choices that are text": '{"question": "A?", "choices": "BC", "gold_idx": 0}',
    "choices of numbers": '{"question": "A?", "choices": [1, 2], "gold_idx": 0}',
    "a thousand choices": f'{{"question": "A?", "choices": [{MANY}], "gold_idx": 0}}',
    "an index beyond": '{"question": "A?", "choices": ["B", "C"], "gold_idx": 2}',
    "an index below": '{"question": "A?", "choices": ["B", "C"], "gold_idx": -1}',
    "an index that is true": '{"question": "A?", "choices": ["B", "C"], "gold_idx": true}',
    "half of a surrogate pair": '{"question": "A\\ud800?", "choices": ["B", "C"], "gold_idx": 0}',
    "a field twice": '{"question": "A?", "question": "B?", "choices": ["B", "C"], "gold_idx": 0}',
    "an index of 10,000 digits": f'{{"question": "A?", "choices": ["B", "C"], "gold_idx": {DIGITS}}}',
}


@pytest.mark.parametrize("name", CHOICES)
def test_hostile_choice_questions(name, tmp_path, on_reader):
    (tmp_path / "bad.jsonl").write_bytes(to_bytes(CHOICES[name]))
    on_reader("choice questions", load_choice_questions, tmp_path / "bad.jsonl")
