"""The Triton kernels that move everything through pointers, compiled for AMD GPUs, which need not be there.

Nothing here runs them: no AMD GPU was at hand.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rocr_kernels import low_rank_update, second_moment, support_solve
from rocr_kernels._common import POINTERS_ONLY
from rocr_kernels.grouped_second_moment import accumulate_grouped_second_moment
from rocr_kernels.low_rank_update import LowRankPlan
from rocr_kernels.second_moment import accumulate_second_moments

from tests.support.kernel_launches import Launch, compile_launch, record_launches

pytestmark = pytest.mark.thorough

SHARED_BYTES = 65_536
"""Shared memory (LDS) of a program on gfx90a and gfx942 (AMD CDNA 3 instruction set architecture, section 2)."""

CHIPS = ("gfx942", "gfx90a")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    for module in (second_moment, low_rank_update):
        monkeypatch.setattr(module, "capability", lambda _: POINTERS_ONLY)
    return record_launches(monkeypatch, "hip")


def check(launch: Launch, chip: str) -> Any:
    """Compile a launch; check that it fits, that nothing is spilled to memory, and that no option is NVIDIA's."""
    kernel, arguments = launch
    assert "maxnreg" not in arguments
    compiled = compile_launch(kernel, arguments, chip)
    assert compiled.metadata.shared <= SHARED_BYTES
    code = compiled.asm["amdgcn"]
    assert re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code) == ["0"]
    assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", code) == ["0"]
    return compiled


def adds_outside_of_products(compiled: Any) -> bool:
    """Whether the sum of products goes through the move that keeps it out of the matrix units."""
    return re.search(r"tt\.elementwise_inline_asm \"v_mov_b32", compiled.asm["ttgir"]) is not None


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("dtype", "width"), [(BFLOAT16, 1536), (BFLOAT16, 123), (FLOAT32, 1536)], ids=str)
def test_second_moments_fit(launches: list[Launch], dtype: torch.dtype, width: int, chip: str) -> None:
    accumulate_second_moments([torch.empty(width, width)] * 2, [torch.empty(4096, width, dtype=dtype)] * 2)
    assert "add_second_moments_tma" not in {kernel.__name__ for kernel, _ in launches}
    for launch in launches:
        compiled = check(launch, chip)
        if launch[0].__name__ == "add_second_moments_pointers":
            assert "v_mfma_f32" in compiled.asm["amdgcn"]
            assert adds_outside_of_products(compiled) == (dtype == FLOAT32)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_grouped_second_moments_fit(launches: list[Launch], dtype: torch.dtype, chip: str) -> None:
    keys = torch.empty(8192, 1536, dtype=dtype)
    accumulate_grouped_second_moment(torch.empty(3, 1536, 1536), keys, [0, 100, 100, 8192])
    assert launches
    for launch in launches:
        check(launch, chip)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("dtype", "rank", "stochastic"),
    [
        (BFLOAT16, 16, False),
        (BFLOAT16, 32, True),
        (BFLOAT16, 128, False),
        (torch.float16, 16, True),
        (BFLOAT16, 128, True),
        (FLOAT32, 16, False),
        (FLOAT32, 128, False),
    ],
    ids=str,
)
def test_low_rank_updates_fit(
    launches: list[Launch], dtype: torch.dtype, rank: int, stochastic: bool, chip: str
) -> None:
    weights = [torch.empty(4096, 1536, dtype=dtype)] * 2
    lefts, rights = [torch.empty(4096, rank)] * 2, [torch.empty(rank, 1536)] * 2
    LowRankPlan(weights, lefts, rights).run(0.5, stochastic, 1 << 40)
    assert launches
    for launch in launches:
        compiled = check(launch, chip)
        if launch[0].__name__.startswith("add_low_rank"):
            assert "v_mfma_f32" in compiled.asm["amdgcn"]
            assert adds_outside_of_products(compiled) == (dtype == FLOAT32 and rank > 32)


@pytest.mark.parametrize("chip", CHIPS)
def test_sums_and_systems_of_rows_fit(launches: list[Launch], chip: str) -> None:
    keys = torch.empty(8, 1536)
    support_solve.products_on_support(torch.empty(4096, 1536, dtype=BFLOAT16), keys, keys)
    support_solve.solve_products(torch.empty(4096, 8, 8), torch.empty(4096, 8), 0.5)
    assert len(launches) == 2
    for launch in launches:
        check(launch, chip)
