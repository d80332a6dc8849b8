"""Measure the peak of float32 multiply-adds of an instruction set, by a compiled loop on registers alone."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("fma_peak.c")

OPTIONS = {
    "avx512": ["-mavx512f", "-mfma", "-DWIDTH=16", '-DREGISTER="v"'],
    "avx2": ["-mavx2", "-mfma", "-DWIDTH=8", '-DREGISTER="x"'],
    "neon": ["-DWIDTH=4", '-DREGISTER="w"'],
}
"""Options of the compiler; other instruction sets have no peak of multiply-adds that a second moment is held to."""

STEPS = 500_000
ROUNDS = 20


def measure(instruction_set: str, threads: int) -> float | None:
    """Return the peak in GFLOP/s of all threads together, the best of some rounds.

    Args:
        instruction_set: A key of `OPTIONS`.
        threads: Threads that run the loop at the same time.

    Returns:
        None for another instruction set, or without a compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("cc")
    if instruction_set not in OPTIONS or not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        options = ["-O2", "-ffp-contract=fast", "-shared", "-fPIC", *OPTIONS[instruction_set]]
        subprocess.run([*compiler.split(), *options, str(SOURCE), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
        loaded.multiply_add.argtypes, loaded.multiply_add.restype = [ctypes.c_long], ctypes.c_float
        loaded.operations.argtypes, loaded.operations.restype = [ctypes.c_long], ctypes.c_long
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the lock of Python while a function runs
            seconds = min(_seconds(pool, loaded, threads) for _ in range(ROUNDS))
        return threads * int(loaded.operations(STEPS)) / seconds / 1e9


def _seconds(pool: ThreadPoolExecutor, loaded: ctypes.CDLL, threads: int) -> float:
    start = time.perf_counter()
    list(pool.map(loaded.multiply_add, [STEPS] * threads))
    return time.perf_counter() - start
