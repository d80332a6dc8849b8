"""The operations in the compiled kernels of csrc/ (rocr._C), for the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.ops.system import require_solvable

SIMD_VARIABLE = "ROCR_SIMD"
"""Environment variable with the name of an instruction set, which replaces the fastest one of the machine."""


VECTOR_FLOATS = 16
"""Floats of the longest vector, which the kernels may read beyond the end of a row of a padded operand."""


def is_available(device: torch.device) -> bool:
    """Return whether the device is the CPU and rocr._C is compiled."""
    return device.type == "cpu" and import_error() is None and bool(simd_names())


def import_error() -> str | None:
    """Return the message of a failed import of rocr._C, or None if the import succeeds."""
    try:
        import rocr._C  # noqa: F401
    except ImportError as error:
        return str(error) or type(error).__name__
    return None


def simd_names() -> list[str]:
    """Return the names of the instruction sets that this machine supports, the fastest first."""
    import rocr._C as kernels

    names: list[str] = kernels.simd_names()
    return names


def _wanted_simd() -> str:
    """Return the instruction set in `SIMD_VARIABLE`, or an empty string for the fastest.

    Raises:
        InputError: There is no such instruction set, or this machine does not support it.
    """
    name = os.environ.get(SIMD_VARIABLE, "")
    if name and name not in (names := simd_names()):
        raise InputError(
            f"{SIMD_VARIABLE} is {name!r}, but must name an instruction set that rocr uses on this machine: "
            f"{', '.join(names)}. Unset it for the fastest."
        )
    return name


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total."""
    second_moment_op(total, keys)


def accumulate_grouped_second_moment(totals: Tensor, keys: Tensor, offsets: Sequence[int]) -> None:
    """Add the second moment of rows offsets[e] to offsets[e + 1] of keys to totals[e], in one call."""
    grouped_second_moment_op(totals, keys, list(offsets))


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight, or where it is not zero, in one call."""
    low_rank_update_op(list(weights), list(lefts), list(rights), scale, rounding == "stochastic", seed, keep_zeros)


def solve_on_support(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the coefficients (d_out, m) of each row, in one call."""
    coefficients: Tensor = solve_on_support_op(weight, keys, residuals, basis, ridge)
    return coefficients


def wide_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows @ weight.T + bias, (m, d_out), summed in float32 and rounded once.

    Args:
        rows: (m, d_in), 16-bit.
        weight: (d_out, d_in) with unit stride along a row, in the dtype of the rows.
        bias: (d_out,) in the same dtype, or None.
    """
    output: Tensor = wide_product_op(rows, weight, bias)
    return output


@torch.library.custom_op("rocr::cpp_second_moment", mutates_args=("total",))
def second_moment_op(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total; keys have unit stride along a row."""
    import rocr._C as kernels

    rows = _with_rows(total)
    kernels.accumulate_second_moment(
        total=rows.data_ptr(),
        total_stride=_row_stride(rows),
        keys=keys.data_ptr(),
        keys_stride=_row_stride(keys),
        tokens=keys.shape[0],
        size=keys.shape[1],
        dtype=_dtype(keys),
        threads=torch.get_num_threads(),
        simd=_wanted_simd(),
    )
    if rows is not total:
        total.copy_(rows)


@torch.library.custom_op("rocr::cpp_grouped_second_moment", mutates_args=("totals",))
def grouped_second_moment_op(totals: Tensor, keys: Tensor, offsets: list[int]) -> None:
    """Add the second moment of each group of rows to the lower triangle of its total; keys have unit stride."""
    import rocr._C as kernels

    rows = _with_rows(totals)
    kernels.accumulate_grouped_second_moment(
        totals=rows.data_ptr(),
        group_stride=rows.stride(0),
        total_stride=_row_stride(rows[0]),
        keys=keys.data_ptr(),
        keys_stride=_row_stride(keys),
        offsets=offsets,
        size=keys.shape[1],
        dtype=_dtype(keys),
        threads=torch.get_num_threads(),
        simd=_wanted_simd(),
    )
    if rows is not totals:
        totals.copy_(rows)


