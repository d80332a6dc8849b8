"""What `rocr doctor` says of rocr itself: which one runs, and why its compiled kernels are not there."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rocr
from rocr.cli.installation import kernels_flaw

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
# Of an editable installation, which would lend its compiled part to any source tree.
sys.meta_path = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
from rocr.cli import main
sys.exit(main(sys.argv[1:]))
"""
MODULE = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the sources in which nothing was built."""
    tree = tmp_path / "sources"
    shutil.copytree(ROOT / "rocr", tree / "rocr", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (tree / "csrc").mkdir()
    shutil.copy(ROOT / "setup.py", tree)
    return tree


@pytest.fixture
def installed(tmp_path):
    """A folder with an installed rocr whose compiled part is there."""
    site = tmp_path / "site-packages"
    (site / "rocr").mkdir(parents=True)
    (site / "rocr" / MODULE).touch()
    (site / "rocr" / "__init__.py").touch()
    (site / "rocr-0.1.0.dist-info").mkdir()
    (site / "rocr-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rocr\nVersion: 0.1.0\n")
    return site


def doctor(folder, *path):
    """`rocr doctor` in a process of its own, started inside a folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "120"}
    command = [sys.executable, "-c", START, "doctor", "--json"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), " ".join(done.stderr.split())


def test_a_source_tree_that_hides_an_installed_rocr_says_so(source_tree, installed):
    found, shown = doctor(source_tree, installed)
    assert found["rocr"]["folder"] == str(source_tree / "rocr")
    assert found["rocr"]["version"] == rocr.__version__
    assert found["rocr"]["source_tree"] is True
    assert found["rocr"]["hides"] == str(installed / "rocr")
    assert "cpp" not in found["backends"]["cpu"]
    assert f"It was not built here. The rocr in {installed / 'rocr'} has it" in shown
    assert f"Another rocr is installed in {installed / 'rocr'}" in shown
    assert "no C++ compiler" not in shown


def test_a_module_that_cannot_be_loaded_shows_what_the_import_said(source_tree):
    (source_tree / "rocr" / MODULE).write_bytes(b"no library")
    found, _ = doctor(source_tree)
    assert "cannot be loaded" in found["rocr"]["kernels_flaw"]
    assert MODULE in found["rocr"]["kernels_flaw"]


def test_what_was_not_built_depends_on_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    sentence = kernels_flaw("No module named 'rocr._C'", tmp_path, False, None)
    assert sentence.startswith("It was not built when rocr was installed, and no C++ compiler is found")
    (tmp_path / "c++").touch(mode=0o755)
    sentence = kernels_flaw("No module named 'rocr._C'", tmp_path, True, None)
    assert sentence.startswith(f"It was not built in this source tree. There is a C++ compiler ({tmp_path / 'c++'})")


def test_a_module_of_another_python_is_named(tmp_path):
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    sentence = kernels_flaw("No module named 'rocr._C'", tmp_path, False, None)
    assert "built for another Python: _C.cpython-399-x86_64-linux-gnu.so" in sentence
    assert MODULE in sentence
