"""Time the second moments of the experts of a layer against a loop of torch's products, in the shape of a mixture."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch import Tensor

from rocr import ops

EXPERTS, ROUTED, WIDTH, TOKENS = 128, 8, 768, 16384
"""The shape of Qwen3-30B-A3B: experts of a layer, experts of a token, width of the keys; and the tokens of a batch."""

SKEW = 0.8
"""Exponent of the popularity of experts: the expert of rank r is drawn with a probability like r to the power -SKEW."""

ROUNDS = 5


def routed() -> Tensor:
    """Return the offsets of the rows of each expert, when each token is routed to ROUTED different experts."""
    draw = torch.Generator().manual_seed(0)
    popularity = torch.arange(1, EXPERTS + 1).pow(torch.tensor(-SKEW))[torch.randperm(EXPERTS, generator=draw)]
    experts = torch.multinomial(popularity.expand(TOKENS, -1), ROUTED, generator=draw)
    return torch.cat([torch.zeros(1, dtype=torch.int64), experts.flatten().bincount(minlength=EXPERTS).cumsum(0)])


def assert_right(keys: Tensor, offsets: Tensor) -> None:
    """Assert that 50 rows of the lower triangles of a few groups agree with float64."""
    totals = ops.accumulate_grouped_second_moment(torch.zeros(EXPERTS, WIDTH, WIDTH), keys, offsets)
    for group in (0, EXPERTS // 2, EXPERTS - 1):
        own, rows = keys[offsets[group] : offsets[group + 1]].double(), torch.randperm(WIDTH)[:50]
        exact = own[:, rows].T @ own
        lower = torch.arange(WIDTH) <= rows[:, None]
        error = ((totals[group, rows].double() - exact) * lower).norm() / (exact * lower).norm()
        assert error < 1e-6, f"relative error {error:.3g} of group {group}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_grouped_keys(compare: Compare, dtype: torch.dtype) -> None:
    offsets = routed()
    starts = offsets.tolist()
    keys, totals = torch.randn(starts[-1], WIDTH).to(dtype), torch.zeros(EXPERTS, WIDTH, WIDTH)
    assert_right(keys, offsets)

    def loop() -> None:
        for expert in range(EXPERTS):
            own = keys[starts[expert] : starts[expert + 1]].float()  # float32 keys are not copied
            totals[expert].addmm_(own.T, own)

    def rounded_loop() -> None:
        for expert in range(EXPERTS):
            own = keys[starts[expert] : starts[expert + 1]]
            totals[expert] += own.T @ own

    def calls() -> None:
        for expert in range(EXPERTS):
            ops.accumulate_second_moment(totals[expert], keys[starts[expert] : starts[expert + 1]])

    # torch adds no product of bfloat16 to a float32 sum.
    own = "H_e" if dtype == torch.float32 else "H_e.float()"
    baselines = {f"for e: C[e].addmm_({own}.T, {own})": loop, "for e: ops.accumulate_second_moment(C[e], H_e)": calls}
    if dtype == torch.bfloat16:
        baselines["for e: C[e] += H_e.T @ H_e, rounded to bfloat16"] = rounded_loop
    compare(
        lambda: ops.accumulate_grouped_second_moment(totals, keys, offsets),
        baselines,
        operation=f"accumulate_grouped_second_moment, {str(dtype).removeprefix('torch.')} keys",
        size=f"{starts[-1]} × {WIDTH} in {EXPERTS} groups",
        rounds=ROUNDS,
        operations=starts[-1] * WIDTH * (WIDTH + 1),
    )
