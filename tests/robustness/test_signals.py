import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rocr.io.signals import postponed_signals

ROOT = Path(__file__).parents[2]


def test_signals_wait_until_the_context_ends():
    came = []
    handlers = {
        number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with postponed_signals():
            for number in handlers:
                signal.raise_signal(number)
            assert came == []
        assert came == [signal.SIGINT, signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert came[2:] == [signal.SIGINT], "the handlers are back"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


LOST = """
import contextlib, json, os, signal, sys, time
import torch
from transformers import LlamaForCausalLM
import rocr.statistics.collect
from rocr.cli import main

torch.set_num_threads(1)

def stopped_here(number):
    os.kill(os.getpid(), number)
    while True:  # until the handler raises, here
        time.sleep(0.01)

class InCallback:
    def __init__(self, number):
        self.number = number

    def __del__(self):  # Python ignores what is raised here
        stopped_here(self.number)

class Sequence:
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 1

    def __getitem__(self, index):  # torch replaces what is raised here by a ValueError
        stopped_here(self.number)
        return 1

ways = {"callback": InCallback, "conversion": lambda number: torch.tensor(Sequence(number))}
accumulate = rocr.statistics.collect._accumulate

def run(way, number, arguments):
    def stopped_once(*given):
        rocr.statistics.collect._accumulate = accumulate
        ways[way](number)
        return accumulate(*given)

    rocr.statistics.collect._accumulate = stopped_once
    code = main(arguments)
    put_back = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and sys.unraisablehook is sys.__unraisablehook__
    print("code", code, put_back, flush=True)

warm, *jobs = json.loads(sys.argv[1])
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
    main(warm)  # the children then need not import what the command uses
for log, *case in jobs:
    child = os.fork()  # a process of its own for each, which need not import torch again
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        run(*case)
        os._exit(0)
    os.waitpid(child, 0)
"""
LOST_CASES = [(way, number) for way in ("callback", "conversion") for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(scope="module")
def logs(files, tmp_path_factory):
    """What `rocr stats` prints, by the way in which what a signal raises is lost, and the signal."""
    base = tmp_path_factory.mktemp("lost")
    stats = ("stats", files.model, "--text", files.text, "--batch-tokens", "128")
    found, jobs = {}, [[*map(str, stats), "--tokens", "100", "--out", str(base / "warm")]]
    for way, number in LOST_CASES:
        folder = base / f"{way}-{number}"
        folder.mkdir()
        jobs.append((str(folder / "log"), way, number, [*map(str, stats), "--out", str(folder / "out")]))
        found[way, number] = folder / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", LOST, json.dumps(jobs)]
    subprocess.run(script, check=True, env=environment, timeout=600)
    return found


@pytest.mark.parametrize(("way", "number"), LOST_CASES)
def test_a_signal_is_not_lost_where_what_it_raises_is(way, number, logs):
    # Both occurred in runs stopped at every moment: one continued, one reported a good file as bad.
    log = logs[way, number]
    text = log.read_text()
    assert "code 130 True" in text, text
    assert "rocr: Interrupted; no partial output was left." in text
    assert "Traceback" not in text
    assert not (log.parent / "out").exists()
