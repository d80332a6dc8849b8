import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rocr.errors import InputError
from rocr.io.locks import Owner, locked
from tests.support.promises import names

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from rocr.io.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(3600)  # until it is killed
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `out`."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"held\n"
    yield child
    child.kill()
    child.communicate()


def test_a_lock_lasts_as_long_as_its_context(tmp_path):
    with locked(tmp_path / "out"):
        assert names(tmp_path) == ["out.lock"]
        assert json.loads((tmp_path / "out.lock").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []
    with pytest.raises(KeyError), locked(tmp_path / "out"):
        raise KeyError
    assert names(tmp_path) == []


def test_a_second_run_is_refused_and_names_the_first(tmp_path, holder, files, command, concept):
    with pytest.raises(InputError, match=f"made by process {holder.pid}"), locked(tmp_path / "out"):
        pass
    statistics = ("--statistics", files.statistics)
    for arguments in (
        ("stats", files.model, "--text", files.text),
        ("unlearn", files.model, *concept, *statistics),
        ("apply", files.model, files.edit),
        ("revert", files.edited),
    ):
        done = command(*arguments, "--out", tmp_path / "out")
        assert done.code == 2
        assert f"process {holder.pid}" in done.errors
    assert names(tmp_path) == ["out.lock"]


@pytest.mark.parametrize("collected", [False, True])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, collected):
    os.kill(holder.pid, signal.SIGKILL)
    if collected:
        holder.wait()
    else:
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    with locked(tmp_path / "out"):
        assert json.loads((tmp_path / "out.lock").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def write_lock(folder, **changes):
    me = Owner.of_this_process()
    (folder / "out.lock").write_text(json.dumps({"pid": me.pid, "host": me.host, "started": me.started} | changes))


def test_a_later_process_of_the_same_number_does_not_count(tmp_path):
    write_lock(tmp_path, started=1)
    with locked(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_of_another_machine_nobody_knows(tmp_path):
    write_lock(tmp_path, host=f"not-{socket.gethostname()}", started=1)
    with pytest.raises(InputError, match=r"delete .*out\.lock"), locked(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out.lock"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "null", "[" * 100_000])
def test_a_lock_that_says_nothing_is_left_to_the_user(tmp_path, text):
    (tmp_path / "out.lock").write_text(text)
    with pytest.raises(InputError, match=r"delete .*out\.lock"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "out.lock").read_text() == text


RACE = """
import os, sys, time
from rocr.errors import InputError
from rocr.io.locks import locked
for out in sys.argv[1:]:
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            try:
                with locked(out):
                    with open(out + ".inside", "x"):
                        time.sleep(0.05)
                    os.unlink(out + ".inside")
            except InputError:
                os._exit(0)
            except BaseException:
                os._exit(99)
            os._exit(1)
        children.append(child)
    print(*sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.mark.parametrize("stale", [False, True])
def test_of_eight_at_once_never_two_hold_it(tmp_path, stale):
    folders = [tmp_path / str(attempt) for attempt in range(6)]
    for folder in folders:
        folder.mkdir()
        if stale:
            write_lock(folder, started=1)
    script = [sys.executable, "-c", RACE, *(str(folder / "out") for folder in folders)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=600, cwd=ROOT)
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        codes = list(map(int, line.split()))
        assert len(codes) == 8 and set(codes) <= {0, 1}
        assert 1 in codes
        assert names(folder) == []


@pytest.mark.parametrize("stale", [False, True])
def test_what_the_disk_does_not_remove_at_once_is_removed_in_the_end(tmp_path, monkeypatch, stale):
    # Met with faults at every step: the file that became the lock kept its first name beside it.
    if stale:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        (tmp_path / "out.lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "started": 1}))
    unlink, refused = Path.unlink, []

    def refusing_once(path, missing_ok=False):
        if path not in refused:
            refused.append(path)
            raise OSError(5, "Input/output error")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing_once)
    with locked(tmp_path / "out"):
        assert len(names(tmp_path)) == (4 if stale else 2)
    assert names(tmp_path) == ["out.lock"], "which the next run takes over"
    assert len(refused) == (4 if stale else 2)
    with locked(tmp_path / "other"):
        pass
