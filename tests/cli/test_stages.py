"""How far a stage is: rates from bursts of steps, lines where there is no terminal, bars where there is one."""

import importlib
import io
import re
import signal
import sys
import threading
import time
from contextlib import redirect_stderr
from functools import partial
from types import SimpleNamespace

import pytest
import rich.console

import rocr.statistics.collect
from rocr import Progress
from rocr.cli.bars import bars
from rocr.cli.console import Console
from rocr.cli.stages import Stage, duration, plain_lines

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, SECONDS = 40, 60.0
"""Questions of a batch, whose steps come within a millisecond, and the seconds that the batch takes."""


def questions(done, total=400, resumed=0):
    return Progress("questions", done, total, "questions", resumed)


def bursts(batches, start=0.0, first=0):
    """(time, done) of the steps of some batches."""
    for batch in range(batches):
        for i in range(BATCH):
            yield start + (batch + 1) * SECONDS + i * 1e-5, first + batch * BATCH + i + 1


def test_a_rate_is_that_of_the_work_and_not_of_a_burst():
    stage = Stage("questions", 0.0)
    for now, done in bursts(3):
        count = stage.take(questions(done), now)
    assert count.rate == pytest.approx(BATCH / SECONDS, rel=1e-3)
    assert count.left == pytest.approx((400 - 120) * SECONDS / BATCH, rel=1e-3)
    assert stage.line(180.0) == "questions: 120 of 400 questions, 0.67 questions/s, 7 min 00 s left"
    assert stage.line(210.0).endswith("6 min 30 s left"), "time goes on between two steps"


def test_a_stage_that_takes_longer_than_expected_says_so():
    stage = Stage("questions", 0.0)
    stage.take(questions(200), 60.0)
    assert stage.line(119.0).endswith(", 1.0 s left")
    assert stage.line(121.0) == "questions: 200 of 400 questions, 3.3 questions/s, longer than expected"
    stage.take(questions(400), 130.0)
    assert stage.line(140.0) == "questions: 400 of 400 questions, 3.1 questions/s", "only what follows it is left"


def test_what_an_earlier_run_had_done_says_nothing_about_the_rate():
    stage = Stage("questions", 0.0)
    for now, done in bursts(2, first=300):
        count = stage.take(questions(done, resumed=300), now)
    assert count.rate == pytest.approx(BATCH / SECONDS, rel=1e-3)
    assert stage.last_lines(120.0) == ["questions: 80 questions in 2 min 00 s, 0.67 questions/s"]


def test_a_part_that_begins_again_counts_on():
    stage = Stage("attacks", 0.0)
    for start in (0.0, 60.0):
        for now, done in bursts(1, start):
            count = stage.take(questions(done, BATCH), now)
    assert count.units == 2 * BATCH
    assert count.rate == pytest.approx(BATCH / SECONDS, rel=1e-3)


def test_a_part_begins_where_the_step_before_it_ended():
    stage = Stage("edit", 0.0)
    stage.take(Progress("targets", 10, 10, "prompts"), 100.0)
    count = stage.take(Progress("keys", 5, 10, "prompts"), 110.0)
    assert count.rate == pytest.approx(0.5)
    assert stage.line(110.0) == "edit, keys: 5 of 10 prompts, 0.5 prompts/s, 10 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def wait_for(is_there):
    """Wait until something is there, however slow the machine is."""
    until = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_stage_without_steps_says_now_and_then_that_it_runs():
    lines = []
    with plain_lines("load", lines.append, 0.01):
        wait_for(lambda: len(lines) >= 2)
        assert all(re.fullmatch(r"load: running for \d+\.\d s", line) for line in list(lines))
    count = len(lines)
    assert re.fullmatch(r"load: \d+\.\d s", lines[-1])
    assert "rocr-progress" not in {thread.name for thread in threading.enumerate()}
    assert len(lines) == count, "nothing is printed after a stage"


def test_a_stage_with_steps_says_how_far_it_is():
    lines = []
    with plain_lines("statistics", lines.append, 0.01) as show:
        time.sleep(0.2)  # 15 times as long is left
        show(Progress("statistics", 512, 8192, "tokens"))
        wait_for(lambda: [line for line in lines if "512" in line])
    first = next(line for line in lines if "512" in line)
    assert re.fullmatch(r"statistics: 512 of 8,192 tokens, [\d.,e+]+ tokens/s, .+ left", first)
    assert lines[-1].startswith("statistics: 512 tokens in ")


