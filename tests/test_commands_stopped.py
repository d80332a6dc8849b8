"""Every command stopped at every step of its files, by signals and by a disk that fails: nothing is lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = """
import contextlib, errno, gc, io, itertools, json, os, signal, sys
from pathlib import Path

import safetensors.torch, torch, transformers
from transformers import LlamaForCausalLM
import rocr.answers, rocr.checkpoint, rocr.cli, rocr.collect, rocr.edit_file, rocr.files, rocr.models, rocr.pipeline
from rocr.cli import main

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # children then copy fewer pages
rocr.collect.SECONDS_BETWEEN_CHECKPOINTS = 0.0  # a checkpoint after every batch
jobs = json.loads(sys.argv[1])
EVENTS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"}
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "forbidden": errno.EACCES}

def stop_at(stage, root, mode):
    seen = 0
    def step(writes=True):
        nonlocal seen
        seen += 1
        if seen == stage + 1:
            if mode in SIGNALS:
                os.kill(os.getpid(), SIGNALS[mode])
            else:
                raise OSError(ERRORS[mode], os.strerror(ERRORS[mode]), str(root / "out"))
    def hook(event, arguments):
        if event in EVENTS and str(root) in str(arguments):
            step()
    sys.addaudithook(hook)
    fsync = os.fsync
    def failing_fsync(descriptor):
        step()
        fsync(descriptor)
    os.fsync = failing_fsync
    for module in (rocr.files, sys.modules["rocr.lora"] if "rocr.lora" in sys.modules else rocr.files):
        save = module.save_file
        def failing_save(tensors, path, metadata=None, save=save):
            step()
            save(tensors, path, metadata=metadata)
            whole = Path(path).read_bytes()
            with io.open(path, "wb", closefd=True) as file:  # the library writes at once: here it is half done
                file.write(whole[: len(whole) // 2])
            step()
            Path(path).write_bytes(whole)
        module.save_file = failing_save
    return lambda: seen

def run(stage, root, mode, arguments):
    child = os.fork()
    if child == 0:
        with open(root / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            count = stop_at(stage, root / "work", mode) if stage is not None else None
            code = 70
            try:
                code = main([part.replace("ROOT", str(root / "work")) for part in arguments])
            except BaseException as error:
                log.write(f"Traceback {error!r}")
            if count is not None and count() <= stage:
                (root / "unreached").touch()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def sweep(base, mode, stride, again_every, arguments):
    results = []
    for stage in itertools.count(0, stride):
        root = Path(base, f"{len(results):04d}")
        (root / "work").mkdir(parents=True)
        first = run(stage, root, mode, arguments)
        left = sorted(path.name for path in (root / "work").iterdir())
        out = root / "work" / "out"
        stopped = {"code": first, "left": left, "log": (root / "log").read_text()}
        if first != 0 and not out.exists() and len(results) % again_every == 0:
            stopped["again"] = run(None, root, mode, arguments)
            stopped["log again"] = (root / "log").read_text()
        results.append(stopped)
        if (root / "unreached").exists():
            return results
        assert stage < 400

print(json.dumps([sweep(*job) for job in jobs]))
"""
COMMANDS = {
    "stats": lambda files: ("stats", files.model, "--text", files.text, "--layers", "1,2", "--batch-tokens", "1024"),
    "unlearn": lambda files: ("unlearn", files.model, "--statistics", files.statistics),
    "apply": lambda files: ("apply", files.model, files.edit),
    "revert": lambda files: ("revert", files.edited),
}
CODES = {
    "kill": (-9,),
    "terminate": (130,),
    "interrupt": (130,),
    "full": (1, 2),
    "broken": (1, 2),
    "forbidden": (1, 2),
}
STRIDES = {"kill": 7, "full": 13, "broken": 31, "forbidden": 37, "terminate": 29, "interrupt": 37}
LEFT = re.compile(r"out(\.checkpoint)?\.partial-[0-9a-f]{8}|out\.lock(-[0-9a-f]{8})?|out\.checkpoint|out")
VARYING = ("report.json",)
"""It holds the seconds that the run took."""


def contents(path, digests):
    found = digests(path) if path.is_dir() else {"": path.read_bytes()}
    return {name: digest for name, digest in found.items() if name not in VARYING and name != "edit.safetensors"}


@pytest.fixture(scope="module")
def sweeps(files, concept, tmp_path_factory):
    """sweeps(strides): every command stopped in every way, at each of so many steps; in forks of one warm process."""
    inputs = {path: path.read_bytes() for path in files.model.parent.rglob("*") if path.is_file()}

    def sweep(strides, again_every):
        base = tmp_path_factory.mktemp("stopped")
        jobs = {}
        for name, command in COMMANDS.items():
            arguments = [*command(files), *(concept if name == "unlearn" else ()), "--out", "ROOT/out"]
            for mode, stride in strides.items():
                jobs[name, mode] = (str(base / f"{name}-{mode}"), mode, stride, again_every, list(map(str, arguments)))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        script = [sys.executable, "-c", STAGES, json.dumps(list(jobs.values()))]
        done = subprocess.run(script, capture_output=True, text=True, timeout=1800, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        assert {path: path.read_bytes() for path in inputs if path.is_file()} == inputs
        assert {path for path in files.model.parent.rglob("*") if path.is_file()} == set(inputs)
        return {job: (Path(jobs[job][0]), stages) for job, stages in zip(jobs, json.loads(done.stdout), strict=True)}

    return sweep


def check_stages(base, mode, stages, digests):
    """Nothing half-made, nothing else left, a sentence and the right exit code, and the same bytes in the end."""
    assert len(stages) >= 2
    assert stages[-1]["code"] == 0
    expected = contents(base / f"{len(stages) - 1:04d}" / "work" / "out", digests)
    for number, stage in enumerate(stages[:-1]):
        assert stage["code"] in (*CODES[mode], 0), (number, stage)
        assert "Traceback" not in stage["log"], (number, stage["log"])
        assert all(LEFT.fullmatch(left) for left in stage["left"]), (number, stage["left"])
        if mode != "kill":  # what a killed process leaves bears a name of its own; nothing else leaves anything
            # but a lock that the disk refuses to remove: its process has ended, and the next run takes it over.
            lock = set() if mode in ("terminate", "interrupt") else {"out.lock"}
            assert set(stage["left"]) <= {"out", "out.checkpoint", *lock}, (number, stage["left"])
        assert stage.get("again", 0) == 0, (number, stage["log again"])
        out = base / f"{number:04d}" / "work" / "out"
        assert "again" not in stage or out.exists()
        assert not out.exists() or contents(out, digests) == expected, (number, stage)


@pytest.fixture(scope="module")
def some_sweeps(sweeps):
    return sweeps(STRIDES, again_every=2)


@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_at_some_steps(name, mode, some_sweeps, tally, digests):
    base, stages = some_sweeps[name, mode]
    check_stages(base, mode, stages, digests)
    attack = "kills and signals" if mode in ("kill", "terminate", "interrupt") else "faults of the disk"
    tally(f"{attack} survived by commands", len(stages) - 1)


@pytest.mark.slow
def test_stopped_at_every_step(sweeps, tally, digests):
    for (_, mode), (base, stages) in sweeps(dict.fromkeys(CODES, 1), again_every=1).items():
        check_stages(base, mode, stages, digests)
        tally("kills, signals and faults at every step survived by commands", len(stages) - 1)
