"""What the operations accept; whatever does not fit is refused in a sentence with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from rocr.errors import InputError
from rocr.io.dtypes import is_supported


def check_second_moment(total: Tensor, keys: Tensor) -> None:
    """Raise InputError unless total (d, d) can take the second moment of keys (t, d)."""
    _check_layer(total, keys)
    _check_apart({"total": [total], "keys": [keys]}, written=1)


def _check_layer(total: Tensor, keys: Tensor) -> None:
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
    """Raise InputError unless every total (d, d) can take the second moment of its keys (t, d)."""
    if len(totals) != len(keys):
        raise InputError(f"There must be keys for each total, but there are {len(totals)} totals and {len(keys)} keys.")
    for total, each in zip(totals, keys, strict=True):
        check_second_moment(total, each)
        _check_same_device("totals[0]", totals[0], "another total", total)
    _check_apart({"totals": totals, "keys": keys}, written=len(totals))


def check_square(name: str, total: Tensor) -> None:
    """Raise InputError unless total is a square float32 matrix."""
    if total.dim() != 2 or total.shape[0] != total.shape[1]:
        raise InputError(f"{name} must be a square matrix, but is {_shape(total)}.")
    if total.dtype != torch.float32:
        raise InputError(f"{name} must be float32, but is {total.dtype}; sums of low precision lose tokens.")


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
                raise InputError(f"{name}[{index}] must be of floating point, but is {factor.dtype}.")
            if not one_device:
                _check_same_device(f"weights[{index}]", weight, f"{name}[{index}]", factor)
        if not one_device:
            _check_same_device("weights[0]", weights[0], f"weights[{index}]", weight)
    _check_apart({"weights": weights, "lefts": lefts, "rights": rights}, written=len(weights))


def _check_shapes_of_update(index: int, weight: Tensor, left: Tensor, right: Tensor) -> None:
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
    """Raise InputError unless keys (n, d_in), residuals (n, d_out) and ridge make a system to solve."""
    if keys.dim() != 2 or residuals.dim() != 2 or keys.shape[0] != residuals.shape[0]:
        raise InputError(
            f"keys and residuals must be (n, d_in) and (n, d_out) with the same n, but are {_shape(keys)} "
            f"and {_shape(residuals)}."
        )
    for name, tensor in (("keys", keys), ("residuals", residuals)):
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be of floating point, but are {tensor.dtype}.")
    _check_same_device("keys", keys, "residuals", residuals)
    if not 0 <= ridge < float("inf"):
        raise InputError(f"ridge is {ridge}, but must be finite and at least 0.")


def check_metric(metric: Tensor, keys: Tensor) -> None:
    """Raise InputError unless metric is a (d_in, d_in) matrix beside keys (n, d_in)."""
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
    """Refuse a matrix to be written whose elements may share memory with each other."""
    if tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor, but has the layout {tensor.layout}.")
    outer, inner = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
    if tensor.numel() and (inner[0] < 1 < inner[1] or (outer[0] < inner[0] * inner[1] and outer[1] > 1)):
        raise InputError(
            f"{name} has elements that share memory: shape {_shape(tensor)} with strides {tensor.stride()}; "
            "pass a clone."
        )


def _check_apart(groups: Mapping[str, Sequence[Tensor]], written: int) -> None:
    """Refuse tensors that overlap in memory where the first `written` are to be written, and odd addresses.

    Tensors go by the name of their group, with their place in it where the name is of several.
    """
    tensors = [tensor for group in groups.values() for tensor in group]
    spans = []
    for index, tensor in enumerate(tensors):
        numbers = tensor.numel() if tensor.is_contiguous() else _reach(tensor)
        if not numbers:
            continue
        start, width = _address(tensor), tensor.element_size()
        if start % width:
            raise InputError(
                f"{_name(groups, index)} begins at an address that is no multiple of the {width} bytes of a number; "
                "pass a clone."
            )
        spans.append((start, start + numbers * width, index))
    furthest = furthest_written = (0, 0)  # where the spans so far end, and the tensor that does
    for start, end, index in sorted(spans):
        reached, other = furthest if index < written else furthest_written
        if start < reached:
            first, second = (_name(groups, each) for each in sorted((index, other)))
            raise InputError(f"{first} and {second} share memory; pass each piece of memory once in a call.")
        furthest = max(furthest, (end, index))
        if index < written:
            furthest_written = max(furthest_written, (end, index))


def _name(groups: Mapping[str, Sequence[Tensor]], index: int) -> str:
    """What the tensor of that number is called, such as "weights[2]"; "total" and its keys are alone."""
    is_alone = "total" in groups
    names = [name if is_alone else f"{name}[{place}]" for name, group in groups.items() for place in range(len(group))]
    return names[index]


def _reach(tensor: Tensor) -> int:
    """How many numbers lie between the first and the last of a tensor, both counted."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is memory at an address and nothing more: neither traced, nor one that says how it looks."""
    return type(tensor) in (Tensor, Parameter) and not tensor.is_meta


def _address(tensor: Tensor) -> int:
    """Where a tensor begins; one without memory, as torch.compile traces with, begins in a place of its storage's."""
    if is_plain(tensor):
        return tensor.data_ptr()
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":
        return (int(storage._cdata) << 64) + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