def test_a_short_stage_prints_one_line():
    lines = []
    with plain_lines("load", lines.append, 30.0):
        pass
    assert len(lines) == 1


def test_a_signal_ends_a_stage_and_its_lines():
    lines = []

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), plain_lines("load", lines.append, 0.01):
            wait_for(lambda: lines)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "rocr-progress" not in {thread.name for thread in threading.enumerate()}
    assert all("running" in line for line in lines)


def test_a_stream_that_cannot_be_written_to_stops_nothing():
    called = []

    def write(line):
        called.append(line)
        if "running" in line:
            raise OSError("gone")

    with plain_lines("load", write, 0.01):
        wait_for(lambda: len(called) >= 2)


def test_a_command_without_a_terminal_prints_lines(files, command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("rocr.cli.main"), "Console", partial(Console, seconds_between_lines=0.01)
    )
    accumulate, batches = rocr.statistics.collect._accumulate, []
    middle = re.compile(
        r"^statistics: [\d,]+ of [\d,]+ tokens, [\d.,]+ tokens/s, (.* left|longer than expected)$", re.MULTILINE
    )

    def accumulate_slowly(*arguments):
        batches.append(arguments)
        if len(batches) == 3:
            wait_for(lambda: middle.search(sys.stderr.getvalue()))
        return accumulate(*arguments)

    monkeypatch.setattr(rocr.statistics.collect, "_accumulate", accumulate_slowly)
    done = command("stats", files.model, "--text", files.text, "--batch-tokens", "256", "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    last = done.errors.splitlines()[-1]
    assert re.fullmatch(r"statistics: [\d,]+ tokens in .*, [\d.,]+ tokens/s", last)


def test_processes_but_the_first_print_no_lines():
    console = Console(seconds_between_lines=0.001)
    console.speak_as(1)
    errors = io.StringIO()
    with redirect_stderr(errors), console.stage("load"):
        time.sleep(0.02)
    assert errors.getvalue() == ""
    assert console.seconds["load"] > 0


def test_a_bar_shows_the_rate_of_the_work(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rocr.cli.bars.time", SimpleNamespace(monotonic=lambda: now[0]))
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with bars("questions", terminal) as show:
        for now[0], done in bursts(3):
            show(questions(done))
    assert "120 of 400 questions  0.67 questions/s" in terminal.file.getvalue()


def test_a_bar_stops_its_clock_at_the_end_of_its_part_and_says_nothing_of_a_time_left_that_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rocr.cli.bars.time", SimpleNamespace(monotonic=lambda: now[0]))
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with bars("edit", terminal) as show:
        now[0] = 10.0
        show(Progress("targets", 10, 10, "prompts"))
        now[0] = 20.0
        show(Progress("keys", 5, 10, "prompts"))
        now[0] = 31.0  # of an expected 30
    drawn = [line.rstrip() for line in terminal.file.getvalue().splitlines()]
    ends = [next(line for line in reversed(drawn) if part in line) for part in ("targets", "keys")]
    assert ends[0].endswith("10 of 10 prompts  1 prompts/s  10 s")
    assert ends[1].endswith("5 of 10 prompts  0.5 prompts/s  21 s")


def test_an_evaluation_that_goes_on_reports_what_was_done_before(model, tokenizer, tmp_path):
    from rocr.evaluation import EvaluateOptions, Probe, evaluate

    probes = [Probe("Ada Byron", f"Where was Ada Byron at {i}?", "London") for i in range(4)]
    options = EvaluateOptions(journal=tmp_path / "journal", token_budget=1)

    def stop(step):
        if step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, probes, ["qa"], options=options, progress=stop)
    steps = []
    evaluate(model, tokenizer, probes, ["qa"], options=options, progress=steps.append)
    assert [(step.done, step.resumed) for step in steps] == [(3, 2), (4, 2)]


def test_a_collection_that_goes_on_reports_what_was_done_before(model, tokenizer, texts, tmp_path):
    from rocr import CollectOptions, collect_statistics

    options = CollectOptions(length=32, batch_tokens=64, text_sha256="0" * 64, checkpoint=tmp_path / "checkpoint")
    stopped, steps = [], []

    def stop(step):
        stopped.append(step)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, tokenizer, texts, [1], options, stop)
    collect_statistics(model, tokenizer, texts, [1], options, steps.append)
    assert {step.resumed for step in stopped} == {0}
    assert {step.resumed for step in steps} == {stopped[-1].done}
