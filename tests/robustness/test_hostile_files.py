"""Files that somebody made to do harm: each gives one of rocr's own errors, quickly, and nothing is written."""

import json
import os
import struct

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
BIDIRECTIONAL, ZERO_WIDTH = "\u202egnik\u202c", "a\u200bb"
DEEP = "[" * 100_000
TERMINAL = "\x1b]0;title\x07\x1b[2J"


def raw(header, data=b""):
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def with_header(kind, **tensors):
    return raw({"__metadata__": {"rocr": json.dumps({"format": f"rocr {kind} 1"})}, **tensors}, b"\0" * 16)


def containers(kind):
    """Damage to a safetensors file of any kind: name -> bytes made from a valid file."""
    name = "second_moment.1" if kind == "statistics" else "layer.1.left"
    return {
        "empty": lambda whole: b"",
        "one byte": lambda whole: whole[:1],
        "seven bytes": lambda whole: whole[:7],
        "only the length": lambda whole: whole[:8],
        "half the header": lambda whole: whole[:200],
        "half": lambda whole: whole[: len(whole) // 2],
        "a byte short": lambda whole: whole[:-1],
        "a byte long": lambda whole: whole + b"\0",
        "ten megabytes long": lambda whole: whole + b"\0" * 10**7,
        "header of 2**63": lambda whole: struct.pack("<Q", 2**63) + whole[8:],
        "header of 2**64 - 1": lambda whole: b"\xff" * 8 + whole[8:],
        "header of 100 MB": lambda whole: struct.pack("<Q", 10**8) + whole[8:],
        "header of 33 MiB": lambda whole: raw(b"{" + b" " * (33 * 2**20) + b"}"),
        "header of 0": lambda whole: struct.pack("<Q", 0) + whole[8:],
        "header too short": lambda whole: struct.pack("<Q", 40) + whole[8:],
        "text": lambda whole: b"no tensors here, only words " * 50,
        "zip": lambda whole: b"PK\x03\x04" + whole,
        "pickle": lambda whole: b"\x80\x04\x95" + whole,
        "zeros": lambda whole: b"\0" * 4096,
        "a list": lambda whole: raw([]),
        "null": lambda whole: raw(b"null"),
        "deep": lambda whole: raw(DEEP.encode()),
        "not UTF-8": lambda whole: raw(b'{"\xff\xfe": 1}'),
        "no metadata": lambda whole: raw({name: entry()}, b"\0" * 16),
        "metadata of numbers": lambda whole: raw({"__metadata__": {"rocr": 3}}),
        "metadata is a list": lambda whole: raw({"__metadata__": []}),
        "deep metadata": lambda whole: raw({"__metadata__": {"rocr": DEEP}}),
        "metadata no JSON": lambda whole: raw({"__metadata__": {"rocr": "{"}}),
        "metadata is text": lambda whole: raw({"__metadata__": {"rocr": '"rocr"'}}),
        "metadata with a field twice": lambda whole: raw(
            {"__metadata__": {"rocr": f'{{"format": "rocr {kind} 1", "format": "rocr {kind} 1"}}'}}
        ),
        "another kind": lambda whole: with_header("nonsense"),
        "another version": lambda whole: raw({"__metadata__": {"rocr": f'{{"format": "rocr {kind} 99"}}'}}),
        "a format to steer the terminal": lambda whole: raw(
            {"__metadata__": {"rocr": json.dumps({"format": f"rocr {TERMINAL}{BIDIRECTIONAL}"})}}
        ),
        "only the format": lambda whole: with_header(kind),
        "overlapping tensors": lambda whole: with_header(kind, **{name: entry(), "b": entry()}),
        "a hole": lambda whole: with_header(kind, **{name: entry(shape=(1, 2), offsets=(8, 16))}),
        "offsets backwards": lambda whole: with_header(kind, **{name: entry(offsets=(16, 0))}),
        "offsets past the end": lambda whole: with_header(kind, **{name: entry(offsets=(0, 2**40))}),
        "negative offsets": lambda whole: with_header(kind, **{name: entry(offsets=(-16, 0))}),
        "a shape that overflows": lambda whole: with_header(kind, **{name: entry(shape=(2**62, 2**62))}),
        "a negative shape": lambda whole: with_header(kind, **{name: entry(shape=(-2, -2))}),
        "a shape that does not fit": lambda whole: with_header(kind, **{name: entry(shape=(3, 3))}),
        "an unknown dtype": lambda whole: with_header(kind, **{name: entry(dtype="F31")}),
        "a name of 10 MB": lambda whole: with_header(kind, **{"x" * 10**7: entry()}),
        "a path as a name": lambda whole: with_header(kind, **{"../../etc/passwd": entry()}),
        "an invisible name": lambda whole: with_header(kind, **{f"{name}{ZERO_WIDTH}{BIDIRECTIONAL}": entry()}),
        "no such shape": lambda whole: with_header(kind, **{name: {"dtype": "F32"}}),
        "a hundred thousand tensors": lambda whole: with_header(
            kind, **{f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(100_000)}, last=entry()
        ),
        "many lists": lambda whole: raw({"__metadata__": {"rocr": "[" + "[]," * 2 * 10**5 + "[]]"}}),
    }


PLACES = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", containers("statistics"))
def test_damaged_statistics(name, files, tmp_path, on_statistics):
    (tmp_path / "bad").write_bytes(containers("statistics")[name](files.statistics.read_bytes()))
    on_statistics(tmp_path / "bad")


@pytest.mark.parametrize("name", containers("edit"))
def test_damaged_edits(name, files, tmp_path, on_edit):
    (tmp_path / "bad").write_bytes(containers("edit")[name](files.edit.read_bytes()))
    on_edit(tmp_path / "bad")


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file(name, tmp_path, on_statistics, on_edit):
    PLACES[name](tmp_path / "bad")
    on_statistics(tmp_path / "bad")
    on_edit(tmp_path / "bad")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "x/" * 3000])
def test_names_that_no_file_can_have(path, on_statistics, on_edit):
    on_statistics(path)
    on_edit(path)
