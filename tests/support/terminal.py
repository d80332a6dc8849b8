"""A real process on a real terminal: lines are typed, and what it draws is read."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
SECONDS = 60.0
SILENT = 10.0
"""Seconds until a wait for what is not drawn is woken, once: readline then draws its line anew."""


class Terminal:
    """`python -m rocr` with some words on a terminal of a size.

    Attributes:
        process: the process.
        text: all that was drawn, with its control sequences.
    """

    def __init__(self, words, columns=100, rows=40, **environment):
        self._master, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.text = ""
        variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rocr", *map(str, words)],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**variables, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            cwd=os.getcwd(),
        )
        os.close(child)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text):
        """Type some characters, such as a line or "\\x03" for Ctrl-C."""
        os.write(self._master, text.encode())

    def until(self, pattern, start=0):
        """Read until what was drawn from a place on has a pattern; the text from that place on."""
        deadline, wake_at = time.monotonic() + SECONDS, time.monotonic() + SILENT
        while re.search(pattern, self.plain(start)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.plain(start)[-3000:]!r}"
            if not self._read(0.5) and self.process.poll() is not None and not self._read(0.1):
                raise AssertionError(f"it ended without {pattern!r}: {self.plain(start)[-3000:]!r}")
            if time.monotonic() > wake_at:
                self._wake()
                wake_at = deadline
        return self.plain(start)

    def ended(self):
        """Read until the process ends; its exit code."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.plain(0)[-3000:]
            self._read(0.5)
            self._wake()
        while self._read(0.1):
            pass
        return self.process.returncode

    def plain(self, start):
        """What was drawn from a place on, without control sequences."""
        return SEQUENCE.sub("", self.text[start:]).replace("\r\n", "\n").replace("\r", "")

    def _wake(self):
        """End readline's wait for a key: a signal between the prompt and the wait is seen by Python only then."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGWINCH)  # the size is as before

    def _read(self, seconds):
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.text += data.decode(errors="replace")
        return bool(data)
