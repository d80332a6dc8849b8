"""Measure peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The peak memory since the construction of this object: of the model's GPU, or else of the process.

    The system's peak of a process includes everything that ran before. Linux resets it to the memory in use on request
    (proc(5), clear_refs); on other systems the peak is that of the whole run of the process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that is freed but not returned to the system counts as in use
        with suppress(OSError):
            _CLEAR_REFS.write_text("5")

    def bytes(self) -> int:
        """Return the peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
            if found:
                return int(found[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
