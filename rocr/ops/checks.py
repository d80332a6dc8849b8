"""Checks of the operands of the operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from rocr.errors import InputError
from rocr.io.dtypes import is_supported


def check_second_moment(total: Tensor, keys: Tensor) -> None:
    """Raise InputError unless total (d, d) and keys (t, d) are valid operands of a second moment."""
    _check_layer(total, keys)
    _check_apart({"total": [total], "keys": [keys]}, written=1)


def _check_layer(total: Tensor, keys: Tensor) -> None:
    """Raise InputError unless shapes, dtypes and devices of a total and its keys are valid."""
    check_square("total", total)
    if keys.dim() != 2 or keys.shape[1] != total.shape[0]:
        raise InputError(
            f"keys must be (tokens, {total.shape[0]}) for a total of {_shape(total)}, but are {_shape(keys)}."
        )
    _check_dtype("keys", keys)
    _check_same_device("total", total, "keys", keys)
    if not total.is_contiguous():
        _check_memory("total", total)


def check_second_moments(totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Raise InputError unless every total (d, d) and its keys (t, d) are valid operands of a second moment."""
    if len(totals) != len(keys):
        raise InputError(f"There must be keys for each total, but there are {len(totals)} totals and {len(keys)} keys.")
    for total, each in zip(totals, keys, strict=True):
        check_second_moment(total, each)
        _check_same_device("totals[0]", totals[0], "another total", total)
    _check_apart({"totals": totals, "keys": keys}, written=len(totals))


def check_grouped_second_moment(totals: Tensor, keys: Tensor, offsets: Tensor) -> list[int]:
    """Check the operands of a grouped second moment, and return the offsets as numbers.

    Args:
        totals: Must be (E, d, d) float32.
        keys: Must be (t, d) float32, bfloat16 or float16.
        offsets: Must be (E + 1) int64, ascending from 0 to t.

    Raises:
        InputError: An operand is not valid, or operands share memory.
    """
    _check_layers(totals, keys)
    groups, tokens = len(totals), len(keys)
    if offsets.dim() != 1 or len(offsets) != groups + 1:
        raise InputError(
            f"offsets must be ({groups + 1},) for totals of {_shape(totals)}, one more than there are groups, but are "
            f"{_shape(offsets)}."
        )
    if offsets.dtype != torch.int64:
        raise InputError(f"offsets must be int64, but are {offsets.dtype}.")
    if offsets.device.type != "cpu":
        _check_same_device("totals", totals, "offsets", offsets)
    _check_apart({"totals": [totals], "keys": [keys], "offsets": [offsets]}, written=1)
    numbers: list[int] = offsets.tolist()
    _check_offsets(numbers, tokens)
    return numbers


def _check_layers(totals: Tensor, keys: Tensor) -> None:
    """Raise InputError unless shapes, dtypes, devices and memory of the totals of groups and their keys are valid."""
    if totals.dim() != 3 or totals.shape[1] != totals.shape[2]:
        raise InputError(f"totals must be square matrices (groups, d, d), but are {_shape(totals)}.")
    if totals.dtype != torch.float32:
        raise InputError(f"totals must be float32, but are {totals.dtype}: a sum of lower precision loses tokens.")
    if keys.dim() != 2 or keys.shape[1] != totals.shape[2]:
        raise InputError(
            f"keys must be (tokens, {totals.shape[2]}) for totals of {_shape(totals)}, but are {_shape(keys)}."
        )
    _check_dtype("keys", keys)
    _check_same_device("totals", totals, "keys", keys)
    if not totals.is_contiguous():
        _check_memory("totals", totals)


def _check_offsets(offsets: Sequence[int], tokens: int) -> None:
    """Raise InputError unless offsets ascend from 0 to the number of tokens."""
    if offsets[0] != 0:
        raise InputError(f"offsets must begin with 0, but begin with {offsets[0]}.")
    for index, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise InputError(
                f"offsets must not descend, but offsets[{index}] is {start} and offsets[{index + 1}] is {end}."
            )
    if offsets[-1] != tokens:
        raise InputError(f"offsets must end with the number of tokens, {tokens}, but end with {offsets[-1]}.")


