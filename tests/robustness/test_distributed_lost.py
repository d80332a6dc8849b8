"""Processes that collect statistics together: if one is lost, fails or is refused, all end and can resume."""

import json

import pytest
import torch
import torch.distributed

import rocr
from tests.support.forks import end_of, start_fork

pytestmark = pytest.mark.thorough

SECONDS = 600
"""Within which the others must have ended, far below the half hour after which a hang would end; about one is usual."""
SCRIPT = """
import contextlib, json, os, signal, socket, sys, time
import rocr.statistics.checkpoint, rocr.statistics.collect, rocr.statistics.statistics
from rocr.cli import main
rocr.statistics.collect.SECONDS_BETWEEN_CHECKPOINTS = 0.0  # a checkpoint after every batch

def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]

def act(what, log):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("out of memory: the chip is too small" if what == "memory" else what)

def run_rank(rank, size, port, arguments, stop, log):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    calls, accumulate, save = 0, rocr.statistics.collect._accumulate, rocr.statistics.statistics.write_tensors
    def counted(*given):
        nonlocal calls
        calls += 1
        if stop.get("rank") == rank and stop.get("batch") == calls:
            act(stop["what"], log)
        return accumulate(*given)
    def saved(*given, **options):
        if stop.get("what") == "disk":
            raise rocr.RocrError("the disk is full")
        save(*given, **options)
    rocr.statistics.collect._accumulate, rocr.statistics.statistics.write_tensors = counted, saved
    code = 70
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        log.write(f"Traceback {error!r}")
    log.write(f"\\nbatches {calls}")
    log.flush()
    os._exit(code)

def run(size, arguments, stop, base):
    port, children, started = free_port(), [], time.monotonic()
    for rank in range(size):
        own = [part.replace("RANK", str(rank)) for part in arguments]
        child = os.fork()
        if child == 0:
            log = open(f"{base}-{rank}", "w")
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                run_rank(rank, size, port, own, stop, log)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    logs = [open(f"{base}-{rank}").read() for rank in range(size)]
    return {"codes": codes, "logs": logs, "seconds": time.monotonic() - started}

print(json.dumps(run(*json.loads(sys.argv[1]))))
"""
BATCHES = 8


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(size, arguments, stop): a command in so many processes, which are forks of one."""
    base = tmp_path_factory.mktemp("logs")

    def run(size, arguments, **stop):
        given = json.dumps([size, [*map(str, arguments)], stop, str(base / "log")])
        assert end_of(start_fork(SCRIPT, [given], base / "found")) == 0, (base / "found").read_text()
        found = json.loads((base / "found").read_text())
        assert not any("Traceback" in log for log in found["logs"]), found["logs"]
        assert found["seconds"] < SECONDS
        return found

    return run


@pytest.fixture
def stats(files, tmp_path):
    """Arguments of the command; text of 8 batches and a little."""
    cut = ("--layers", "1,2", "--length", "32", "--batch-tokens", "512", "--tokens", 496 * BATCHES + 7)
    return ["stats", files.model, "--text", files.text, *cut, "--out", tmp_path / "out"]


@pytest.fixture(scope="module")
def whole(ranks, files, tmp_path_factory):
    """What two processes write that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    cut = ("--layers", "1,2", "--length", "32", "--batch-tokens", "512", "--tokens", 496 * BATCHES + 7)
    done = ranks(2, ["stats", files.model, "--text", files.text, *cut, "--out", out])
    assert done["codes"] == [0, 0], done["logs"]
    assert [log.strip().splitlines()[-1] for log in done["logs"]] == ["batches 5", "batches 4"]
    return out.read_bytes()


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if ".partial-" not in path.name)


