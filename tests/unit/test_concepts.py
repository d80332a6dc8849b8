import json
import os
import time
from pathlib import Path

import pytest

from rocr.concepts import Concept, check_concepts, load_concepts
from rocr.errors import InputError

SHIPPED = Path(__file__).parents[2] / "rocr" / "data" / "people.jsonl"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        load_concepts(path, **options)
    return str(caught.value)


def test_the_shipped_list_holds_five_people_with_redirects_and_aliases():
    concepts = load_concepts(SHIPPED)
    assert len(concepts) == 5
    assert all(concept.redirect and concept.aliases for concept in concepts)


def test_names_are_the_name_then_the_aliases():
    assert Concept("J. K. Rowling", "Chopin", ("J.K. Rowling", "Joanne Rowling")).names == (
        "J. K. Rowling",
        "J.K. Rowling",
        "Joanne Rowling",
    )


SAME = [
    Concept("Stephen King", "Frédéric Chopin", ("Stephen Edwin King", "Richard Bachman")),
    Concept("Elon Musk", "a gardener"),
    Concept("{} {0}", "Neil Armstrong"),
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "people.txt",
            "# people\n\nStephen King | Stephen Edwin King | Richard Bachman -> Frédéric Chopin\n"
            "\tElon Musk # the default\n{} {0}->Neil Armstrong\n  # end\n",
        ),
        (
            "people.csv",
            "aliases,name,redirect\n Stephen Edwin King|Richard Bachman ,Stephen King,Frédéric Chopin\n\n"
            ',"Elon Musk",\n,,\n,{} {0},Neil Armstrong\n',
        ),
        (
            "people.jsonl",
            '{"name": "Stephen King", "aliases": ["Stephen Edwin King", "Richard Bachman"], '
            '"redirect": "Fr\\u00e9d\\u00e9ric Chopin"}\n\n{"name": "Elon Musk"}\n'
            '{"name": "{} {0}", "redirect": "Neil Armstrong", "aliases": []}',
        ),
    ],
)
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_every_kind_of_file_gives_the_same_concepts(tmp_path, name, content, prefix, line_end):
    path = write(tmp_path, name, prefix + content.encode().replace(b"\n", line_end))
    assert load_concepts(path, default_redirect="a gardener") == SAME


def test_a_hash_inside_a_name_is_no_comment(tmp_path):
    path = write(tmp_path, "a.TXT", "#1 fan\nChanel #5 -> D#\nC# | F# -> Chopin # not Java\nAda -> Bach #")
    assert load_concepts(path) == [
        Concept("Chanel #5", "D#"),
        Concept("C#", "Chopin", ("F#",)),
        Concept("Ada", "Bach"),
    ]


def test_a_file_may_give_the_kind_of_a_concept(tmp_path):
    expected = [
        Concept("Ada", "Bach", (), "person"),
        Concept("Dune", "Emma", ("The Dune",), "thing"),
        Concept("C", "D"),
    ]
    rows = write(tmp_path, "a.csv", "kind,name,redirect,aliases\nperson,Ada,Bach\nthing,Dune,Emma,The Dune\n,C,D,\n")
    assert load_concepts(rows) == expected
    assert [concept.to_json() for concept in expected] == [
        {"name": "Ada", "redirect": "Bach", "aliases": (), "kind": "person"},
        {"name": "Dune", "redirect": "Emma", "aliases": ("The Dune",), "kind": "thing"},
        {"name": "C", "redirect": "D", "aliases": ()},
    ]
    lines = write(tmp_path, "a.jsonl", "".join(f"{json.dumps(concept.to_json())}\n" for concept in expected))
    assert load_concepts(lines) == expected
    with pytest.raises(InputError, match=r"concepts\[0\]: kind must be person or thing, or left out, not 'place'"):
        check_concepts([Concept("Rome", "Oslo", kind="place")])


def test_an_alias_may_differ_from_the_name_in_case_and_width_only(tmp_path):
    path = write(tmp_path, "a.txt", "Ada Byron | ada byron | ADA BYRON | \uff21da  Byron -> X\nstraße | STRASSE -> X")
    names = [concept.names for concept in load_concepts(path)]
    assert names == [("Ada Byron", "ada byron", "ADA BYRON", "\uff21da  Byron"), ("straße", "STRASSE")]
    assert "2 times" in refusal(write(tmp_path, "b.txt", "Ada | ada | Ada -> X"))
    assert f"'ADA' is a duplicate of 'ada' ({tmp_path}/c.txt:1)" in refusal(
        write(tmp_path, "c.txt", "B | ada -> X\nC | ADA -> X")
    )


