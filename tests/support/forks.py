"""Processes of their own that need not start Python and import torch and transformers again, which takes seconds."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def start_fork(script: str, arguments: Sequence[object], log: Path, environment: Mapping[str, str] = {}) -> int:
    """Run a script in a fork of this process as `python -c` runs it.

    Args:
        script: Python code.
        arguments: What it finds in `sys.argv`.
        log: What it prints.
        environment: Variables of its environment besides those of this process.

    Returns:
        The number of the process. It ends with 0, with what the script gives to `sys.exit`, or with 1 after another
        exception, whose traceback is printed.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        # As in a new process, not as pytest sets them; and threads of the parent are not in the child.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        torch.set_num_threads(1)
        os.environ.update(environment)
        sys.argv = ["-c", *map(str, arguments)]
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int) -> int:
    """Wait until a process ends; returns its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
