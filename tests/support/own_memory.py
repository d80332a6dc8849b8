"""The anonymous memory of a process, for scripts that tests run in processes of their own on Linux."""

import threading
from pathlib import Path

INTERVAL = 0.005


class OwnMemory:
    """A context that samples the anonymous memory of this process.

    Pages of files are left out: the system drops those of libraries that rest, and counts them anew when they are
    used again, the more so the busier the machine is.

    Attributes:
        peak: bytes above what there was at the beginning.
        read: bytes that the sampling itself has read.
    """

    def __enter__(self) -> "OwnMemory":
        self.peak = self.read = 0
        self._before = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.peak = max(self.peak, self._now() - self._before)

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        self.read += len(status)
        return 1024 * int(status.split("RssAnon:")[1].split()[0])
