"""Run torch, NumPy and rocr with the instructions of one set, and say which of them a machine has."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy

from rocr.ops.cpp_backend import SIMD_VARIABLE, simd_names

SETTINGS = {
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
"""Environment of the libraries of each set that is not the best of every machine; without a name, they choose."""


def here(compiled: bool) -> list[str]:
    """Return the instruction sets to measure, the best first: the one in ROCR_SIMD, or all of the machine.

    Portable code is one of them only where it is all there is. Without compiled kernels, there is "none".
    """
    if not compiled:
        return ["none"]
    chosen = os.environ.get(SIMD_VARIABLE)
    names = simd_names()
    return [chosen] if chosen else names[:-1] or names


def environment(name: str) -> dict[str, str]:
    """Return the environment of a process in which all libraries are held to an instruction set."""
    names = {SIMD_VARIABLE, *(key for settings in SETTINGS.values() for key in settings)}
    free = {key: value for key, value in os.environ.items() if key not in names}
    return free | SETTINGS.get(name, {}) | ({} if name == "none" else {SIMD_VARIABLE: name})


def openblas_kernel() -> str:
    """Return the name of the kernels that NumPy's OpenBLAS chose in this process, or "unknown"."""
    folder = Path(numpy.__file__).parents[1] / "numpy.libs"
    for path in folder.glob("*openblas*.so*"):
        name = getattr(ctypes.CDLL(str(path)), "scipy_openblas_get_corename64_", None)
        if name is not None:
            name.restype = ctypes.c_char_p
            return str(name().decode())
    return "unknown"
