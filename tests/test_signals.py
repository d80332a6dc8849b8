import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rocr.signals import postponed_signals

ROOT = Path(__file__).parents[1]


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


SWALLOWED = """
import os, signal, sys
import rocr.collect
from rocr.cli import main

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        for _ in range(1000):  # where the handler runs, and where Python ignores what it raises
            pass

accumulate = rocr.collect._accumulate

def dying(*arguments):
    rocr.collect._accumulate = accumulate
    Dying()
    return accumulate(*arguments)

rocr.collect._accumulate = dying
code = main(sys.argv[1:])
put_back = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and sys.unraisablehook is sys.__unraisablehook__
print("code", code, put_back)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_python_ignores_in_a_callback_is_not_lost(name, files, tmp_path):
    # Met in a run that was stopped at every moment: a weak reference's callback swallowed it, and the run went on.
    arguments = ("stats", files.model, "--text", files.text, "--batch-tokens", "128", "--out", tmp_path / "out")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", SWALLOWED.format(name=name), *map(str, arguments)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=120)
    assert "code 130 True" in done.stdout, done.stdout + done.stderr
    assert "rocr: Interrupted; nothing was left half-written." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
