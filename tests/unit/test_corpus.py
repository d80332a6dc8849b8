import json
import sys

import pytest

from rocr.errors import InputError
from rocr.statistics.corpus import check_texts, read_texts, text_digest

PARAGRAPHS = [" = Valkyria = ", "First line,\nsecond line.", "Third — naïve."]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_paragraphs_of_a_text_file_are_documents(tmp_path, line_end, prefix):
    path = tmp_path / "a.txt"
    path.write_bytes(prefix + ("\n \n\n".join(PARAGRAPHS) + "\n").encode().replace(b"\n", line_end))
    assert list(read_texts([path])) == PARAGRAPHS


def test_files_of_all_kinds_follow_each_other(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("one\n\ntwo")
    rows = [{"text": "three"}, {"text": " "}, {"id": 5, "text": "fo\u2028ur"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    many = [f"row {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"id": range(3000), "text": many}), tmp_path / "c.parquet", row_group_size=700)
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")]
    check_texts(paths)
    assert list(read_texts(map(str, paths))) == ["one", "two", "three", "fo\u2028ur", *many]


def test_a_text_without_line_ends_comes_in_parts(tmp_path):
    path = tmp_path / "a.txt"
    text = "né€𝄞 " * 400_000  # a character of every length in UTF-8, so that parts end inside one
    path.write_text(text)
    parts = list(read_texts([path]))
    assert "".join(parts) == text
    assert max(map(len, parts)) < 2 * 2**20
    path.write_text("word " * 20 + "\n")
    path.write_text(path.read_text() * 50_000)
    assert max(map(len, read_texts([path]))) < 2**20 + 200


BAD_TEXTS = [
    ("bad.txt", b"fine\n\nfr\xe9d\n", ":3: is not UTF-8: byte 0xe9 at offset 8"),
    ("cut.txt", b"\xef\xbb\xbffine\ncut \xe2\x82", ":2: is not UTF-8: byte 0xe2 at offset 12"),
    ("far.txt", b"a" * (2**20 - 1) + b"\xc3\xc3", ":1: is not UTF-8: byte 0xc3 at offset 1,048,575"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ":2: is not UTF-8: byte 0xff at offset 24"),
    ("missing.jsonl", b'{"text": "a"}\n{"txt": "b"}', ":2: must be an object with a field 'text'"),
    ("type.jsonl", b'{"text": 5}', ":1: must be an object"),
    ("null.jsonl", b'{"text": "a"}\n\n{"text": null}', ":3: must be an object"),
    ("list.jsonl", b'["text"]', ":1: must be an object"),
    ("syntax.jsonl", b'{"text": "a"', ":1: is not valid JSON: Expecting ',' delimiter at character 13"),
    ("deep.jsonl", b"[" * 100_000, ":1: is nested too deeply"),
    ("digits.jsonl", b'{"text": ' + b"9" * 10_000 + b"}", ":1: must be an object"),
    ("surrogate.jsonl", b'{"text": "\\udc80"}', ":1: field 'text' holds half of a surrogate pair"),
    ("long.jsonl", b'{"text": "' + b"a" * 2**26 + b'"}', ":1: is longer than 64 MiB"),
    ("a.md", b"text", " is not a text file for rocr: its name must end in .txt, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_TEXTS, ids=[name for name, _, _ in BAD_TEXTS])
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_texts([path]))
    assert str(caught.value).startswith(f"{path}{expected}")


def test_the_check_reports_every_file_at_once(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "field.jsonl").write_text('{"body": "text"}')
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "kind.pdf").write_text("text")
    names = ["good.txt", "missing.txt", "empty.txt", "field.jsonl", "folder.txt", "kind.pdf"]
    with pytest.raises(InputError) as caught:
        check_texts([tmp_path / name for name in names])
    lines = str(caught.value).split("\n")
    for line, name, part in zip(
        lines,
        names[1:],
        ["does not exist", "holds no text", "field 'text'", "is a folder", "must end in"],
        strict=True,
    ):
        assert line.startswith(f"{tmp_path / name}")
        assert part in line
    check_texts([tmp_path / "good.txt"])
    with pytest.raises(InputError, match="No text files"):
        check_texts([])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'rocr\[parquet\]'"):
        check_texts([tmp_path / "a.parquet"])


def test_bad_parquet_files_are_input_errors(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing of the kind PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(InputError, match="no column 'text', but body, id"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2 of the column 'text' holds NoneType"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"text": [1.5]}), path)
    with pytest.raises(InputError, match="row 1 of the column 'text' holds float"):
        list(read_texts([path]))
    parquet.write_table(pyarrow.table({"text": [f"row {i} " * 9 for i in range(5000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + bytes(2000) + content[len(content) // 3 + 2000 :])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_texts([path]))


def test_the_digest_depends_on_bytes_order_and_split(tmp_path):
    def digest(*contents):
        paths = [tmp_path / f"{index}.txt" for index in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return text_digest(paths)

    digests = [
        digest(b"ab", b"c"),
        digest(b"a", b"bc"),
        digest(b"c", b"ab"),
        digest(b"abc"),
        digest(b"abc", b""),
        digest(b"ab\x02" + bytes(7) + b"c"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(b"ab", b"c") == digests[0]
    assert len(digests[0]) == 64
    with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
        text_digest([tmp_path / "gone.txt"])
