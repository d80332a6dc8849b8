"""Inputs and digests of the golden tests: numbers from a formula, and every implementation that runs here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rocr.config import RENAMED
from rocr.model.fingerprint import tensor_digest
from rocr.ops.cpp_backend import SIMD_VARIABLE, is_available, simd_names

MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407
"""Of a linear congruential generator modulo 2**64 (Knuth, MMIX)."""


def formula(stream: int, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Return integers from low to high in float32 that depend on no library's generator."""
    with np.errstate(over="ignore"):
        index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) + np.uint64(stream) * np.uint64(2**32)
        mixed = (index * np.uint64(MULTIPLIER) + np.uint64(INCREMENT)) >> np.uint64(33)
        mixed = (mixed * np.uint64(MULTIPLIER) + np.uint64(INCREMENT)) >> np.uint64(40)
    numbers = (mixed % np.uint64(high - low + 1)).astype(np.int64) + low
    return torch.from_numpy(numbers.reshape(shape)).float()


@pytest.fixture(scope="session", name="formula")
def _formula() -> Callable[..., Tensor]:
    return formula


@pytest.fixture(scope="session")
def instruction_sets() -> list[str]:
    """Those of the compiled kernels that run here; none where they were not compiled."""
    return simd_names() if is_available(torch.device("cpu")) else []


def joint_digest(tensors: Iterable[Tensor]) -> str:
    """sha256 over the digests of tensors."""
    return hashlib.sha256("".join(map(tensor_digest, tensors)).encode()).hexdigest()


@pytest.fixture(scope="session", name="joint_digest")
def _joint_digest() -> Callable[..., str]:
    return joint_digest


@pytest.fixture
def by_simd(monkeypatch: pytest.MonkeyPatch, instruction_sets: list[str]) -> Callable[..., dict[str, Any]]:
    """by_simd(function, names): its result with each of the instruction sets that run here."""

    def run(function: Callable[[], Any], names: Sequence[str] = ()) -> dict[str, Any]:
        if not instruction_sets:
            pytest.skip("the extension was not compiled")
        found = {}
        for name in instruction_sets:
            if not names or name in names:
                monkeypatch.setenv(SIMD_VARIABLE, name)
                found[name] = function()
        return found

    return run


def with_names_of_0_1(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an edit file under the names that the digests were recorded with."""
    old = {new.name: (name, new) for name, new in RENAMED.items()}
    return {
        old[name][0] if name in old else name: old[name][1].old_value(value) if name in old else value
        for name, value in config.items()
    }


@pytest.fixture(scope="session")
def contents_digest() -> Callable[[str | os.PathLike[str]], str]:
    """contents_digest(path): sha256 over what a file of rocr's says, or a PEFT adapter.

    Headers and tensors, not the bytes of the container: how safetensors lays them out is its own affair, and how well
    zlib packs what undoes an edit is zlib's. Settings are hashed under the names that they had in rocr 0.1.
    """

    def digest(path: str | os.PathLike[str]) -> str:
        found = hashlib.sha256()
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata().get("rocr", "{}"))
            if "config" in header:
                header["config"] = with_names_of_0_1(header["config"])
            found.update(json.dumps(header, sort_keys=True).encode())
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                if not name.endswith(".undo"):
                    found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} {tensor_digest(tensor)}".encode())
        beside = Path(path).with_name("adapter_config.json")
        if beside.is_file():
            found.update(json.dumps(json.loads(beside.read_text(encoding="utf-8")), sort_keys=True).encode())
        return found.hexdigest()

    return digest


@dataclass(frozen=True)
class Update:
    """A low-rank update of two weights whose sums float32 holds exactly and 16 bits do not.

    Attributes:
        digest: of the weights afterwards, rounded at random by the bits of Philox, as all kernels for GPUs draw them.
    """

    dtype: torch.dtype
    weights: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    scale: float
    seed: int
    digest: str


PHILOX = {
    "bfloat16": "96c9b86a06819947b37fc0c7b0efcff374343ed92bd251e6bc57ce2b3d3a82b3",
    "float16": "cd23c0383d1510771b96a9581aa5bd6c09946d8eb3af4d8f5797ce0adba3736e",
}


@pytest.fixture(params=list(PHILOX))
def philox_update(request: pytest.FixtureRequest) -> Update:
    dtype = getattr(torch, request.param)
    weights = [formula(10 + i, (40, 72), -64, 64).to(dtype) / 64 for i in range(2)]
    lefts = [formula(12 + i, (40, 5), -8, 8) for i in range(2)]
    rights = [formula(14 + i, (5, 72), -8, 8) for i in range(2)]
    return Update(dtype, weights, lefts, rights, 2.0**-13, 2**40 + 3, PHILOX[request.param])
