"""The largest memory from one moment on."""

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
    """The largest memory since it was made: of the GPU where the model is on one, else of the process.

    The peak that the system reports of a process never falls by itself, so what ran before would count. Linux sets
    it back to what is in use on request (proc(5), clear_refs); elsewhere the peak is that of the process so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed, but not given back, is in use to the system
        with suppress(OSError):
            _CLEAR_REFS.write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
            if found:
                return int(found[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
