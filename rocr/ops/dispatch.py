"""The expensive operations, dispatched to a backend.

Every operation is implemented as a float64 formula ("reference") and in torch, and, if they are built, as C++ ("cpp"),
Triton and CUDA kernels. This module chooses the backend. Rows are samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.ops import checks
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.ops.interfaces import Backend, GroupsBackend, LayersBackend, SupportBackend, UpdateBackend
from rocr.ops.rounding import check_rounding
from rocr.ops.system import Metric, apply_metric, require_finite, solve_weighted
from rocr.ops.torch_backend import MAXIMUM_TOKENS

BACKENDS = ("triton", "cpp", "torch", "cuda", "reference")
"""All backends, in order of preference.

cuda follows torch, so it is never chosen: it has the second moment of 16-bit keys only, and Triton's was faster on an
H200.
"""

AMD_BACKENDS = ("cpp", "torch", "triton", "reference")
"""The order of preference where torch runs on ROCm: Triton's kernels are compiled for AMD GPUs, but were never run."""

SMALL_PRODUCT = 1.6e11
"""Number of operations of keysᵀ keys on a GPU below which the full product of cuBLAS is faster than Triton.

Triton computes only the lower triangle, but its launch takes longer. On an H200, cuBLAS takes 0.14 ms against 0.23 ms
of Triton for keys of 8192 x 1536, 0.27 against 0.43 for 8192 x 3072, but 0.40 against 0.37 for 8192 x 4096.
"""

SMALL_PRODUCTS = 2
"""Maximum number of consecutive cuBLAS products of 8,192 tokens each; three take as long as Triton."""

SYMMETRIZED_ROWS = 1024
"""Number of rows that are mirrored at a time; mirroring a whole matrix needs three more of its size."""


def available_backends(device: str | torch.device) -> list[str]:
    """Return the names of the backends that run on a device, in order of preference.

    Args:
        device: A torch device or its name, such as "cpu" or "cuda".

    Returns:
        Names among "triton", "cpp", "torch", "cuda" and "reference".
    """
    device = torch.device(device)
    return [name for name in _preference() if (backend := _load(name)) and backend.is_available(device)]


@plain_arithmetic()
def accumulate_second_moment(total: Tensor, keys: Tensor, backend: str | None = None) -> Tensor:
    """Add keysᵀ keys to the lower triangle of total, in place. The upper triangle is not changed.

    Products are accumulated in float32, with at most 8,192 tokens in an accumulator before it is added to total.

    Args:
        total: (d, d) float32, a running sum over any number of calls.
        keys: (t, d) float32, bfloat16 or float16, on the device of total.
        backend: A name of `available_backends(device)`. None chooses the fastest.

    Returns:
        total.

    Raises:
        InputError: A dtype, shape, device or backend is not valid, or the operands share memory.
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
    """Add keysᵀ keys to the lower triangle of each total, in place, for several layers.

    On a GPU, layers of the same shape share a kernel launch.

    Args:
        totals: A running sum (d, d) float32 for each layer, all on one device.
        keys: Keys (t, d) float32, bfloat16 or float16 for each total.
        backend: A name of `available_backends(device)`. None chooses the fastest.

    Raises:
        InputError: As for `accumulate_second_moment`, or a total occurs twice.
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


@plain_arithmetic()
def accumulate_grouped_second_moment(
    totals: Tensor, keys: Tensor, offsets: Tensor, backend: str | None = None
) -> Tensor:
    """Add the second moment of each group of keys to the lower triangle of its total, in place.

    The groups are the experts of a mixture: the keys are sorted by expert, and a group may be empty. All groups are
    computed in one call; the upper triangles are not changed. Products are accumulated in float32, with at most 8,192
    tokens in an accumulator before it is added to the total. The same operands give the same bytes.

    Args:
        totals: (E, d, d) float32, a running sum for each group.
        keys: (t, d) float32, bfloat16 or float16, on the device of totals.
        offsets: (E + 1) int64, on the CPU or the device of totals: rows offsets[e] to offsets[e + 1] of keys are those
            of group e. Offsets on a GPU are copied to the CPU, which waits for the GPU.
        backend: A name of `available_backends(device)`, but not "cuda". None chooses the fastest.

    Returns:
        totals.

    Raises:
        InputError: A dtype, shape, device or backend is not valid, offsets do not ascend from 0 to t, or the operands
            share memory.
    """
    numbers = checks.check_grouped_second_moment(totals, keys, offsets)
    chosen = _choose(backend, totals.device)
    if not isinstance(chosen, GroupsBackend):
        raise _lacks(backend, "grouped second moment", GroupsBackend, totals.device)
    if not totals.numel() or not keys.numel():
        return totals
    with writing(totals):
        chosen.accumulate_grouped_second_moment(totals, _with_rows(keys), numbers)
    return totals


