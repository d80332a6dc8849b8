"""The few operations that cost time, each on the fastest backend that is there.

Every operation exists as a float64 formula ("reference"), in torch, and where they were built as C++ ("cpp"),
Triton and CUDA kernels; this module alone chooses among them. Rows are samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.ops import checks
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.ops.rounding import check_rounding
from rocr.ops.system import Metric, apply_metric, require_finite, solve_weighted
from rocr.ops.torch_backend import MAXIMUM_TOKENS

BACKENDS = ("triton", "cpp", "torch", "cuda", "reference")
"""Every backend, the one to prefer first.

cuda comes behind torch: on an H200 Triton is faster in large work of every kind (README, "On a GPU"), and cuda's second
moment is for compute capability 9.0 and 16-bit keys alone.
"""

SMALL_PRODUCT = 1.6e11
"""Operations of keysᵀ keys, on a GPU, below which cuBLAS is done before half a product saves what Triton's start costs.

On an H200: 8192 x 1536 0.14 ms against 0.23, 8192 x 3072 0.27 against 0.43, but 8192 x 4096 0.40 against 0.37.
"""

SMALL_PRODUCTS = 2
"""Most products, of 8,192 tokens each, that cuBLAS is given one after the other; three take it as long as Triton."""

SYMMETRIZED_ROWS = 1024
"""Rows that are mirrored at once: whole, three more matrices of the same size would be held."""


class Backend(Protocol):
    """What a module rocr.ops.*_backend offers; its operands are checked already."""

    def is_available(self, device: torch.device) -> bool:
        """Whether the backend is built, and runs on the device."""
        ...

    def accumulate_second_moment(self, total: Tensor, keys: Tensor) -> None:
        """Add keysᵀ keys to the lower triangle of total; keys have unit stride along a row."""
        ...

    def low_rank_update(
        self,
        weights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        scale: float,
        rounding: str,
        seed: int,
    ) -> None:
        """Add scale * left @ right to each weight; factors are float32 and contiguous."""
        ...


@runtime_checkable
class LayersBackend(Protocol):
    """What a backend offers that computes several layers at a time."""

    def accumulate_second_moments(self, totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Add keysᵀ keys to the lower triangle of each total."""
        ...


def available_backends(device: str | torch.device) -> list[str]:
    """Names of the backends that run on the device here, the one to prefer first."""
    device = torch.device(device)
    return [name for name in BACKENDS if (backend := _load(name)) and backend.is_available(device)]


@plain_arithmetic()
def accumulate_second_moment(total: Tensor, keys: Tensor, backend: str | None = None) -> Tensor:
    """Add keysᵀ keys to the lower triangle of total, in place; the rest of total is left as it is.

    Args:
        total: (d, d), float32: a running sum over any number of calls.
        keys: (t, d), float32, bfloat16 or float16, on the same device; no accumulator
            holds more than 8,192 tokens.
        backend: one of available_backends(device), or None for the fastest.

    Returns:
        total itself.

    Raises:
        InputError: a dtype, shape, device or backend that does not fit, or memory shared by the operands.
    """
    checks.check_second_moment(total, keys)
    chosen = _choose(second_moment_backend([keys]) if backend is None else backend, total.device)
    if not total.numel() or not keys.numel():
        return total
    with writing(total):
        chosen.accumulate_second_moment(total, _with_rows(keys))
    return total


@plain_arithmetic()
def accumulate_second_moments(totals: Sequence[Tensor], keys: Sequence[Tensor], backend: str | None = None) -> None:
    """Do accumulate_second_moment for several layers; on a GPU, layers of one shape share a launch.

    Args:
        totals: one (d, d) for each layer.
        keys: one (t, d) for each total.
        backend: one of available_backends(device), or None for the fastest.

    Raises:
        InputError: as accumulate_second_moment does, or a total that occurs twice.
    """
    checks.check_second_moments(totals, keys)
    layers = [(total, _with_rows(each)) for total, each in zip(totals, keys, strict=True) if each.numel()]
    if not layers:
        return
    if backend is None:
        backend = second_moment_backend([each for _, each in layers])
    chosen = _choose(backend, layers[0][0].device)
    with writing(*totals):
        if isinstance(chosen, LayersBackend):
            chosen.accumulate_second_moments([total for total, _ in layers], [each for _, each in layers])
            return
        for total, each in layers:
            chosen.accumulate_second_moment(total, each)