STATES = ["out.checkpoint.0-of-2", "out.checkpoint.1-of-2"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_and_all_go_on_later(lost, ranks, stats, whole, tmp_path):
    stopped = ranks(2, stats, what="kill", rank=lost, batch=3)
    other = 1 - lost
    assert stopped["codes"][lost] == -9 and stopped["codes"][other] == 1
    assert f"Process {other} of 2 cannot reach another process" in stopped["logs"][other]
    assert names(tmp_path) in (STATES, [*STATES, "out.lock"])
    for number, size in ((1, "one process"), (3, "3 processes")):
        refused = ranks(number, stats)
        assert set(refused["codes"]) == {2}
        assert "by 2 processes, but this one has" in refused["logs"][0], size
        assert all("rocr" not in log for log in refused["logs"][1:])
    assert set(names(tmp_path)) - {"out.lock"} == set(STATES)
    resumed = ranks(2, stats)
    assert resumed["codes"] == [0, 0], resumed["logs"]
    assert "Continuing from" in resumed["logs"][0]
    assert sum(int(log.split()[-1]) for log in resumed["logs"]) <= 9 - 4
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("what", ["memory", "terminate"])
def test_a_failing_process_ends_the_others_and_all_go_on_later(what, ranks, stats, whole, tmp_path):
    stopped = ranks(2, stats, what=what, rank=1, batch=2)
    assert stopped["codes"] == [1, 130 if what == "terminate" else 1], stopped["logs"]
    said = "Process 1 of 2 stopped: RuntimeError: out of memory" if what == "memory" else "cannot reach another"
    assert said in stopped["logs"][0]
    assert names(tmp_path) == STATES
    assert ranks(2, stats)["codes"] == [0, 0]
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == whole


def test_a_state_that_is_gone_costs_its_own_share_only(ranks, stats, whole, tmp_path):
    ranks(2, stats, what="kill", rank=1, batch=4)
    (tmp_path / STATES[1]).unlink()
    resumed = ranks(2, stats)
    assert resumed["codes"] == [0, 0], resumed["logs"]
    assert int(resumed["logs"][0].split()[-1]) <= 2 and int(resumed["logs"][1].split()[-1]) == 4
    assert (tmp_path / "out").read_bytes() == whole


def test_a_result_that_cannot_be_written_loses_nothing(ranks, stats, whole, tmp_path):
    stopped = ranks(2, stats, what="disk")
    assert stopped["codes"] == [1, 1]
    assert "the disk is full" in stopped["logs"][0] and "rocr" not in stopped["logs"][1]
    assert names(tmp_path) == STATES
    resumed = ranks(2, stats)
    assert resumed["codes"] == [0, 0] and all(log.endswith("batches 0") for log in resumed["logs"])
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == whole


def test_bad_input_is_said_once(ranks, stats, files, tmp_path):
    (tmp_path / "0.txt").write_text("The text of process 0.")
    (tmp_path / "1.txt").write_text("The text of process 1.")
    taken = tmp_path / "taken"
    taken.write_text("somebody's")
    place = stats.index(files.text)
    for arguments, code, sentence in (
        ([*stats[:place], tmp_path / "missing.txt", *stats[place + 1 :]], 2, "missing.txt does not exist"),
        ([*stats[:-1], taken], 2, "exists; choose another name"),
        ([*stats[:place], tmp_path / "RANK.txt", *stats[place + 1 :]], 2, "have different models, texts"),
        ([*stats, "--length", "1"], 2, "length must be at least 2"),
        ([*stats, "--layers", "9"], 2, "out of range"),
    ):
        done = ranks(3 if "RANK" not in str(arguments) else 2, arguments)
        assert set(done["codes"]) == {code}, done["logs"]
        assert sentence in done["logs"][0].replace("\n", " ")
        assert all("rocr" not in log for log in done["logs"][1:]), done["logs"]
    assert names(tmp_path) == ["0.txt", "1.txt", "taken"] and taken.read_text() == "somebody's"


def test_the_number_of_processes_leaves_no_trace_beyond_rounding(ranks, stats, whole, tmp_path):
    (tmp_path / "two").write_bytes(whole)
    two = rocr.Statistics.load(tmp_path / "two")
    for size in (1, 3):
        done = ranks(size, [*stats[:-1], tmp_path / f"by{size}"])
        assert set(done["codes"]) == {0}, done["logs"]
        other = rocr.Statistics.load(tmp_path / f"by{size}")
        assert (other.tokens, other.text, other.fingerprint) == (two.tokens, two.text, two.fingerprint)
        for layer, moment in two.moments.items():
            assert torch.equal(other.moments[layer], other.moments[layer].T)
            assert (other.moments[layer] - moment).abs().max() < 2e-6 * moment.abs().max()
