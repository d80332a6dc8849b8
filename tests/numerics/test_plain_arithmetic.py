"""The context that fixes the flags of torch: threads share it, and every way to leave it restores them."""

from __future__ import annotations

import linecache
import sys
import threading
from typing import Any

import pytest
import torch

from rocr.ops.arithmetic import plain_arithmetic
from tests.support.states import default_dtype, surroundings


def test_threads_hold_the_flags_until_the_last_one_ends() -> None:
    inside, may_end, found = threading.Event(), threading.Event(), []

    def work() -> None:
        with plain_arithmetic():
            inside.set()
            may_end.wait(60)
            found.append(torch.get_default_dtype())

    with default_dtype(torch.float64):
        worker = threading.Thread(target=work)
        with plain_arithmetic():
            worker.start()
            inside.wait(60)
        assert torch.get_default_dtype() == torch.float32, "the worker still computes"
        may_end.set()
        worker.join()
        assert torch.get_default_dtype() == torch.float64
    assert found == [torch.float32]


def test_an_interruption_of_the_end_does_not_leave_flags_behind() -> None:
    """A trace function raises before each line of the end, one line further every time.

    Not at a lock's own line, which is left once more at its end: no signal is heard between a block and its lock.
    """
    names = ("restore", "_put_back", "release")

    def run_until(stop_at: int) -> int:
        lines = []

        def trace(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code.co_name in names and frame.f_code.co_filename.endswith("arithmetic.py"):
                if event == "line" and "_lock" not in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
                    lines.append(frame.f_lineno)
                    if len(lines) == stop_at:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                return trace
            return None

        context = plain_arithmetic()
        context.__enter__()
        sys.settrace(trace)
        try:
            context.__exit__(None, None, None)
        finally:
            sys.settrace(None)
        return len(lines)

    with default_dtype(torch.float64):
        before = surroundings()
        total = run_until(0)
        assert total > 10
        for stop_at in range(2, total + 1):
            with pytest.raises(KeyboardInterrupt):
                run_until(stop_at)
            assert surroundings() == before, stop_at


@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="this torch has one precision for all")
def test_precisions_of_every_level_are_put_back_where_they_were() -> None:
    generic, matmul = torch.backends, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = generic.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]
    try:
        generic.fp32_precision, matmul.fp32_precision = "tf32", "none"  # type: ignore[attr-defined]
        with plain_arithmetic():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        generic.fp32_precision = "ieee"  # type: ignore[attr-defined]
        assert matmul.fp32_precision == "ieee", "what had no precision of its own still has none"
    finally:
        generic.fp32_precision, matmul.fp32_precision = before  # type: ignore[attr-defined]
