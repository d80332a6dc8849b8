"""Benches of the kernels: second moments and low-rank updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpu_timing import Row, Times, fastest, graph, interleave, relative_error
from torch import Tensor

from rocr import ops

CHECKED_COLUMNS = 64
"""Columns of a second moment that are compared with float64; all columns would take longer than the timing."""

WIDE_TILE = 256
"""Side of the square output blocks of rocr's kernels for widths of at least 1,024; diagonal blocks are full too."""

BUSIER_EXPERTS = 0.8
"""Exponent of the Zipf law by which tokens are spread over experts."""

MOMENT_BACKENDS = ("triton", "cuda")
UPDATE_BACKENDS = ("triton",)
TORCH_UPDATES = ("addmm_", "addcmul_")
"""Torch's expressions of an update; the second is for rank 1 only, and its factors are float32."""


def own_backends(device: torch.device, names: Sequence[str] = MOMENT_BACKENDS) -> list[str]:
    """Return those of rocr's kernels that run on the device, or "torch" if there are none, as on the CPU."""
    return [name for name in ops.available_backends(device) if name in names] or ["torch"]


def add_by_torch(total: Tensor, keys: Tensor) -> None:
    """Add a second moment by the fastest torch expression: 16-bit operands and a float32 sum in place."""
    if keys.is_cuda:
        torch.addmm(total, keys.T, keys, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(keys.T.float(), keys.float())


def moment_error(total: Tensor, keys: Tensor) -> float:
    """Return the relative error of the second moment of keys, in the lower triangle of CHECKED_COLUMNS columns."""
    width = total.shape[0]
    columns = torch.randperm(width, device=total.device)[:CHECKED_COLUMNS]
    exact = torch.zeros(width, len(columns), dtype=torch.float64, device=total.device)
    for tokens in keys.split(16384):
        exact += tokens.double().T @ tokens[:, columns].double()
    lower = torch.arange(width, device=total.device)[:, None] >= columns
    return relative_error(total[:, columns] * lower, exact * lower)


def second_moment(device: torch.device, tokens: int, width: int, rounds: int) -> list[Row]:
    """Time one layer against torch's 16-bit product and against the float32 product of ROCR's authors."""
    keys = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    wide_keys = keys.float()
    own = own_backends(device)
    names = [*own, "addmm", "float32", "tf32"]
    totals = {name: torch.zeros(width, width, device=device) for name in names}

    def add_in_float32(name: str, allow_tf32: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        totals[name] += wide_keys.T @ wide_keys

    functions: dict[str, Callable[[int], object]] = {
        name: lambda _, name=name: ops.accumulate_second_moment(totals[name], keys, backend=name) for name in own
    }
    functions["addmm"] = lambda _: add_by_torch(totals["addmm"], keys)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10:
        functions |= {"triton, specialized": lambda _: _add_specialized(totals["addmm"], keys)}
    functions["float32"] = lambda _: add_in_float32("float32", False)
    functions["tf32"] = lambda _: add_in_float32("tf32", True)
    errors = {}
    for name, function in functions.items():
        totals[name].zero_()
        function(0)
        errors[name] = moment_error(totals[name], keys)
    times = interleave(functions, device, rounds, few=("float32", "tf32"))
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = _moment_rates(times, names, own, tokens, width)
    ours = fastest(times, own)
    size = f"{tokens} x {width}, bfloat16"
    return [
        Row("second moment", size, times, ours, "addmm", 1.5, 1.8, errors, rate),
        Row("second moment, official", size, times, ours, "float32", 18, 25, errors, rate),
    ]


def _add_specialized(total: Tensor, keys: Tensor) -> None:
    """Add a second moment by the Triton configuration for compute capability 10 that ops does not choose."""
    from rocr_kernels.second_moment import CONFIGS, accumulate_second_moments

    accumulate_second_moments([total], [keys], CONFIGS["tma_specialized"])


def second_moments(device: torch.device, tokens: int, width: int, layers: int, rounds: int) -> list[Row]:
    """Time several layers in one call against a loop of torch products in a CUDA graph."""
    keys = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    own = own_backends(device)
    totals = {name: [torch.zeros(width, width, device=device) for _ in keys] for name in [*own, "addmm"]}

    def loop() -> None:
        for total, each in zip(totals["addmm"], keys, strict=True):
            add_by_torch(total, each)

    replay = graph(loop, device)
    functions: dict[str, Callable[[int], object]] = {
        name: lambda _, name=name: ops.accumulate_second_moments(totals[name], keys, backend=name) for name in own
    }
    functions["addmm"] = lambda _: replay()
    errors = {}
    for name, function in functions.items():
        for total in totals[name]:
            total.zero_()
        function(0)
        errors[name] = max(moment_error(total, each) for total, each in zip(totals[name], keys, strict=True))
    times = interleave(functions, device, rounds)
    rate = _moment_rates(times, list(functions), own, layers * tokens, width)
    size = f"{layers} x ({tokens} x {width}), bfloat16"
    return [Row("second moments in one call", size, times, fastest(times, own), "addmm", 1.2, 2.0, errors, rate)]


def small_second_moment(device: torch.device, tokens: int, width: int, rounds: int) -> list[Row]:
    """Time a product for which ops chooses cuBLAS: the chosen backend and every kernel against addmm."""
    keys = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    backends: dict[str, str | None] = {"chosen": None, "torch": "torch"} | {name: name for name in own_backends(device)}
    totals = {name: torch.zeros(width, width, device=device) for name in [*backends, "addmm"]}
    functions: dict[str, Callable[[int], object]] = {
        name: lambda _, name=name, backend=backend: ops.accumulate_second_moment(totals[name], keys, backend=backend)
        for name, backend in backends.items()
    }
    functions["addmm"] = lambda _: add_by_torch(totals["addmm"], keys)
    errors = {}
    for name, function in functions.items():
        totals[name].zero_()
        function(0)
        errors[name] = moment_error(totals[name], keys)
    times = interleave(functions, device, rounds)
    note = "no ratio is required: ops.SMALL_PRODUCT is set by this row"
    return [
        Row("small second moment", f"{tokens} x {width}, bfloat16", times, "chosen", "addmm", 0, 1, errors, {}, note)
    ]


def grouped_second_moment(
    device: torch.device, tokens: int, experts: int, active: int, width: int, rounds: int
) -> list[Row]:
    """Time the experts of a layer in one call against a loop of torch products, as a router might spread tokens.

    Args:
        device: Device to run on.
        tokens: Number of tokens, each of which is routed to several experts.
        experts: Number of experts.
        active: Number of experts of a token.
        width: Width of the keys.
        rounds: Number of rounds.
    """
    shares = torch.arange(1, experts + 1).double() ** -BUSIER_EXPERTS
    sizes = (tokens * active * shares / shares.sum()).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    keys = torch.randn(int(offsets[-1]), width, device=device, dtype=torch.bfloat16)
    own = [name for name in own_backends(device) if name != "cuda"]
    totals = {name: torch.zeros(experts, width, width, device=device) for name in [*own, "addmm"]}

    def loop() -> None:
        for total, own_keys in zip(totals["addmm"], keys.split(sizes.tolist()), strict=True):
            if len(own_keys):
                add_by_torch(total, own_keys)

    replay = graph(loop, device)
    functions: dict[str, Callable[[int], object]] = {
        name: lambda _, name=name: ops.accumulate_grouped_second_moment(totals[name], keys, offsets, name)
        for name in own
    }
    functions["addmm"] = lambda _: replay()
    errors = {}
    for name, function in functions.items():
        totals[name].zero_()
        function(0)
        errors[name] = moment_error(totals[name][0], keys[: offsets[1]])
    times = interleave(functions, device, rounds)
    rate = {
        f"{name} TFLOP/s in the triangles": width * (width + 1) * len(keys) / times[name].median / 1e12
        for name in times
    }
    size = f"{experts} experts, {tokens} tokens to {active} each, keys of {width}, bfloat16"
    note = "the error is that of the expert with the most tokens; the loop is in a CUDA graph"
    ours = fastest(times, own)
    return [Row("second moments of experts", size, times, ours, "addmm", 1.0, 1.5, errors, rate, note)]


def _moment_rates(
    times: dict[str, Times], names: Sequence[str], own: Sequence[str], tokens: int, width: int
) -> dict[str, float]:
    """Return TFLOP/s of the products in the triangle, and for rocr's kernels of all products that they execute."""
    wanted = width * (width + 1) * tokens
    rates = {f"{name} TFLOP/s in the triangle": wanted / times[name].median / 1e12 for name in names}
    blocks = -(-width // WIDE_TILE)
    executed = blocks * (blocks + 1) * WIDE_TILE**2 * tokens
    return rates | {f"{name} TFLOP/s executed": executed / times[name].median / 1e12 for name in own}


def low_rank_update(
    device: torch.device,
    layers: int,
    shape: tuple[int, int],
    rank: int,
    rounds: int,
    bounds: tuple[float, float],
    sets: int = 1,
) -> list[Row]:
    """Time the updates of all layers in one call against a loop of torch's expressions in a CUDA graph.

    The baseline is the faster one of `addmm_` with bfloat16 factors and, for rank 1, `addcmul_` with float32 factors.

    Args:
        device: Device to run on.
        layers: Number of weights.
        shape: Shape (d_out, d_in) of a weight.
        rank: Rank of an update.
        rounds: Number of rounds.
        bounds: Required and hoped-for ratio; see `Row`.
        sets: Number of copies of the weights; rounds use them in turn, so that none is in the L2 cache.
    """
    rows, columns = shape
    scale = 2.0**-10
    weights = torch.randn(sets, layers, rows, columns, device=device, dtype=torch.bfloat16)
    lefts = list(torch.randn(layers, rows, rank, device=device))
    rights = list(torch.randn(layers, rank, columns, device=device))
    narrow_lefts, narrow_rights = [each.bfloat16() for each in lefts], [each.bfloat16() for each in rights]
    own = own_backends(device, UPDATE_BACKENDS)
    baselines = TORCH_UPDATES if rank == 1 else TORCH_UPDATES[:1]
    checked = {name: _check_update(name, weights[0, 0], lefts[0], rights[0], scale) for name in [*own, *baselines]}
    errors = {name: error for name, (error, _) in checked.items()}
    # Each layer needs its own storage, because ops refuses weights that share one.
    layers_of_sets = [[weight.clone() for weight in each] for each in weights]

    factors = {"addmm_": (narrow_lefts, narrow_rights), "addcmul_": (lefts, rights)}

    def loop(name: str, own_weights: list[Tensor]) -> None:
        for weight, left, right in zip(own_weights, *factors[name], strict=True):
            _add_by_torch(name, weight, left, right, scale)

    replays = {
        name: [graph(lambda name=name, each=each: loop(name, each), device) for each in layers_of_sets]
        for name in baselines
    }
    functions: dict[str, Callable[[int], object]] = {
        name: lambda number, name=name: ops.low_rank_update(
            layers_of_sets[number % sets], lefts, rights, scale=scale, backend=name
        )
        for name in own
    }
    functions |= {name: lambda number, name=name: replays[name][number % sets]() for name in baselines}
    if "triton" in own:
        from rocr_kernels.low_rank_update import LowRankPlan

        plans = [LowRankPlan(each, lefts, rights) for each in layers_of_sets]
        planned = [graph(lambda plan=plan: plan.run(scale, False, 0), device) for plan in plans]
        functions["triton in a graph"] = lambda number: planned[number % sets]()
    target = torch.empty_like(weights[0])
    functions["copy"] = lambda number: target.copy_(weights[number % sets])
    times = interleave(functions, device, rounds)
    bytes_moved = 2 * weights[0].nbytes
    rate = {f"{name} GB/s": bytes_moved / times[name].median / 1e9 for name in functions}
    rate |= {
        f"{name} share of numbers that are not the exact ones rounded": share for name, (_, share) in checked.items()
    }
    ours = fastest(times, [name for name in functions if name not in (*baselines, "copy")])
    baseline = fastest(times, baselines)
    rate["share of the copy's bandwidth"] = times["copy"].median / times[ours].median
    size = f"{layers} x ({rows} x {columns}), n = {rank}, bfloat16"
    note = "addmm_ rounds its factors to bfloat16"
    return [Row("low-rank update", size, times, ours, baseline, *bounds, errors, rate, note)]


def _add_by_torch(name: str, weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if name == "addcmul_":
        weight.addcmul_(left, right, value=scale)
    else:
        weight.addmm_(left, right, alpha=scale)


def _check_update(name: str, start: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[float, float]:
    """Return the relative error of a weight after one update, and the share of its numbers that are rounded wrongly.

    Most of the error is the rounding of the weight to bfloat16.
    """
    exact = start.double() + scale * (left.double() @ right.double())
    weight = start.clone()
    if name == "addmm_":
        _add_by_torch(name, weight, left.bfloat16(), right.bfloat16(), scale)
    elif name == "addcmul_":
        _add_by_torch(name, weight, left, right, scale)
    else:
        ops.low_rank_update(weight, left, right, scale=scale, backend=name)
    return relative_error(weight, exact), (weight != exact.to(weight.dtype)).double().mean().item()