BAD_FILES = [
    # (file name, content, where & is "redirect": "X", and {line: what its error says})
    ("unknown.jsonl", '{"name": "A", &, "alias": ["B"]}', {1: "unknown field 'alias'"}),
    ("no_name.jsonl", '{&}', {1: "no field 'name'"}),
    ("name_type.jsonl", '{"name": 5, &}\n{"name": null, &}', {1: "not int", 2: "not null"}),
    ("redirect_type.jsonl", '{"name": "A", "redirect": ["X"]}', {1: "redirect must be text, not a list"}),
    ("redirect_null.jsonl", '{"name": "A", "redirect": null}', {1: "redirect must be text, not null"}),
    ("aliases_type.jsonl", '{"name": "A", &, "aliases": "B"}', {1: "'aliases' must be a list"}),
    ("alias_type.jsonl", '{"name": "A", &, "aliases": ["B", true]}', {1: "alias must be text, not bool"}),
    ("empty_name.jsonl", '\n{"name": "", &}\n{"name": " \\t", &}', {2: "empty", 3: "empty"}),
    ("empty_alias.jsonl", '{"name": "A", &, "aliases": [""]}', {1: "alias is empty"}),
    ("empty_redirect.jsonl", '{"name": "A", "redirect": ""}', {1: "redirect is empty"}),
    ("no_redirect.jsonl", '{"name": "A", &}\n{"name": "B"}', {2: "no redirect"}),
    ("duplicate.jsonl", '{"name": "A b", &}\n\n{"name": "a  B", &}', {3: "duplicate.jsonl:1"}),
    ("nfkc.txt", "José -> X\n\uff2a\uff4f\uff53é -> X\nJose\u0301 -> X", {2: "nfkc.txt:1", 3: "nfkc.txt:1"}),
    ("casefold.txt", "Straße -> X\nSTRASSE -> X\nΆς -> X\nΆΣ -> X", {2: "casefold.txt:1", 4: "casefold.txt:3"}),
    ("modifier.txt", "\u1d2cda -> X\nada -> X", {2: "modifier.txt:1"}),
    ("ligature.txt", "Griﬃth -> X\nGRIFFITH -> X", {2: "duplicate of 'Griﬃth' (ligature.txt:1)"}),
    ("nbsp.txt", "Elon Musk -> X\nElon\u00a0 Musk -> X", {2: "nbsp.txt:1"}),
    ("alias_is_name.txt", "A | B -> X\nb -> X\nC | B -> X", {2: "alias_is_name.txt:1", 3: "alias_is_name.txt:1"}),
    ("alias_twice.txt", "A | B | B -> X", {1: "2 times"}),
    ("kind.csv", "name,redirect,kind\nA,X,person\nB,X,Thing\nC,X,", {3: "person or thing, or left out, not 'Thing'"}),
    ("kind_type.jsonl", '{"name": "A", &, "kind": 1}', {1: "kind must be person or thing, or left out, not int"}),
    ("itself.txt", "A -> a\nB | Bee -> BEE", {1: "the concept itself", 2: "the concept itself"}),
    ("chain.txt", "A -> b\nB -> X\nC -> A", {1: "itself a target (chain.txt:2)", 3: "itself a target (chain.txt:1)"}),
    ("chain_alias.txt", "A | Bee -> X\nC -> bee", {2: "itself a target (chain_alias.txt:1)"}),
    ("control.jsonl", '{"name": "A\\u0000", &}\n{"name": "B\\u001bc", &}', {1: "U+0000", 2: "U+001B"}),
    ("newline.jsonl", '{"name": "A\\nB", "redirect": "X\\n"}', {1: "U+000A"}),
    ("del.txt", "A\x7f -> X\nB\x85C -> X\nD\rE -> X", {1: "U+007F", 2: "U+0085", 3: "U+000D"}),
    ("bidi.txt", "A\u202eb -> X\nC -> \u2066X", {1: "U+202E RIGHT-TO-LEFT OVERRIDE", 2: "U+2066"}),
    ("zero_width.txt", "A\u200bb | c\u00add -> X\nE\ufeff -> X", {1: "U+200B", 2: "U+FEFF"}),
    ("filler.txt", "A\u3164b -> X\nC\ufe0f -> X\nD\u2028E -> X", {1: "U+3164", 2: "U+FE0F", 3: "U+2028"}),
    ("surrogate.jsonl", '{"name": "A\\ud800", &}', {1: "U+D800, half of a surrogate pair"}),
    ("edges.jsonl", '{"name": " A", &}\n{"name": "B", "redirect": "X\\u00a0"}', {1: "white space", 2: "white space"}),
    ("long.txt", f"{'a' * 200} -> X\n{'b' * 201} -> X", {2: "201 characters"}),
    ("utf8.txt", b"A -> X\n\nB\xe9 -> X\nC -> Fr\xc3", {3: "byte 0xe9 at offset 9", 4: "byte 0xc3 at offset 23"}),
    ("bom_utf8.jsonl", b'\xef\xbb\xbf\n{"name": "\xff"}', {2: "byte 0xff at offset 14"}),
    ("utf16.txt", "Ada -> Chopin".encode("utf-16"), {1: "byte 0xff at offset 0"}),
    ("json.jsonl", '{"name": "A", &\n{"name": "B", &}\n{', {1: "character", 3: "not valid JSON"}),
    ("array.jsonl", '["A"]\n"B"\n3\nnull', dict.fromkeys((1, 2, 3, 4), "must hold an object")),
    ("keys.jsonl", '{"name": "A", &, "name": "B"}', {1: "'name' occurs twice"}),
    ("deep.jsonl", '{"name": "A", &}\n' + "[" * 100_000, {2: "nested"}),
    ("deep_name.jsonl", '{"name": ' + "[" * 500 + "]" * 500 + ', &}', {1: "name must be text, not a list"}),
    ("digits.jsonl", '{"name": ' + "9" * 10_000 + "}", {1: ""}),
    ("nan.jsonl", '{"name": NaN, "redirect": Infinity}', {1: "name must be text, not float"}),
    ("arrows.txt", "A -> B -> C", {1: "more than one '->'"}),
    ("other_arrows.txt", "A => X\nB --> X\nC \u2192 X\nD \u21d2 X\nE => F -> X\n# G => H",
     {1: "'=>' in place of '->'; write: name", 2: "'-->' in place", 3: "'\u2192' in place", 4: "'\u21d2' in place"}),
    ("bar.txt", "A -> B | C", {1: "'|' after '->'"}),
    ("gaps.txt", "-> X\n| B -> X\nA || B -> X\nC ->", {1: "name is empty", 2: "name", 3: "alias", 4: "redirect"}),
    ("header.csv", "name;redirect\nA;X", {1: "unknown column 'name;redirect'"}),
    ("no_header.csv", "Stephen King,Frédéric Chopin", {1: "no column 'name'"}),
    ("columns.csv", "name,name,born\nA,B,1", {1: "unknown column 'born'"}),
    ("cells.csv", "name,redirect\nKing, Stephen,Chopin\nA,X", {2: "3 cells where the header has 2"}),
    ("missing.csv", "name,redirect\nA\n,X\nB,X", {2: "no redirect", 3: "name is empty"}),
    ("quotes.csv", 'name,redirect\n"A"b,X\nC,X\nC,X\n"D,X', {2: "not valid", 4: "quotes.csv:3", 5: "not valid"}),
    ("lines.csv", 'name,redirect\nA,X\n"B\nC",X\na,X', {3: "U+000A", 5: "lines.csv:2"}),
    ("field.csv", f"name,redirect\nA,X\n{'a' * 200_000},X\nA,X", {3: "field limit", 4: "field.csv:2"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_a_bad_file_names_every_bad_line(tmp_path, monkeypatch, name, content, expected):
    write(tmp_path, name, content if isinstance(content, bytes) else content.replace("&", '"redirect": "X"'))
    monkeypatch.chdir(tmp_path)
    found = {}
    for line in refusal(name).split("\n"):
        place, sentence = line.split(": ", 1)
        file, number = place.rsplit(":", 1)
        assert file == name
        found[int(number)] = f"{found.get(int(number), '')} {sentence}"
    assert found.keys() == expected.keys()
    assert list(found) == sorted(found)
    for number, part in expected.items():
        assert part in found[number]


def test_one_line_reports_all_that_is_wrong_with_it(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"name": 1, "redirect": "", "aliases": ["\\u200b"], "born": 1947}')
    message = refusal(path)
    for part in ("name must", "redirect is empty", "U+200B", "unknown field 'born'"):
        assert part in message


def test_fifty_errors_are_shown_and_the_rest_counted(tmp_path):
    lines = refusal(write(tmp_path, "a.txt", "\n".join(f"name {i}" for i in range(1234)))).split("\n")
    assert len(lines) == 51
    assert lines[49].startswith(f"{tmp_path}/a.txt:50: ")
    assert lines[50] == "and 1,184 more"
    exactly_fifty = refusal(write(tmp_path, "a.txt", "\n".join(f"name {i}" for i in range(50))))
    assert "more" not in exactly_fifty


def test_a_message_shows_nothing_invisible_and_stays_short(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"name": "\x1b[2J\u202e" + "a" * 10_000, "redirect": "X"}))
    message = refusal(path)
    assert message.removeprefix(str(tmp_path)).isprintable()
    assert len(message) < 250 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing.jsonl", "does not exist"),
        ("folder.jsonl", "is a folder"),
        ("people.json", "must end in .txt, .csv, .jsonl"),
        ("people", "must end in"),
        ("file.txt/people.txt", "does not exist"),
        ("zero\0.txt", ""),
        ("pipe.txt", "not a regular file"),
        ("empty.txt", "contains no concepts"),
        ("empty.csv", "no column 'name'"),
        ("header.csv", "contains no concepts"),
        ("comments.txt", "contains no concepts"),
    ],
)
def test_a_file_that_cannot_be_used_as_a_whole(tmp_path, name, part):
    for other in ("people", "people.json", "file.txt", "empty.txt", "empty.csv"):
        write(tmp_path, other, "")
    write(tmp_path, "header.csv", "name,redirect\n\n")
    write(tmp_path, "comments.txt", "# a\n\n#b")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    message = refusal(tmp_path / name)
    assert part in message
    assert name.replace("\0", "") in message.replace("\0", "")