def second_moment_backend(keys: Sequence[Tensor]) -> str | None:
    """Return the fastest backend for the second moments of keys of some layers.

    Args:
        keys: Keys (t, d) for each layer.

    Returns:
        "torch" for small products on a GPU, where cuBLAS is fastest; None for the first available backend.
    """
    if keys[0].device.type != "cuda" or any(each.dtype == torch.float32 for each in keys):
        return None
    operations = sum(2.0 * each.shape[0] * each.shape[1] ** 2 for each in keys)
    products = sum(-(-each.shape[0] // MAXIMUM_TOKENS) for each in keys)
    return "torch" if operations < SMALL_PRODUCT and products <= SMALL_PRODUCTS else None


@plain_arithmetic()
def symmetrize(total: Tensor) -> Tensor:
    """Copy the lower triangle of a matrix to its upper triangle, in place.

    Args:
        total: (d, d) float32.

    Returns:
        total.

    Raises:
        InputError: total is not square or not float32.
    """
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
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight, in place.

    The sum is computed in float32 and rounded once to the dtype of the weight.

    Args:
        weights: Matrices (d_out, d_in), float32, bfloat16 or float16; one, or a sequence. Transposed views are
            allowed.
        lefts: A matrix (d_out, n) of floating point for each weight; it is converted to float32.
        rights: A matrix (n, d_in) of floating point for each weight; it is converted to float32.
        scale: A finite factor.
        rounding: "nearest" rounds to nearest, ties to even. "stochastic" rounds to one of the two nearest values, so
            that the expectation is the exact value; float32 weights are always rounded to nearest.
        seed: Seed of stochastic rounding, 0 to 2**63 - 1. Equal operands, seed and backend give equal bytes.
        backend: A name of `available_backends(device)`, but not "cuda". None chooses the fastest.
        keep_zeros: Whether elements of a weight that are zero keep their bits.

    Raises:
        InputError: A dtype, shape, device, scale, rounding, seed or backend is not valid, or operands share memory.
    """
    weights, lefts, rights = ([each] if isinstance(each, Tensor) else each for each in (weights, lefts, rights))
    checks.check_low_rank_update(weights, lefts, rights)
    check_rounding(rounding, seed)
    if not abs(scale) < float("inf"):
        raise InputError(f"scale is {scale}, but must be finite.")
    if not weights:
        return
    chosen = _choose(backend, weights[0].device)
    if not isinstance(chosen, UpdateBackend):
        raise _lacks(backend, "low-rank update", UpdateBackend, weights[0].device)
    lefts = [left.float().contiguous() for left in lefts]
    rights = [right.float().contiguous() for right in rights]
    with writing(*weights):
        chosen.low_rank_update(weights, lefts, rights, scale, rounding, seed, keep_zeros)


@plain_arithmetic()
def solve_on_support(
    weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float, backend: str | None = None
) -> Tensor:
    """Solve the update of each row of a weight on the support of the row, the columns where it is not zero.

    For row i with the support D_i, a diagonal of zeros and ones, the update is δ_i = D_i Fᵀ z_i, where z_i minimises
    ‖K δ_i - r_i‖² + λ‖z_i‖². With A_i = K D_i Fᵀ, it is z_i = A_iᵀ (A_i A_iᵀ + λI)⁻¹ r_i: one symmetric positive
    definite (n, n) system for each row. A_i is summed in float32, the systems are solved in float64.

    Args:
        weight: (d_out, d_in) float32, bfloat16, float16 or bool; read only for where it is zero.
        keys: K (n, d_in), floating point; it is converted to float32, as residuals and basis are.
        residuals: R (n, d_out), floating point: r_i is a column of it.
        basis: F (m, d_in), floating point.
        ridge: λ > 0, in units of a squared key.
        backend: A name of `available_backends(device)`, but not "cuda". None chooses the fastest.

    Returns:
        (d_out, m) float32, the coefficients z. The update is (z @ F) * (weight != 0), which
        `low_rank_update(weight, z, basis, keep_zeros=True)` adds.

    Raises:
        InputError: A shape, dtype, device, the ridge or the backend is not valid, or a CUDA graph is being captured.
        GuardError: Elements are not finite, or a system is singular to working precision.
    """
    checks.check_solve_on_support(weight, keys, residuals, basis, ridge)
    _refuse_capture("solve_on_support", keys)
    chosen = _choose(backend, weight.device)
    if not isinstance(chosen, SupportBackend):
        raise _lacks(backend, "solve on a support", SupportBackend, weight.device)
    for name, operand in (("keys", keys), ("residuals", residuals), ("basis", basis)):
        require_finite(name, operand)
    keys, residuals, basis = (each.float().contiguous() for each in (keys, residuals, basis))
    if not weight.numel() or not len(keys) or not len(basis):
        return basis.new_zeros(len(weight), len(basis))
    coefficients = chosen.solve_on_support(weight, keys, residuals, basis, ridge)
    require_finite("the coefficients of the update", coefficients)
    return coefficients


@plain_arithmetic()
def solve_update(
    keys: Tensor, residuals: Tensor, metric: Tensor | Metric | None, ridge: float
) -> tuple[Tensor, Tensor]:
    """Solve the update Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M, as an (n, n) system in float64.

    Args:
        keys: K (n, d_in), floating point.
        residuals: R (n, d_out), floating point: the wanted change of the output at each key.
        metric: M, symmetric: a matrix (d_in, d_in), an object with a method `apply(keys)` that returns keys @ M, or
            None for the identity.
        ridge: λ >= 0, in units of a squared key. It can be 0 only if the keys are linearly independent under M.

    Returns:
        left (d_out, n) and right (n, d_in) with Δ = left @ right, in the dtype of keys but at least float32.

    Raises:
        InputError: A shape, dtype, device or the ridge is not valid, the metric is not symmetric, or a CUDA graph is
            being captured.
        GuardError: Elements are not finite, or the system is singular to working precision.

    Source:
        Ye, Zhang and Wu, arXiv 2506.07795. The authors solve a (d_in, d_in) system; this is the same update by the
        push-through identity.
    """
    checks.check_solve(keys, residuals, ridge)
    _refuse_capture("solve_update", keys)
    require_finite("keys", keys)
    require_finite("residuals", residuals)
    weighted_keys = apply_metric(metric, keys)
    require_finite("keys @ metric", weighted_keys)
    left, right, _ = solve_weighted(keys, residuals, weighted_keys, ridge)
    return left, right


def _refuse_capture(operation: str, keys: Tensor) -> None:
    """Raise InputError while a CUDA graph is being captured."""
    if keys.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError(
            f"{operation} cannot be captured in a CUDA graph, since it waits for the device to check values: call it "
            "outside of the capture."
        )


def _lacks(backend: str | None, operation: str, interface: type, device: torch.device) -> InputError:
    """Return the error of a backend without an operation, with the names of those that have it."""
    able = [name for name in available_backends(device) if isinstance(_load(name), interface)]
    return InputError(f"The backend {backend!r} has no {operation}; choose one of {', '.join(able)}.")


def _with_rows(keys: Tensor) -> Tensor:
    """Return keys whose rows are contiguous and do not overlap."""
    has_rows = keys.stride(1) == 1 and (keys.stride(0) >= keys.shape[1] or keys.shape[0] == 1)
    return keys if has_rows else keys.contiguous()


def _preference() -> tuple[str, ...]:
    """Return the names of the backends, the fastest first."""
    return AMD_BACKENDS if torch.version.hip else BACKENDS


def _load(name: str) -> Backend | None:
    """Import the module of a backend, or return None if it is not installed."""
    module = "rocr.ops.reference" if name == "reference" else f"rocr.ops.{name}_backend"
    try:
        backend: Backend = importlib.import_module(module)  # type: ignore[assignment]
    except ImportError:
        return None
    return backend


def _choose(name: str | None, device: torch.device) -> Backend:
    """Return the named backend, or the fastest one for the device if the name is None."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"There is no backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    for candidate in _preference() if name is None else (name,):
        backend = _load(candidate)
        if backend and backend.is_available(device):
            return backend
    raise InputError(
        f"The backend {name!r} cannot run on {device} here; available are {', '.join(available_backends(device))}."
    )
