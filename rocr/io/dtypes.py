"""The dtypes of tensors: which ones rocr computes with, and how safetensors files name them.

A dtype is called by torch's name without the prefix, such as "bfloat16". The tables do not need torch, so that the
command line can show them before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes of weights that can be edited, and of keys."""
STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
}
"""The dtypes that are read from safetensors files, by their names in these files."""
BYTE_KINDS = {"F8_E8M0": "uint8"}
"""Kinds that are read as their bytes, with their shape: torch before 2.7 lacks the dtype of scales in e8m0."""
SUPPORTED_KINDS = {kind: name for kind, name in STORED_DTYPES.items() if name in SUPPORTED_DTYPES}
"""Of these, the ones that can be edited."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, such as torch.bfloat16 for "bfloat16"."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def is_supported(dtype: torch.dtype) -> bool:
    """Return whether weights of a dtype can be edited and keys of it can be read."""
    return dtype_name(dtype) in SUPPORTED_DTYPES
