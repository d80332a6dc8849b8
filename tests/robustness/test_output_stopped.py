import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.promises import names

ROOT = Path(__file__).parents[2]
LEFTOVER = re.compile(r"out\.(partial|old)-[0-9a-f]{8}")
STAGES = """
import errno, itertools, os, signal, sys
from pathlib import Path
from rocr.errors import RocrError
from rocr.io.output import new_directory, new_file

base, kind, overwrite, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4]
WATCHED = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree", "write"}

def stop_at(stage, root):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in WATCHED and str(root) in str(arguments):
            seen += 1
            if seen == stage + 1:
                if mode == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt if mode == "interrupt" else OSError(errno.ENOSPC, "No space left on device")
    sys.addaudithook(hook)

def write(path):
    with path.open("w") as file:
        for part in ("first half, ", "second half"):
            sys.audit("write", str(path))
            file.write(part)
            file.flush()

def produce(root):
    if kind == "folder":
        with new_directory(root / "out", overwrite=overwrite) as partial:
            for name in ("a", "b"):
                write(partial / name)
    else:
        with new_file(root / "out", overwrite=overwrite) as partial:
            write(partial)

for stage in itertools.count():
    root = base / f"{stage:03d}"
    root.mkdir(parents=True)
    if overwrite:
        (root / "out").mkdir() if kind == "folder" else (root / "out").write_text("old")
    if overwrite and kind == "folder":
        (root / "out" / "old").write_text("old")
    child = os.fork()
    if child == 0:
        stop_at(stage, root)
        try:
            produce(root)
        except KeyboardInterrupt:
            os._exit(130)
        except RocrError as error:
            os._exit(error.exit_code)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    (base / f"{stage:03d}.status").write_text(str(os.waitstatus_to_exitcode(status)))
    if status == 0:
        break
"""
STOPPED = {"kill": -signal.SIGKILL, "interrupt": 130, "full": 1}
COMPLETE = "first half, second half"


def state(path):
    if path.is_dir():
        content = {entry.name: entry.read_text() for entry in path.iterdir()}
        return {json.dumps({"old": "old"}): "old", json.dumps({"a": COMPLETE, "b": COMPLETE}): "new"}.get(
            json.dumps(content, sort_keys=True), f"partial: {content}"
        )
    if path.is_file():
        return {"old": "old", COMPLETE: "new"}.get(path.read_text(), "partial")
    return "absent"


@pytest.mark.parametrize("mode", ["kill", "interrupt", "full"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_run_stopped_at_any_stage_leaves_a_whole_result_or_none(tmp_path, kind, overwrite, mode):
    script = [sys.executable, "-c", STAGES, str(tmp_path), kind, str(overwrite), mode]
    subprocess.run(script, check=True, timeout=600, cwd=ROOT)
    roots = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    states = [state(root / "out") for root in roots]
    codes = [int(root.with_suffix(".status").read_text()) for root in roots]
    assert set(codes[:-1]) == {STOPPED[mode]}
    assert (codes[-1], states[-1], names(roots[-1])) == (0, "new", ["out"])
    assert len(roots) >= (11 if kind == "folder" else 6)

    before = "old" if overwrite else "absent"
    assert states[0] == before
    assert set(states) <= {before, "new", "absent"}
    assert set(states[states.index("new") :]) == {"new"}
    for root, found in zip(roots, states, strict=True):
        leftovers = [name for name in names(root) if name != "out"]
        assert all(map(LEFTOVER.fullmatch, leftovers))
        if found == "absent" and overwrite:  # killed between two renames: the old result stands beside the new
            assert mode == "kill"
            assert kind == "folder"
            assert sorted(state(root / name) for name in leftovers) == ["new", "old"]
        if mode != "kill":  # only the removal of what was replaced can be left unfinished
            assert not any("partial" in name for name in leftovers)
            assert not leftovers or found == "new"
    assert states.count("absent") <= (1 if overwrite else len(states))


RACE = """
import os, sys, time
from pathlib import Path
from rocr.errors import RocrError
from rocr.io.output import new_directory, new_file

kind = sys.argv[1]
for out in map(Path, sys.argv[2:]):
    wait, go = os.pipe()
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            os.close(go)
            try:
                with (new_directory if kind == "folder" else new_file)(out) as partial:
                    (partial / "number" if kind == "folder" else partial).write_text(str(number))
                    os.read(wait, 1)  # returns when the parent closes its end: all six go at once
            except RocrError as error:
                os._exit(0 if "Another process wrote" in str(error) else 3)
            os._exit(100 + number)
        children.append(child)
    while sum(1 for path in out.parent.iterdir()) < 6:
        time.sleep(0.001)
    os.close(go)
    os.close(wait)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_of_six_processes_that_finish_at_once_one_wins(tmp_path, kind):
    outs = [tmp_path / str(attempt) / "out" for attempt in range(10)]
    for out in outs:
        out.parent.mkdir()
    script = [sys.executable, "-c", RACE, kind, *map(str, outs)]
    done = subprocess.run(script, check=True, timeout=600, capture_output=True, text=True, cwd=ROOT)
    for out, line in zip(outs, done.stdout.splitlines(), strict=True):
        *losers, winner = sorted(map(int, line.split()))
        assert losers == [0] * 5
        assert (out / "number" if kind == "folder" else out).read_text() == str(winner - 100)
        assert names(out.parent) == ["out"]