def test_a_file_over_the_limit_is_refused_without_being_parsed(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert "larger than 64 MiB" in refusal(path)


@pytest.mark.parametrize(("redirect", "part"), [("", "empty"), ("a\u200b", "U+200B"), ("a" * 201, "201")])
def test_a_bad_default_redirect_is_refused(tmp_path, redirect, part):
    message = refusal(write(tmp_path, "a.txt", "A -> X"), default_redirect=redirect)
    assert message.startswith("The default redirect")
    assert part in message


def test_a_default_redirect_that_is_a_target_is_refused_where_it_is_used(tmp_path):
    path = write(tmp_path, "a.txt", "A -> X\nB\nC -> Y")
    assert refusal(path, default_redirect="c").removeprefix(f"{path}:") == (
        f"2: the redirect 'c' is itself a target ({path}:3)"
    )
    assert load_concepts(path, default_redirect="D")[1] == Concept("B", "D")


def test_concepts_built_in_python_keep_the_same_rules():
    check_concepts(SAME)
    bad = [
        Concept("A", "X"),
        Concept("a", "X", ("B\u200b",)),
        Concept("C", None, "Cee"),
        "D",
        Concept("E", "A"),
    ]
    with pytest.raises(InputError) as caught:
        check_concepts(bad)
    assert str(caught.value).split("\n") == [
        "concepts[1]: alias 'B\\u200b' contains U+200B ZERO WIDTH SPACE, an invisible character, as character 2",
        "concepts[1]: 'a' is a duplicate of 'A' (concepts[0])",
        "concepts[2]: redirect must be text, not null",
        "concepts[2]: field 'aliases' must be a list of texts, not text",
        "concepts[3]: must be a Concept, not text",
        "concepts[4]: the redirect 'A' is itself a target (concepts[0])",
    ]
    with pytest.raises(InputError, match="empty"):
        check_concepts([])


def test_ten_thousand_lines_take_seconds_at_most(tmp_path):
    lines = [f"Person Number {i} | P. N. {i} | Pérson {i} -> Redirect {i % 7}" for i in range(10_000)]
    path = write(tmp_path, "a.txt", "\n".join(lines))
    many_aliases = write(tmp_path, "b.txt", " | ".join(f"name {i}" for i in range(50_000)) + " -> X")
    started = time.process_time()
    assert len(load_concepts(path)) == 10_000
    assert len(load_concepts(many_aliases)[0].aliases) == 49_999
    assert time.process_time() - started < 20  # measured: 0.35 s; quadratic work would take minutes
