"""A module that multiplies by a matrix: its sizes, and checks that its weight is dense and its output the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.io.dtypes import is_supported
from rocr.model.tensor_parallel import flaw_of, is_sharded, whole

PROBE_TOKENS = 8
PROBE_ROWS = 64
MIN_TOLERANCE = 1e-3
"""Relative error that TF32 products stay below. The error of a module with another function is a tenth or more."""


@dataclass(frozen=True)
class Matrix:
    """A module of an MLP that multiplies by a matrix.

    Attributes:
        name: The name in the model's state dict, without `.weight`.
        module: The module that holds the weight.
        outer: The wrapper around it whose output the MLP uses, such as one of peft; else the module itself.
    """

    name: str
    module: nn.Module
    outer: nn.Module

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as (d_in, d_out)."""
        return isinstance(self.module, Conv1D)

    @property
    def features(self) -> int | None:
        """The size of the output; None if the module does not name it."""
        weight: Any = getattr(self.module, "weight", None)
        is_plain = isinstance(weight, Tensor) and weight.ndim == 2 and is_supported(weight.dtype)
        if is_plain and isinstance(self.module, (nn.Linear, Conv1D)):
            return int(weight.shape[1 if self.is_transposed else 0])
        for name in ("out_features", "nf"):
            size = getattr(self.module, name, None)
            if isinstance(size, int):
                return size
        return None

    @property
    def inputs(self) -> int | None:
        """The size of the input; None if the module does not name it."""
        weight: Any = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and isinstance(self.module, (nn.Linear, Conv1D)):
            return int(weight.shape[0 if self.is_transposed else 1])
        for name in ("in_features", "nx"):
            size = getattr(self.module, name, None)
            if isinstance(size, int):
                return size
        return None


@dataclass
class Call:
    """A call of a matrix.

    Attributes:
        key: (tokens, d_in) the input.
        output: (tokens, d_out) the output of the module.
        outer: (tokens, d_out) the output of the wrapper around it; None until that was called.
    """

    key: Tensor
    output: Tensor
    outer: Tensor | None = None


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix, quantised or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "qweight") or "Linear" in type(module).__name__


def check_dense(matrix: Matrix) -> None:
    """Raise InputError unless a matrix has a plain weight, in one process or split along its inputs."""
    module = matrix.module
    weight = getattr(module, "weight", None)
    if (
        not isinstance(module, (nn.Linear, Conv1D))
        or not isinstance(weight, nn.Parameter)
        or not is_supported(weight.dtype)
        or weight.ndim != 2
        # Quantised weights of torchao and quanto are tensors of another class whose dtype is bfloat16.
        or not (type(weight.data) is Tensor or is_sharded(weight))
    ):
        held = "no plain weight"
        if isinstance(weight, Tensor):
            held = f"{weight.dtype} of shape {tuple(weight.shape)}"
            if type(weight) not in (Tensor, nn.Parameter):
                held = f"a {type(weight).__name__} that stands for {held}"
        raise InputError(
            f"{matrix.name} is a {type(module).__name__} that holds {held}: only dense float32, bfloat16 and float16 "
            "weights can be edited, not quantised ones. Load the model with such weights."
        )
    flaw = flaw_of(weight)
    if flaw is not None:
        raise InputError(
            f"{matrix.name} {flaw}: rocr edits weights that are in one process, or split along their inputs by tensor "
            "parallelism. Load the model in one process, or with a tp_plan."
        )


@torch.no_grad()
def _alone(matrix: Matrix) -> Call:
    """Call a matrix on random keys, without the rest of the MLP."""
    weight = matrix.module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(PROBE_TOKENS, weight.shape[0 if matrix.is_transposed else 1], generator=generator)
    keys = keys.to(weight.device, weight.dtype)
    with calling(f"{matrix.name}, run alone on random keys,"), torch.autocast(weight.device.type, enabled=False):
        return Call(keys, rows_of(matrix.module(keys)))


def check_product(matrix: Matrix, call: Call | None = None) -> None:
    """Raise InputError unless a matrix returns its input times its weight.

    Args:
        matrix: The matrix. One on the meta device passes.
        call: A call of the matrix; None calls it on random keys.

    Raises:
        InputError: The output is something else, or the module raises an exception.
    """
    if matrix.module.weight.device.type == "meta":  # type: ignore[union-attr]
        return
    call = call or _alone(matrix)
    error = _product_error(matrix, call)
    if error > tolerance_of(call.output):
        raise InputError(
            f"The output of {matrix.name}, a {type(matrix.module).__name__}, is not its input times its weight: the "
            f"relative error is {error:.2g}, so the weight is packed, scaled or computed from others. Only plain dense "
            "weights can be edited; load the model with such weights."
        )


def _product_error(matrix: Matrix, call: Call) -> float:
    """Return the relative error of some features of a module's output against its input times its weight."""
    weight = whole(matrix.module.weight).detach()  # type: ignore[arg-type]
    weight = weight.T if matrix.is_transposed else weight
    step = max(1, len(weight) // PROBE_ROWS)
    expected = call.key.cpu().double() @ weight[::step].cpu().double().T
    bias = getattr(matrix.module, "bias", None)
    if bias is not None:
        expected += whole(bias).detach()[::step].cpu().double()
    found = call.output[:, ::step].cpu().double()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def tolerance_of(values: Tensor) -> float:
    """Return the relative error that a product may have by rounding in the dtype of its result."""
    return max(MIN_TOLERANCE, 2 * torch.finfo(values.dtype).eps)


def rows_of(output: Any) -> Tensor:
    """Return a module's output, or the first of several, as (tokens, features)."""
    while not isinstance(output, Tensor):
        output = output[0]
    values = whole(output)
    return values.reshape(-1, values.shape[-1])
