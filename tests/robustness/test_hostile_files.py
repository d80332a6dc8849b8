"""Damaged statistics and edit files: each gives one of rocr's own errors, soon, and nothing is written."""

import json
import struct

import pytest

from tests.support.hostile import BIDIRECTIONAL, DEEP, PLACES, TERMINAL, ZERO_WIDTH
from tests.support.hostile import safetensors_bytes as raw

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def with_metadata(text, **tensors):
    return raw({"__metadata__": {"rocr": text}, **tensors}, b"\0" * (16 if tensors else 0))


def with_header(kind, **tensors):
    return with_metadata(json.dumps({"format": f"rocr {kind} 1"}), **tensors)


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
        "metadata of numbers": lambda whole: with_metadata(3),
        "metadata is a list": lambda whole: raw({"__metadata__": []}),
        "deep metadata": lambda whole: with_metadata(DEEP),
        "metadata no JSON": lambda whole: with_metadata("{"),
        "metadata is text": lambda whole: with_metadata('"rocr"'),
        "metadata with a field twice": lambda whole: with_metadata(
            f'{{"format": "rocr {kind} 1", "format": "rocr {kind} 1"}}'
        ),
        "another kind": lambda whole: with_header("nonsense"),
        "another version": lambda whole: with_metadata(f'{{"format": "rocr {kind} 99"}}'),
        "a format to steer the terminal": lambda whole: with_metadata(
            json.dumps({"format": f"rocr {TERMINAL}{BIDIRECTIONAL}"})
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
        "many lists": lambda whole: with_metadata("[" + "[]," * 2 * 10**5 + "[]]"),
    }


@pytest.mark.parametrize("name", containers("statistics"))
def test_damaged_statistics(name, files, tmp_path, on_statistics):
    (tmp_path / "bad").write_bytes(containers("statistics")[name](files.statistics.read_bytes()))
    on_statistics(tmp_path / "bad")


# The header is read as that of statistics is: what takes seconds is tried by default on those alone.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "a hundred thousand tensors" else ())
        for name in containers("edit")
    ],
)
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
