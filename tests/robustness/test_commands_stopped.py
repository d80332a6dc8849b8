"""Every command stopped by signals and by failing disks: no input is lost and no incomplete output is left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.models import write_gguf
from tests.support.promises import run_command

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("stopped_runs.py")
COMMANDS = {
    "stats": lambda files: ("stats", files.model, "--text", files.text, "--layers", "1,2", "--batch-tokens", "1024"),
    "unlearn": lambda files: ("unlearn", files.model, "--statistics", files.statistics),
    "apply": lambda files: ("apply", files.model, files.edit),
    "revert": lambda files: ("revert", files.edited),
}
GGUF = {"gguf": lambda files: ("apply", files.gguf, files.gguf_edit, "--save", "gguf,gguf-lora,edit")}
LISTS = {
    "add": lambda files: (
        *("add", files.edited, "--concept", "Grace Hopper", "--redirect", "Blaise Pascal"),
        *("--statistics", files.statistics, "--no-answers", "--force"),
    ),
    "merge": lambda files: ("merge", files.edited, files.other),
}
"""Commands that restore the first model beside their output."""
CODES = {
    "kill": (-9,),
    "terminate": (130,),
    "interrupt": (130,),
    "full": (1, 2),
    "broken": (1, 2),
    "forbidden": (1, 2),
    "read-only": (1, 2),
}
STRIDES = {"kill": 59, "full": 97, "broken": 113, "terminate": 109, "interrupt": 127}
TIMES = {"kill": 2, "terminate": 1, "interrupt": 1}
DISKS = {
    "stats": ("size=4k", "size=24k", "nr_inodes=3"),
    "unlearn": ("size=24k", "size=64m,nr_inodes=5", "size=64m,nr_inodes=9"),
    "apply": ("size=64m,nr_inodes=7",),
    "revert": ("size=64k", "size=64m,nr_inodes=7"),
}
LEFT = re.compile(r"out(\.checkpoint)?\.partial-[0-9a-f]{8}|out\.lock(-[0-9a-f]{8})?|out\.checkpoint|out")
SIGNALS = ("kill", "terminate", "interrupt")


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """faults.c compiled as a library for LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("faults of the file system need Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = SCRIPT.with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def stopped(files, concept, tmp_path_factory, shim):
    """stopped({name: (command, way, options)}): what every run of every job left; the inputs are as they were."""

    def bytes_of(files):
        folders = {path.parent for path in (files.model, getattr(files, "gguf", files.model))}
        return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}

    def run(jobs, prefix=(), files=files):
        inputs = bytes_of(files)
        base = tmp_path_factory.mktemp("stopped")
        described = []
        for name, (command, way, options) in jobs.items():
            arguments = [
                *(COMMANDS | GGUF | LISTS)[command](files),
                *(concept if command == "unlearn" else ()),
                "--out",
                "ROOT/out",
            ]
            described.append((str(base / name), list(map(str, arguments)), way, options))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(shim)}
        environment["PYTHONPATH"] = str(ROOT)
        script = [*prefix, sys.executable, str(SCRIPT), json.dumps(described)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=3000, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        assert bytes_of(files) == inputs
        return dict(zip(jobs, json.loads(done.stdout), strict=True))

    return run


def check_runs(runs, codes, cleans):
    """A sentence and the right exit code, nothing half-made nor left over, and the same bytes in the end."""
    whole, *runs = runs
    assert whole["code"] == 0, whole["log"]
    expected = whole["out"]
    assert expected
    for number, run in enumerate(runs):
        assert run["code"] in (*codes, 0), (number, run)
        assert "Traceback" not in run["log"], (number, run["log"])
        assert all(LEFT.fullmatch(left) for left in run["left"]), (number, run["left"])
        if cleans:  # what a killed process leaves bears a name of its own; nothing else leaves anything
            # but a lock that the disk refuses to remove: its process has ended, and the next run takes it over.
            assert set(run["left"]) <= {"out", "out.checkpoint", "out.lock"}, (number, run["left"])
        assert run["out"] in (None, expected), (number, run)
        assert run.get("again", 0) == 0, (number, run.get("log again"))
        assert run.get("out again", expected) == expected, (number, run)
    return len(runs)


NAMESPACE = ("unshare", "--mount", "--propagation", "private")


def can_mount(prefix):
    command = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def gguf_files(files, concept, make_model, tokenizer, tmp_path_factory):
    """files with a GGUF file and an edit of it."""
    base = tmp_path_factory.mktemp("gguf")
    model = write_gguf(make_model("Llama", intermediate_size=64), tokenizer, base / "m.gguf")
    save = ("--save", "gguf,edit", "--out", base / "edited")
    done = run_command("unlearn", model, *concept, "--text", files.text, *save)
    assert done.code == 0, done.errors
    return SimpleNamespace(**vars(files), gguf=model, gguf_edit=base / "edited" / "edit.safetensors")


@pytest.fixture(scope="module")
def in_some_ways(stopped, files, gguf_files):
    """What commands left that were stopped at some steps and times, and on real small disks where these are allowed."""
    prefix = next((p for p in (NAMESPACE, (*NAMESPACE, "--map-root-user")) if can_mount(p)), None)
    jobs = {}
    for command in COMMANDS:
        for mode, stride in STRIDES.items():
            again = 1 if mode in SIGNALS else 2
            options = {"mode": mode, "first": stride // 2, "stride": stride, "again_every": again}
            jobs[f"{command}-{mode}"] = (command, "at_steps", options)
        for mode, times in TIMES.items():
            jobs[f"{command}-{mode}-by-time"] = (command, "by_time", {"mode": mode, "times": times})
        jobs[f"{command}-small-files"] = (command, "small_files", {"sizes": [100, 10_000]})
        jobs[f"{command}-two"] = (command, "two_at_once", {"times": 1})
        if prefix is not None:
            jobs[f"{command}-disks"] = (command, "small_disks", {"options": DISKS[command]})
            jobs[f"{command}-read-only-folder"] = (command, "read_only", {})
            jobs[f"{command}-read-only-input"] = (command, "read_only_input", {"folder": str(files.model.parent)})
    for mode, (first, stride) in {"kill": (5, 23), "full": (9, 47), "interrupt": (7, 61)}.items():
        options = {"mode": mode, "first": first, "stride": stride, "again_every": 2}
        jobs[f"gguf-{mode}"] = ("gguf", "at_steps", options)
    return stopped(jobs, prefix or (), gguf_files)


@pytest.mark.parametrize("mode", STRIDES)
@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_at_some_steps(command, mode, in_some_ways, tally):
    count = check_runs(in_some_ways[f"{command}-{mode}"], CODES[mode], cleans=mode != "kill")
    assert count >= 1
    attack = "kills and signals at writes" if mode in SIGNALS else "faults of the disk at writes"
    tally(f"{attack} survived by commands", count)


@pytest.mark.parametrize("mode", TIMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_at_any_time(command, mode, in_some_ways, tally):
    count = check_runs(in_some_ways[f"{command}-{mode}-by-time"], CODES[mode], cleans=mode != "kill")
    tally("kills and signals by time survived by commands", count)


def test_interrupted_statistics_go_on_from_their_checkpoint(in_some_ways):
    for mode in ("kill", "terminate"):  # the bytes are compared by the tests above
        again = [run["log again"] for run in in_some_ways[f"stats-{mode}"] if "log again" in run]
        assert any("Continuing from" in log for log in again)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_the_system_does_not_let_grow(command, in_some_ways, tally):
    count = check_runs(in_some_ways[f"{command}-small-files"], (1,), cleans=True)
    assert [run["code"] for run in in_some_ways[f"{command}-small-files"]] == [0, 1, 1]
    tally("faults of the disk by the system survived by commands", count)


@pytest.mark.parametrize("command", COMMANDS)
def test_of_two_runs_on_one_output_one_is_refused(command, in_some_ways):
    runs = in_some_ways[f"{command}-two"]
    check_runs(runs, (2,), cleans=True)
    assert all(run["code"] == 2 and run["left"] == ["out"] for run in runs[1:])


@pytest.fixture
def on_real_disks(in_some_ways):
    if "stats-disks" not in in_some_ways:
        pytest.skip("mounting a small disk is not allowed here")
    return in_some_ways


@pytest.mark.parametrize("command", COMMANDS)
def test_disks_that_are_really_full(command, on_real_disks, tally):
    runs = on_real_disks[f"{command}-disks"]
    count = check_runs(runs, (1, 2), cleans=True)
    assert all(run["code"] in (1, 2) for run in runs[1:])
    tally("full disks survived by commands", count)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_to(command, on_real_disks, tally):
    runs = on_real_disks[f"{command}-read-only-folder"]
    check_runs(runs, (2,), cleans=True)
    assert runs[1]["code"] == 2
    assert runs[1]["left"] == []
    tally("read-only folders survived by commands")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_that_cannot_be_written_to_is_no_hindrance(command, on_real_disks):
    check_runs(on_real_disks[f"{command}-read-only-input"], (), cleans=True)


def check_gguf_outputs(found, tally):
    for mode, runs in found.items():
        count = check_runs(runs, CODES[mode], cleans=mode != "kill")
        assert count >= 1
        tally("kills, signals and faults of the disk survived by GGUF outputs", count)


def test_a_gguf_output_that_is_stopped_leaves_nothing_half_written(in_some_ways, tally):
    check_gguf_outputs({mode: in_some_ways[f"gguf-{mode}"] for mode in ("kill", "full", "interrupt")}, tally)


@pytest.mark.slow
def test_a_gguf_output_stopped_at_every_step(stopped, gguf_files, tally):
    jobs = {
        mode: ("gguf", "at_steps", {"mode": mode, "first": first, "stride": stride, "again_every": 3})
        for mode, (first, stride) in EVERY_STEP.items()
    }
    check_gguf_outputs(stopped(jobs, files=gguf_files), tally)


@pytest.fixture(scope="module")
def list_files(files, concept, tmp_path_factory):
    """files with the output of another edit."""
    other = tmp_path_factory.mktemp("lists") / "other"
    done = run_command(
        *("unlearn", files.model, "--concept", "Grace Hopper", *concept[2:]),
        *("--statistics", files.statistics, "--out", other),
    )
    assert done.code == 0, done.errors
    return SimpleNamespace(**vars(files), other=other)


@pytest.mark.slow
@pytest.mark.parametrize("command", LISTS)
def test_a_changed_list_stopped_at_many_steps(command, stopped, list_files, tally):
    jobs = {
        mode: (command, "at_steps", {"mode": mode, "first": first, "stride": 5 * stride, "again_every": 3})
        for mode, (first, stride) in EVERY_STEP.items()
    }
    jobs |= {f"{mode}-by-time": (command, "by_time", {"mode": mode, "times": 4}) for mode in SIGNALS}
    for name, runs in stopped(jobs, files=list_files).items():
        mode = name.removesuffix("-by-time")
        tally("changed lists that were stopped", check_runs(runs, CODES[mode], cleans=mode != "kill"))


EVERY_STEP = {
    "kill": (0, 1),
    "full": (0, 3),
    "terminate": (1, 3),
    "interrupt": (2, 3),
    "broken": (0, 3),
    "forbidden": (1, 3),
    "read-only": (2, 3),
}
"""The first step, and every how-many-th after it: each step is met by a kill and an error, most by a signal."""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_at_every_step(command, stopped, tally):
    jobs = {
        mode: (command, "at_steps", {"mode": mode, "first": first, "stride": stride, "again_every": 3})
        for mode, (first, stride) in EVERY_STEP.items()
    }
    jobs |= {f"{mode}-by-time": (command, "by_time", {"mode": mode, "times": 8}) for mode in SIGNALS}
    for name, runs in stopped(jobs).items():
        mode = name.removesuffix("-by-time")
        count = check_runs(runs, CODES[mode], cleans=mode != "kill")
        tally("kills, signals and faults at every step and by time survived by commands", count)


@pytest.fixture(scope="module")
def start(files, concept):
    """start(command, out): the command in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(command, out):
        arguments = [*COMMANDS[command](files), *(concept if command == "unlearn" else ()), "--out", out]
        script = [sys.executable, "-m", "rocr", *map(str, arguments)]
        return subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_processes_of_their_own_stopped_at_any_time(command, start, files, tmp_path, digests, tally):
    inputs = digests(files.model.parent)

    def whole(out):
        found = digests(out) if out.is_dir() else {"": out.read_bytes()}
        return {part: content for part, content in found.items() if part not in ("report.json", "edit.safetensors")}

    def ended(child):
        _, errors = child.communicate()
        return child.returncode, errors

    started = time.monotonic()
    assert ended(start(command, tmp_path / "whole"))[0] == 0
    seconds, expected = time.monotonic() - started, whole(tmp_path / "whole")
    numbers = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for part, number in enumerate(numbers * 3):
        folder = tmp_path / str(part)
        folder.mkdir()
        child = start(command, folder / "out")
        time.sleep(seconds * (part + 0.5) / 9)
        child.send_signal(number)
        code, errors = ended(child)
        # While Python starts, before rocr has its handlers, a signal ends the process as it ends any other.
        assert code in (-number, 0, 1, 130), errors
        assert all(LEFT.fullmatch(path.name) for path in folder.iterdir())
        if not (folder / "out").exists():
            code, errors = ended(start(command, folder / "out"))
            assert code == 0, errors
        assert whole(folder / "out") == expected
        assert digests(files.model.parent) == inputs
        tally("processes of their own stopped at any time")
