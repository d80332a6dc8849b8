"""Run commands of rocr in forks of one warm process, each stopped in some way; test_commands_stopped.py judges them.

The argument is a list of jobs in JSON: a folder, a command with ROOT for the folder to write below, and how to stop
it. Prints for each job what every run left; the first of each is undisturbed. Needs LD_PRELOAD of faults.c.
"""

import contextlib
import ctypes
import errno
import gc
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM  # noqa: F401

import rocr.export.folder
import rocr.model.generate
import rocr.statistics.collect
import rocr.unlearn
from rocr.cli import main

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "forbidden": errno.EACCES, "read-only": errno.EROFS}
CAUGHT = (signal.SIGTERM, signal.SIGINT)
LASTING = ("full",)
ENOUGH = "size=64m,nr_inodes=1000"
KNOWN = {}
"""What undisturbed runs took and left, by their arguments."""
FAULTS = ctypes.CDLL(os.environ["LD_PRELOAD"])


class Runs:
    """The runs of one job, each in a folder of its own."""

    def __init__(self, base, arguments):
        self.base, self.arguments = Path(base), arguments
        self.results = []

    def new(self):
        root = self.base / f"{len(self.results):04d}"
        (root / "work").mkdir(parents=True)
        return root

    def start(self, root, before=lambda: None):
        """The number of a child that runs the command."""
        # What comes while the child has no handler yet waits; else SIGTERM ended it as -15, and SIGINT was lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
            return child
        code = 70
        for number in CAUGHT:  # before the command has its own handlers, and after
            signal.signal(number, lambda *_: os._exit(130))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        log = io.StringIO()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                before()
                code = main([part.replace("ROOT", str(root / "work")) for part in self.arguments])
            except BaseException as error:
                log.write(f"Traceback {error!r}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (root / "log").write_text(log.getvalue())
        (root / "steps").write_text(str(FAULTS.faults_seen()))
        os._exit(code)

    def note(self, root, code, again=True):
        """Record what a run left; then run it once more, undisturbed, if it made nothing."""
        out = root / "work" / "out"
        left = sorted(path.name for path in out.parent.iterdir())
        found = {"code": code, "left": left, "log": log_of(root), "out": contents(out)}
        if again and found["out"] is None:
            found |= {"again": wait(self.start(root)), "log again": log_of(root), "out again": contents(out)}
        self.results.append(found)

    def undisturbed(self):
        """Run once to the end, or remember that; returns how many steps and seconds that takes."""
        known = KNOWN.get(tuple(self.arguments))
        if known is None:
            root, started = self.new(), time.monotonic()
            code = wait(self.start(root, lambda: arm(root)))
            seconds = time.monotonic() - started
            self.note(root, code, again=False)
            known = KNOWN[tuple(self.arguments)] = (int((root / "steps").read_text()), seconds, self.results[0])
        else:
            self.results.append(known[2])
        return known[:2]


def warm_up(jobs):
    """Run each command once in this process, so that its children need not import and build what it uses again."""
    commands = {tuple(arguments[:2]): (base, arguments) for base, arguments, *_ in jobs}
    for base, arguments in commands.values():
        root = Path(base) / "warm"
        root.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main([part.replace("ROOT", str(root)) for part in arguments])


def log_of(root):
    """What the run said; nothing where it was killed."""
    return (root / "log").read_text() if (root / "log").exists() else ""


def arm(root, stage=-1, mode=""):
    """In a child: from now on count the steps below a folder, and stop at one of them."""
    place = str(root / "work").encode()
    FAULTS.faults_arm(place, stage, SIGNALS.get(mode, 0), ERRORS.get(mode, 0), mode in LASTING)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(path):
    """sha256 of each file, without what holds the seconds that a run took; None where there is nothing."""
    if not path.exists():
        return None
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: digest(file) for name, file in (files or {".": path}).items() if name != "report.json"}


def digest(path):
    data = path.read_bytes()
    if path.name == "edit.safetensors":
        data = data[8 + int.from_bytes(data[:8], "little") :]
    return hashlib.sha256(data).hexdigest()


def at_steps(runs, mode, first, stride, again_every):
    """Stopped at every `stride`-th step: each call that changes the file system, and the middle of each write."""
    steps, _ = runs.undisturbed()
    for stage in range(first, steps, stride):
        root = runs.new()
        code = wait(runs.start(root, lambda root=root, stage=stage: arm(root, stage, mode)))
        runs.note(root, code, again=stage // stride % again_every == 0)


def by_time(runs, mode, times):
    """A signal after each of so many parts of the time that it takes."""
    _, seconds = runs.undisturbed()
    for number in range(times):
        root = runs.new()
        child = runs.start(root)
        time.sleep(seconds * (number + 0.5) / times)
        os.kill(child, SIGNALS[mode])
        runs.note(root, wait(child), again=number % 2 == 0)


def small_files(runs, sizes):
    """The system refuses to let any file grow beyond a size (EFBIG, after a part of the write)."""
    runs.undisturbed()
    for size in sizes:
        root = runs.new()
        limits = (size, resource.RLIM_INFINITY)
        code = wait(runs.start(root, lambda limits=limits: resource.setrlimit(resource.RLIMIT_FSIZE, limits)))
        runs.note(root, code)


def small_disks(runs, options):
    """A real disk without space, or without room for more files; needs a mount namespace of one's own."""
    runs.undisturbed()
    for option in options:
        root = runs.new()
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", root / "work"], check=True)
        code = wait(runs.start(root))
        subprocess.run(["mount", "-o", f"remount,{ENOUGH}", root / "work"], check=True)
        runs.note(root, code)
        subprocess.run(["umount", root / "work"], check=True)


def read_only(runs):
    """A folder that nobody can write to, not even root; then it can be written to."""
    runs.undisturbed()
    root = runs.new()
    subprocess.run(["mount", "--bind", root / "work", root / "work"], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", root / "work"], check=True)
    code = wait(runs.start(root))
    subprocess.run(["umount", root / "work"], check=True)
    runs.note(root, code)


def read_only_input(runs, folder):
    """The input cannot be written to, and all works as ever."""
    runs.undisturbed()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    root = runs.new()
    runs.note(root, wait(runs.start(root)))
    subprocess.run(["umount", folder], check=True)


def two_at_once(runs, times):
    """Two at once on one output."""
    runs.undisturbed()
    for _ in range(times):
        root = runs.new()
        (root / "other").mkdir()
        (root / "other" / "work").symlink_to(root / "work")
        codes = [wait(child) for child in (runs.start(root), runs.start(root / "other"))]
        (root / "log").write_text(log_of(root) + log_of(root / "other"))
        runs.note(root, sum(codes), again=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rocr.statistics.collect.SECONDS_BETWEEN_CHECKPOINTS = 0.0  # a checkpoint after every batch
    jobs = json.loads(sys.argv[1])
    warm_up(jobs)
    gc.collect()
    gc.freeze()  # children then copy fewer pages
    found = []
    for base, arguments, way, options in jobs:
        runs = Runs(base, arguments)
        globals()[way](runs, **options)
        found.append(runs.results)
    sys.stdout.write(json.dumps(found))
