import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rocr.errors import InputError
from rocr.io.tensors import read_header, read_tensors, write_tensors

HEADER = {"format": "rocr test 1", "names": ["José", "東京", "{}"], "numbers": [1, 2.5]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def tensors():
    return {
        "float32": torch.randn(3, 5),
        "bfloat16": torch.randn(4, 4).bfloat16(),
        "integers": torch.arange(7, dtype=torch.int16),
        "transposed": torch.randn(6, 2).T,
        "empty": torch.zeros(0, 3),
    }


def test_what_is_written_is_read(path, tensors):
    write_tensors(path, HEADER, tensors)
    header, found = read_tensors(path, "rocr test 1")
    assert header == HEADER == read_header(path)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_same_contents_give_the_same_bytes(tmp_path, tensors):
    for name in ("first", "second"):
        write_tensors(tmp_path / name, HEADER, tensors)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_file_is_replaced_only_where_that_was_said(path, tensors):
    write_tensors(path, HEADER, {"first": tensors["float32"]})
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        write_tensors(path, HEADER, tensors)
    assert path.read_bytes() == before
    write_tensors(path, HEADER, tensors, overwrite=True)
    assert "bfloat16" in read_tensors(path, "rocr test 1")[1]
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_file_of_another_kind(path, tensors):
    write_tensors(path, HEADER, tensors)
    with pytest.raises(InputError, match="has the format 'rocr test 1', but 'rocr edit 1' is needed"):
        read_tensors(path, "rocr edit 1")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match=f"{path} does not exist or is not a file"):
            read_header(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, -1])
def test_truncated_files(path, tensors, length):
    write_tensors(path, HEADER, tensors)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=f"{path} is not a safetensors file"):
        read_tensors(path, "rocr test 1")


@pytest.mark.parametrize("contents", [b"plain text, no tensors", b"\xff" * 100, b"\0" * 100, b"PK\x03\x04" + b"x" * 99])
def test_files_of_something_else(path, contents):
    path.write_bytes(contents)
    with pytest.raises(InputError, match=f"{path} is not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "header", [None, "[]", "3", "null", '{"format": "other 1"}', '{"format": 3}', "{}", "{broken", "[" * 100_000]
)
def test_headers_that_are_not_rocrs(path, header):
    save_file({"a": torch.zeros(2)}, path, metadata=None if header is None else {"rocr": header})
    with pytest.raises(InputError, match="file of rocr"):
        read_header(path)


def test_a_header_may_hold_anything_that_json_does(path):
    header = {"format": "rocr test 1", "nested": {"value": None, "text": '\u2028 " \\'}, "nan": float("nan")}
    write_tensors(path, header, {"a": torch.zeros(1)})
    assert json.dumps(read_header(path)) == json.dumps(header)


def write_by_hand(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_tensor_of_an_unsupported_dtype_is_refused(path):
    metadata = {"rocr": '{"format": "rocr test 1"}'}
    write_by_hand(path, {"__metadata__": metadata, "a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\0\0")
    assert read_header(path) == {"format": "rocr test 1"}
    with pytest.raises(InputError, match="the tensor 'a' has the dtype 'F4', which rocr does not read"):
        read_tensors(path, "rocr test 1")


@pytest.mark.parametrize("metadata", [[], "text", {"rocr": 3}, {"rocr": None}])
def test_metadata_that_holds_no_texts_is_refused(path, metadata):
    write_by_hand(path, {"__metadata__": metadata}, b"")
    with pytest.raises(InputError, match="__metadata__"):
        read_header(path)


def test_large_tensors_are_mapped_and_the_file_is_not_changed(path):
    values = torch.randn(2**19)
    write_tensors(path, HEADER, {"large": values})
    before = path.read_bytes()
    found = read_tensors(path, "rocr test 1")[1]["large"]
    assert torch.equal(found, values)
    found.zero_()
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted by Linux")
def test_many_small_tensors_keep_no_file_open(path):
    write_tensors(path, HEADER, {str(i): torch.ones(4) for i in range(2000)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = read_tensors(path, "rocr test 1")[1]
    assert len(found) == 2000 and len(list(Path("/proc/self/fd").iterdir())) <= before