def second_moment_backend(keys: Sequence[Tensor]) -> str | None:
    """Name the backend for the second moments of some layers' keys: torch for cuBLAS; None for the first that runs."""
    if keys[0].device.type != "cuda" or any(each.dtype == torch.float32 for each in keys):
        return None
    operations = sum(2.0 * each.shape[0] * each.shape[1] ** 2 for each in keys)
    products = sum(-(-each.shape[0] // MAXIMUM_TOKENS) for each in keys)
    return "torch" if operations < SMALL_PRODUCT and products <= SMALL_PRODUCTS else None


@plain_arithmetic()
def symmetrize(total: Tensor) -> Tensor:
    """Copy the lower triangle of total (d, d) over its upper one, in place, and return total."""
    checks.check_square("total", total)
    with writing(total):
        for start in range(0, len(total), SYMMETRIZED_ROWS):
            stop = start + SYMMETRIZED_ROWS
            block = total[start:stop, start:stop]
            is_lower = torch.ones_like(block, dtype=torch.bool).tril_()
            block.copy_(torch.where(is_lower, block, block.T))
            total[start:stop, stop:] = total[stop:, start:stop].T
    return total


@plain_arithmetic()
def low_rank_update(
    weights: Tensor | Sequence[Tensor],
    lefts: Tensor | Sequence[Tensor],
    rights: Tensor | Sequence[Tensor],
    scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """Add scale * left @ right to every weight, in place, in float32 with one rounding to the weight's dtype.

    Args:
        weights: matrices (d_out, d_in), float32, bfloat16 or float16, or one; transposed
            views are fine.
        lefts: one (d_out, n) for each weight, floating point, used as float32.
        rights: one (n, d_in) for each weight.
        scale: a finite factor.
        rounding: "nearest" (ties to even), or "stochastic": to one of the two neighbours, right on average.
        seed: of stochastic rounding; same operands, seed and backend, same bytes.
        backend: one of available_backends(device), or None for the fastest.

    Raises:
        InputError: a dtype, shape, device, number or backend that does not fit, or memory used twice.
    """
    weights, lefts, rights = ([each] if isinstance(each, Tensor) else each for each in (weights, lefts, rights))
    checks.check_low_rank_update(weights, lefts, rights)
    check_rounding(rounding, seed)
    if not abs(scale) < float("inf"):
        raise InputError(f"scale is {scale}, but must be finite.")
    if not weights:
        return
    chosen = _choose(backend, weights[0].device)
    lefts = [left.float().contiguous() for left in lefts]
    rights = [right.float().contiguous() for right in rights]
    with writing(*weights):
        chosen.low_rank_update(weights, lefts, rights, scale, rounding, seed)


@plain_arithmetic()
def solve_update(
    keys: Tensor, residuals: Tensor, metric: Tensor | Metric | None, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return the factors of Δ = residualsᵀ (K M Kᵀ + λ I)⁻¹ K M, solved as an (n, n) system in float64.

    It is the authors' (d_in, d_in) solve pushed through to (n, n): Ye, Zhang and Wu, arXiv 2506.07795.

    Args:
        keys: K (n, d_in), floating point.
        residuals: (n, d_out): what the weight's output at each key is to gain.
        metric: M: None for the identity, a dense symmetric (d_in, d_in), or an object with apply(keys).
        ridge: λ >= 0, in units of a squared key norm; 0 only where the keys are independent under M.

    Returns:
        left (d_out, n) and right (n, d_in) with Δ = left @ right, in the dtype of keys, float32 at least.

    Raises:
        InputError: shapes, dtypes or ridge that do not fit, a metric that is not symmetric, or a CUDA graph's capture.
        GuardError: numbers that are not finite, or a system too close to singular.
    """
    checks.check_solve(keys, residuals, ridge)
    if keys.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "solve_update cannot be captured in a CUDA graph: it waits for the device to check its numbers."
        )
    require_finite("keys", keys)
    require_finite("residuals", residuals)
    weighted_keys = apply_metric(metric, keys)
    require_finite("keys @ metric", weighted_keys)
    left, right, _ = solve_weighted(keys, residuals, weighted_keys, ridge)
    return left, right


def _with_rows(keys: Tensor) -> Tensor:
    """Return keys whose rows lie one after the other, each in one piece."""
    has_rows = keys.stride(1) == 1 and (keys.stride(0) >= keys.shape[1] or keys.shape[0] == 1)
    return keys if has_rows else keys.contiguous()


def _load(name: str) -> Backend | None:
    """Import a backend's module, or return None where it is not part of this installation."""
    module = "rocr.ops.reference" if name == "reference" else f"rocr.ops.{name}_backend"
    try:
        backend: Backend = importlib.import_module(module)  # type: ignore[assignment]
    except ImportError:
        return None
    return backend


def _choose(name: str | None, device: torch.device) -> Backend:
    """Return the named backend, or the fastest one, for the device."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"There is no backend {name!r}; rocr has {', '.join(BACKENDS)}.")
    for candidate in BACKENDS if name is None else (name,):
        backend = _load(candidate)
        if backend and backend.is_available(device):
            return backend
    raise InputError(
        f"The backend {name!r} cannot run on {device} here; available are {', '.join(available_backends(device))}."
    )
