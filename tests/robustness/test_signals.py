import json
import signal

import pytest

from rocr.io.signals import postponed_signals
from tests.support.forks import end_of, start_fork


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
import json, os, signal, sys, time
import torch
import rocr.statistics.collect
from rocr.cli import main

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

run(*json.loads(sys.argv[1]))
"""
LOST_CASES = [(way, number) for way in ("callback", "conversion") for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(("way", "number"), LOST_CASES)
def test_a_signal_is_not_lost_where_what_it_raises_is(way, number, files, tmp_path):
    # Both occurred in runs stopped at every moment: one continued, one reported a good file as bad.
    log, out = tmp_path / "log", tmp_path / "out"
    stats = ("stats", files.model, "--text", files.text, "--batch-tokens", "128", "--out", out)
    assert end_of(start_fork(LOST, [json.dumps([way, number, [*map(str, stats)]])], log)) == 0, log.read_text()
    text = log.read_text()
    assert "code 130 True" in text, text
    assert "rocr: Interrupted; no partial output was left." in text
    assert "Traceback" not in text
    assert not out.exists()
