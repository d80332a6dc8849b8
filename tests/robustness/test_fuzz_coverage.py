"""Coverage-guided fuzzing of the readers, if atheris is installed; test_hostile_fuzz.py does not need it."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rocr.model.check_folder import INDEX_FILE

pytestmark = pytest.mark.thorough

pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 only")
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("fuzz_readers.py")
RUNS = {"concepts": 2000, "probes": 2000, "statistics": 300, "edit": 300, "config": 500, "model": 500}


def seeds(files):
    index = {"weight_map": dict.fromkeys(header(files.model / "model.safetensors"), "model.safetensors")}
    return {
        "concepts.txt": [b"Ada | Countess -> Pascal # a\n"],
        "concepts.csv": [b'name,redirect,aliases\n"Ada",Pascal,A|B\n'],
        "concepts.jsonl": [b'{"name": "Ada", "redirect": "Pascal", "aliases": ["A"]}\n'],
        "probes.jsonl": [b'{"subject": "A", "query": "B?", "answer": "C", "distractors": ["D"], "form": "qa"}\n'],
        "statistics": [b"", files.statistics.read_bytes()],
        "edit": [b"", files.edit.read_bytes()],
        "config.json": [(files.model / "config.json").read_bytes()],
        INDEX_FILE: [json.dumps(index).encode()],
    }


def header(path):
    data = path.read_bytes()
    return [name for name in json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) if name != "__metadata__"]


def start(name, contents, files, base, runs):
    """A process that fuzzes one reader."""
    (base / "seeds").mkdir(parents=True)
    for number, content in enumerate(contents):
        (base / "seeds" / str(number)).write_bytes(content)
    shutil.copytree(files.model, base / "folder")
    script = [sys.executable, str(SCRIPT), name, str(base / "seeds"), str(base / "folder"), str(runs)]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(script, stderr=subprocess.PIPE, text=True, cwd=base, env=environment)


@pytest.mark.parametrize("name", ["concepts.jsonl", pytest.param(INDEX_FILE, marks=pytest.mark.slow)])
def test_readers_withstand_fuzzing(name, files, tmp_path, tally):
    fuzz([name], files, tmp_path, tally, factor=1)


@pytest.mark.slow
def test_every_reader_withstands_long_fuzzing(files, tmp_path, tally):
    fuzz(list(seeds(files)), files, tmp_path, tally, factor=20)


def fuzz(names, files, base, tally, factor):
    for name in names:
        runs = RUNS[re.split(r"\W", name)[0]] * factor
        child = start(name, seeds(files)[name], files, base / name, runs)
        _, errors = child.communicate(timeout=3000)
        assert child.returncode == 0, errors[-4000:]
        done = re.search(r"Done (\d+)", errors) or re.search(r"stat::number_of_executed_units: *(\d+)", errors)
        assert done and int(done[1]) >= runs, errors[-2000:]
        tally("fuzz executions guided by coverage", int(done[1]))
