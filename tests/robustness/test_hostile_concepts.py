"""Concept files made to do harm, of each of the three kinds: a sentence, soon, and nothing is written."""

import csv
import io
import json

import pytest

from rocr import load_concepts
from tests.support.hostile import DIGITS, HUGE, PICKLE, PLACES, TERMINAL

pytestmark = pytest.mark.thorough

GOOD = {"name": "Ada Byron", "redirect": "Blaise Pascal"}
LONG = "x" * 201
INVISIBLE = {
    "a zero byte": "\0",
    "an escape": "\x1b[2J",
    "a bell": "\x07",
    "a backspace": "\b",
    "a delete": "\x7f",
    "a next line": "\x85",
    "a soft hyphen": "\u00ad",
    "a grapheme joiner": "\u034f",
    "an Arabic letter mark": "\u061c",
    "a Hangul filler": "\u115f",
    "a vowel separator": "\u180e",
    "a zero-width space": "\u200b",
    "a zero-width joiner": "\u200d",
    "a left-to-right mark": "\u200e",
    "a line separator": "\u2028",
    "a paragraph separator": "\u2029",
    "an embedding": "\u202a",
    "an override": "\u202e",
    "a word joiner": "\u2060",
    "an isolate": "\u2066",
    "a variation selector": "\ufe0f",
    "a byte order mark inside": "\ufeff",
    "an annotation": "\ufff9",
    "a tag": "\U000e0041",
}
RECORDS = {
    **{f"a name with {what}": [{**GOOD, "name": f"Ada{character}Byron"}] for what, character in INVISIBLE.items()},
    **{f"a redirect with {what}": [{**GOOD, "redirect": f"a{INVISIBLE[what]}b"}] for what in (*INVISIBLE,)[::3]},
    **{f"an alias with {what}": [{**GOOD, "aliases": [f"a{INVISIBLE[what]}b"]}] for what in (*INVISIBLE,)[1::3]},
    "a name of 201 characters": [{**GOOD, "name": LONG}],
    "a redirect of 201 characters": [{**GOOD, "redirect": LONG}],
    "an alias of 201 characters": [{**GOOD, "aliases": [LONG]}],
    "a name of 10 MB": [{**GOOD, "name": HUGE}],
    "a redirect of 10 MB": [{**GOOD, "redirect": HUGE}],
    "an alias of 10 MB": [{**GOOD, "aliases": [HUGE]}],
    "no redirect": [{"name": "Ada Byron"}],
    "no name": [{"name": "", "redirect": "Blaise Pascal"}],
    "an empty alias": [{**GOOD, "aliases": ["Ada", "", "Countess"]}],
    "the same twice": [GOOD, GOOD],
    "the same in capitals": [GOOD, {**GOOD, "name": "ADA BYRON"}],
    "the same in full width": [GOOD, {**GOOD, "name": "\uff21da Byron"}],
    "the same with a wide space": [GOOD, {**GOOD, "name": "Ada\u2003Byron"}],
    "a name that is another's alias": [{**GOOD, "aliases": ["Ada"]}, {**GOOD, "name": "ada"}],
    "an alias twice": [{**GOOD, "aliases": ["Ada", "Ada"]}],
    "redirected to itself": [{"name": "Ada", "redirect": "ada"}],
    "redirected to its alias": [{"name": "Ada", "redirect": "Countess", "aliases": ["countess"]}],
    "redirected to the next": [GOOD, {"name": "Blaise Pascal", "redirect": "a gardener"}],
    "in a circle": [{"name": "A", "redirect": "B"}, {"name": "B", "redirect": "C"}, {"name": "C", "redirect": "A"}],
    "a title for the terminal": [{**GOOD, "name": TERMINAL}],
    "one good, then a thousand bad": [GOOD, *[{"name": LONG, "redirect": "b"}] * 1000],
}


def as_txt(records):
    lines = []
    for record in records:
        names = " | ".join([record["name"], *record.get("aliases", [])])
        lines.append(f"{names} -> {record['redirect']}" if "redirect" in record else names)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def as_csv(records):
    text = io.StringIO()
    rows = csv.DictWriter(text, ["name", "redirect", "aliases"])
    rows.writeheader()
    rows.writerows({**record, "aliases": "|".join(record.get("aliases", []))} for record in records)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_jsonl(records):
    return "\n".join(map(json.dumps, records)).encode()