@torch.library.custom_op("rocr::cpp_low_rank_update", mutates_args=("weights",))
def low_rank_update_op(
    weights: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    scale: float,
    stochastic: bool,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight, or where it is not zero; factors are float32 and contiguous."""
    import rocr._C as kernels

    operands = [_by_rows(*each) for each in zip(weights, lefts, rights, strict=True)]
    kernels.low_rank_update(
        updates=[_describe(*each) for each in operands],
        scale=scale,
        stochastic=stochastic,
        keep_zeros=keep_zeros,
        seed=seed,
        threads=torch.get_num_threads(),
        simd=_wanted_simd(),
    )
    for weight, (rows, _, _) in zip(weights, operands, strict=True):
        if rows.data_ptr() != weight.data_ptr():
            weight.copy_(rows)


@torch.library.custom_op("rocr::cpp_solve_on_support", mutates_args=())
def solve_on_support_op(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the coefficients of each row; keys, residuals and basis are float32."""
    import rocr._C as kernels

    rows, by_column, goals = _with_rows(weight), keys.T.contiguous(), residuals.T.contiguous()
    padded = torch.nn.functional.pad(basis.T, (0, VECTOR_FLOATS)).contiguous()
    coefficients = basis.new_empty(len(weight), len(basis))
    solved = kernels.solve_on_support(
        weight=rows.data_ptr(),
        bytes=rows.element_size(),
        rows=rows.shape[0],
        columns=rows.shape[1],
        stride=_row_stride(rows),
        keys=by_column.data_ptr(),
        key_count=len(keys),
        basis=padded.data_ptr(),
        basis_size=len(basis),
        basis_stride=padded.shape[1],
        residuals=goals.data_ptr(),
        ridge=ridge,
        coefficients=coefficients.data_ptr(),
        threads=torch.get_num_threads(),
        simd=_wanted_simd(),
    )
    require_solvable(not solved, ridge)
    return coefficients


@torch.library.custom_op("rocr::cpp_wide_product", mutates_args=())
def wide_product_op(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows @ weight.T + bias; the weight has unit stride along a row."""
    import rocr._C as kernels

    inputs = rows.contiguous()
    output = rows.new_zeros(len(rows), len(weight)) if bias is None else bias.repeat(len(rows), 1)
    kernels.wide_product(
        weight=weight.data_ptr(),
        inputs=inputs.data_ptr(),
        output=output.data_ptr(),
        dtype=_dtype(weight),
        rows=weight.shape[0],
        columns=weight.shape[1],
        count=len(rows),
        weight_stride=_row_stride(weight),
        inputs_stride=inputs.shape[1],
        threads=torch.get_num_threads(),
        simd=_wanted_simd(),
    )
    return output


@second_moment_op.register_fake
def _(total: Tensor, keys: Tensor) -> None:
    return None


@grouped_second_moment_op.register_fake
def _(totals: Tensor, keys: Tensor, offsets: list[int]) -> None:
    return None


@low_rank_update_op.register_fake
def _(
    weights: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    scale: float,
    stochastic: bool,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    return None


@wide_product_op.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(len(rows), len(weight))


@solve_on_support_op.register_fake
def _(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    return basis.new_empty(len(weight), len(basis))


def _by_rows(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operands of the same update for a weight with unit stride along its rows."""
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        return weight.T, right.T.contiguous(), left.T.contiguous()
    return _with_rows(weight), left, right


def _describe(weight: Tensor, left: Tensor, right: Tensor) -> Any:
    import rocr._C as kernels

    return kernels.LowRankUpdate(
        weight=weight.data_ptr(),
        dtype=_dtype(weight),
        rows=weight.shape[0],
        columns=weight.shape[1],
        stride=_row_stride(weight),
        rank=left.shape[1],
        left=left.data_ptr(),
        right=right.data_ptr(),
    )


def _with_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _row_stride(matrix: Tensor) -> int:
    """Return the stride of the rows. In torch, a single row can have any stride."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _dtype(tensor: Tensor) -> Any:
    import rocr._C as kernels

    return getattr(kernels.DType, str(tensor.dtype).removeprefix("torch."))
