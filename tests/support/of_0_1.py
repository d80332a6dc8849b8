"""What the tests of rocr 0.1's files, options and names share.

The files lie in data/0.1, whose README.md says how each was made. Nothing of them may be changed to suit a later
version. Only the public surface is used, `rocr` and its command line, so that modules may move.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from rocr.cli import main

DATA = next(path for folder in Path(__file__).parents if (path := folder / "data" / "0.1").is_dir())
EDIT, BFLOAT16 = "output/edit.safetensors", "edit-official-bfloat16.safetensors"
CLOSE = 1e-3
"""Relative: scores and moments are computed from float32 activations, which chips round differently in each of some
hundred sums, to 1e-7 each."""


def read(name):
    """A JSON file of rocr 0.1."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of the files that a test may change, as the current folder."""
    shutil.copytree(DATA, tmp_path / "0.1")
    monkeypatch.chdir(tmp_path / "0.1")
    return tmp_path / "0.1"


def run(*arguments):
    """A command in this process: code, json (its document), errors."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main([*map(str, arguments), "--json"])
        except SystemExit as stop:
            code = stop.code
    found = output.getvalue()
    return SimpleNamespace(code=code, json=json.loads(found) if found else None, errors=errors.getvalue())


def done(*arguments):
    """The document of a command that ends well."""
    found = run(*arguments)
    assert found.code == 0, found.errors
    return found.json


def load(name="model", dtype=torch.float32):
    return transformers.LlamaForCausalLM.from_pretrained(DATA / name, dtype=dtype)


def assert_alike(found, expected, place=""):
    """JSON values: every field of then is there, with its value; numbers are about the same."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), place
        for name in expected.keys() - {"seconds", "peak_bytes"}:
            assert_alike(found[name], expected[name], f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_alike(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=CLOSE, abs=CLOSE), place
    else:
        assert found == expected, place