def check_square(name: str, total: Tensor) -> None:
    """Raise InputError unless total is a square float32 matrix."""
    if total.dim() != 2 or total.shape[0] != total.shape[1]:
        raise InputError(f"{name} must be a square matrix, but is {_shape(total)}.")
    if total.dtype != torch.float32:
        raise InputError(f"{name} must be float32, but is {total.dtype}: a sum of lower precision loses tokens.")


def check_low_rank_update(weights: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
    """Raise InputError unless every weight (d_out, d_in) has its left (d_out, n) and right (n, d_in)."""
    if not len(weights) == len(lefts) == len(rights):
        raise InputError(
            f"There must be one left and one right for each weight, but there are {len(weights)} weights, "
            f"{len(lefts)} lefts and {len(rights)} rights."
        )
    one_device = len({tensor.device for tensor in (*weights, *lefts, *rights)}) == 1
    for index, (weight, left, right) in enumerate(zip(weights, lefts, rights, strict=True)):
        _check_shapes_of_update(index, weight, left, right)
        if not is_supported(weight.dtype):
            _check_dtype(f"weights[{index}]", weight)
        if not weight.is_contiguous():
            _check_memory(f"weights[{index}]", weight)
        for name, factor in (("lefts", left), ("rights", right)):
            if not factor.is_floating_point():
                raise InputError(f"{name}[{index}] must be of a floating-point dtype, but is {factor.dtype}.")
            if not one_device:
                _check_same_device(f"weights[{index}]", weight, f"{name}[{index}]", factor)
        if not one_device:
            _check_same_device("weights[0]", weights[0], f"weights[{index}]", weight)
    _check_apart({"weights": weights, "lefts": lefts, "rights": rights}, written=len(weights))


def _check_shapes_of_update(index: int, weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Raise InputError unless weight, left and right are (d_out, d_in), (d_out, n) and (n, d_in)."""
    outer, inner, narrow = weight.shape, right.shape, left.shape
    if len(outer) == len(narrow) == len(inner) == 2 and (*outer, narrow[1]) == (narrow[0], inner[1], inner[0]):
        return
    name, shapes = f"weights[{index}]", f"{_shape(weight)}, {_shape(left)} and {_shape(right)}"
    if not weight.dim() == left.dim() == right.dim() == 2:
        raise InputError(f"{name}, its left and its right must be matrices, but are {shapes}.")
    raise InputError(
        f"{name}, its left and its right must be (d_out, d_in), (d_out, n) and (n, d_in), but are {shapes}."
    )


def check_solve(keys: Tensor, residuals: Tensor, ridge: float) -> None:
    """Raise InputError unless keys (n, d_in), residuals (n, d_out) and ridge are valid operands of a solve."""
    if keys.dim() != 2 or residuals.dim() != 2 or keys.shape[0] != residuals.shape[0]:
        raise InputError(
            f"keys and residuals must be (n, d_in) and (n, d_out) with the same n, but are {_shape(keys)} "
            f"and {_shape(residuals)}."
        )
    for name, tensor in (("keys", keys), ("residuals", residuals)):
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be of a floating-point dtype, but are {tensor.dtype}.")
    _check_same_device("keys", keys, "residuals", residuals)
    if not 0 <= ridge < float("inf"):
        raise InputError(f"ridge is {ridge}, but must be finite and at least 0.")


def check_solve_on_support(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> None:
    """Raise InputError unless the operands of a solve on the support of a weight (d_out, d_in) are valid.

    Args:
        weight: Must be a matrix of float32, bfloat16, float16 or bool.
        keys: Must be (n, d_in).
        residuals: Must be (n, d_out).
        basis: Must be (m, d_in).
        ridge: Must be above 0.
    """
    check_solve(keys, residuals, ridge)
    if not ridge:
        raise InputError("ridge is 0, but must be above 0: the system of a row whose weight is zero is singular.")
    shapes = f"{_shape(weight)}, {_shape(keys)}, {_shape(residuals)} and {_shape(basis)}"
    if not weight.dim() == basis.dim() == 2:
        raise InputError(f"weight, keys, residuals and basis must be matrices, but are {shapes}.")
    if weight.shape != (residuals.shape[1], keys.shape[1]) or basis.shape[1] != keys.shape[1]:
        raise InputError(
            f"weight, keys, residuals and basis must be (d_out, d_in), (n, d_in), (n, d_out) and (m, d_in), but are "
            f"{shapes}."
        )
    if weight.dtype != torch.bool:
        _check_dtype("weight", weight)
    if not basis.is_floating_point():
        raise InputError(f"basis must be of a floating-point dtype, but is {basis.dtype}.")
    for name, operand in (("weight", weight), ("basis", basis)):
        _check_same_device("keys", keys, name, operand)


def check_metric(metric: Tensor, keys: Tensor) -> None:
    """Raise InputError unless metric is a matrix (d_in, d_in) on the device of keys (n, d_in)."""
    size = keys.shape[1]
    if metric.shape != (size, size):
        raise InputError(f"metric must be ({size}, {size}) for keys of {_shape(keys)}, but is {_shape(metric)}.")
    _check_same_device("keys", keys, "metric", metric)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_dtype(name: str, tensor: Tensor) -> None:
    if not is_supported(tensor.dtype):
        raise InputError(f"{name} must be float32, bfloat16 or float16, but has dtype {tensor.dtype}.")


def _check_same_device(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.device != second.device:
        raise InputError(f"{first_name} is on {first.device} and {second_name} on {second.device}; move both to one.")


def _check_memory(name: str, tensor: Tensor) -> None:
    """Raise InputError if elements of a tensor that is written may share memory."""
    if tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor, but has the layout {tensor.layout}.")
    reach = 1  # elements from the first to the last one along the dimensions so far, at most the stride of the next
    overlaps = False
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        overlaps = overlaps or (size > 1 and stride < reach)
        reach = max(reach, stride * size)
    if tensor.numel() and overlaps:
        raise InputError(
            f"{name} has elements that share memory: shape {_shape(tensor)} with strides {tensor.stride()}; "
            "pass a clone."
        )


def _check_apart(groups: Mapping[str, Sequence[Tensor]], written: int) -> None:
    """Raise InputError if a written tensor overlaps with another tensor, or an address is not aligned.

    Args:
        groups: The tensors, by the name of their group.
        written: Number of tensors that are written, counted from the first.
    """
    tensors = [tensor for group in groups.values() for tensor in group]
    spans = []
    for index, tensor in enumerate(tensors):
        elements = tensor.numel() if tensor.is_contiguous() else _span_elements(tensor)
        if not elements:
            continue
        start, width = _address(tensor), tensor.element_size()
        if start % width:
            raise InputError(
                f"{_name(groups, index)} begins at an address that is not a multiple of the {width} bytes of an "
                "element; pass a clone."
            )
        spans.append((start, start + elements * width, index))
    spans.sort()
    if all(start >= reached for (_, reached, _), (start, _, _) in pairwise(spans)):
        return  # nothing overlaps, as in nearly every call; the names of what does take longer to find
    furthest = furthest_written = (0, 0)  # the largest end of the spans so far, and the index of its tensor
    for start, end, index in spans:
        reached, other = furthest if index < written else furthest_written
        if start < reached:
            first, second = (_name(groups, each) for each in sorted((index, other)))
            raise InputError(f"{first} and {second} share memory; pass each piece of memory once in a call.")
        furthest = max(furthest, (end, index))
        if index < written:
            furthest_written = max(furthest_written, (end, index))


def _name(groups: Mapping[str, Sequence[Tensor]], index: int) -> str:
    """Return the name of a tensor by its index, such as "weights[2]", or "keys" where each name has one tensor."""
    is_single = "total" in groups or "offsets" in groups
    names = [name if is_single else f"{name}[{place}]" for name, group in groups.items() for place in range(len(group))]
    return names[index]


def _span_elements(tensor: Tensor) -> int:
    """Return the number of elements from the first to the last one of a tensor in memory, inclusive."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary tensor with memory, not a subclass, a traced or a meta tensor."""
    return type(tensor) in (Tensor, Parameter) and not tensor.is_meta


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor. A tensor without memory gets one that is unique to its storage."""
    if is_plain(tensor):
        return tensor.data_ptr()
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":
        return (int(storage._cdata) << 64) + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