CONTAINERS = {
    "empty": b"",
    "blank lines": b"\n \n\t\n",
    "zeros": b"\0" * 1000,
    "not UTF-8": b"Ada \xff\xfe -> Blaise\n",
    "cut within a character": "Ada -> Frédéric".encode()[:-4],
    "UTF-16": "name -> b\n".encode("utf-16"),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "a pickle": PICKLE,
    "over 64 MiB": lambda: b"\n" * (64 * 2**20 + 1),
}
FORMS = {
    ".txt": {
        **CONTAINERS,
        "only comments": b"# Ada -> Blaise\n # more\n",
        "two arrows": b"A -> B -> C",
        "a bar after the arrow": b"A -> B | C",
        "only an arrow": b"->",
        "a hundred thousand arrows": b"->" * 10**5,
        "a million bars": b"|" * 10**6,
        "a million concepts": lambda: b"".join(b"%d -> b\n" % i for i in range(10**6)),
        "a million aliases": lambda: b" | ".join(b"%d" % i for i in range(10**6)) + b" -> b",
    },
    ".csv": {
        **CONTAINERS,
        "only a header": b"name,redirect\n",
        "no header": b"Ada Byron,Blaise Pascal\n",
        "a header twice": b"name,name,redirect\nA,A,B\n",
        "another column": b"name,redirect,born\nA,B,1815\n",
        "semicolons": b"name;redirect\nA;B\n",
        "an open quotation": b'name,redirect\n"A,B\n',
        "a quotation that goes on": b'name,redirect\n"A"b,C\n',
        "more cells than columns": b"name,redirect\nA,B,C\n",
        "a field over the limit": b"name,redirect\n" + b"a" * 200_000 + b",B\n",
        "a million columns": b"name" + b",x" * 10**6 + b"\n",
    },
    ".jsonl": {
        **CONTAINERS,
        "no JSON": b"{\n",
        "a list": b'["A"]\n',
        "a number": b"3\n",
        "null": b"null\n",
        "a surrogate": b'{"name": "A\\ud800", "redirect": "B"}',
        "deep": b"[" * 10**6,
        "a deep name": b'{"name": ' + b"[" * 900 + b"]" * 900 + b', "redirect": "B"}',
        "a field twice": b'{"name": "A", "name": "B", "redirect": "C"}',
        "an unknown field": b'{"name": "A", "redirect": "B", "../born": 1}',
        "a field of 10 MB": b'{"name": "A", "redirect": "B", "' + HUGE.encode() + b'": 1}',
        "a name that is a number": b'{"name": 7, "redirect": "B"}',
        "a name that is NaN": b'{"name": NaN, "redirect": "B"}',
        "a redirect that is infinite": b'{"name": "A", "redirect": -Infinity}',
        "a redirect that is null": b'{"name": "A", "redirect": null}',
        "aliases that are text": b'{"name": "A", "redirect": "B", "aliases": "Ada"}',
        "aliases that are numbers": b'{"name": "A", "redirect": "B", "aliases": [1, 2]}',
        "a number of 10,000 digits": b'{"name": ' + DIGITS.encode() + b"}",
        "many lists": b"[" + b"[]," * 10**6 + b"[]]",
    },
}
CASES = [
    *((suffix, name, records) for suffix in FORMS for name, records in RECORDS.items()),
    *((suffix, name, content) for suffix, contents in FORMS.items() for name, content in contents.items()),
]
WRITERS = {".txt": as_txt, ".csv": as_csv, ".jsonl": as_jsonl}


@pytest.mark.parametrize(("suffix", "name", "contents"), CASES, ids=[f"{name}{suffix}" for suffix, name, _ in CASES])
def test_hostile_concepts(suffix, name, contents, tmp_path, on_reader):
    path = tmp_path / f"bad{suffix}"
    contents = contents() if callable(contents) else contents  # large files are built where they are tested
    path.write_bytes(contents if isinstance(contents, bytes) else WRITERS[suffix](contents))
    on_reader(f"concept files ({suffix})", load_concepts, path)


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_concept_file(suffix, place, tmp_path, on_reader):
    PLACES[place](tmp_path / f"bad{suffix}")
    on_reader(f"concept files ({suffix})", load_concepts, tmp_path / f"bad{suffix}")


def test_the_command_refuses_a_bad_list(files, attack, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(as_jsonl(RECORDS["one good, then a thousand bad"]))
    done = attack("concept lists given to commands", "unlearn", files.model, tmp_path / "bad.jsonl")
    assert "and 950 more" in done.errors
