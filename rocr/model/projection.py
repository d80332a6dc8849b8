"""Find the down-projection of an MLP by running the MLP, and check that it is a plain matrix product.

A few random states are run through the MLP without the rest of the model. The down-projection is the matrix whose
output is the MLP's output, up to a factor and an offset that do not depend on the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.io.dtypes import is_supported
from rocr.model.hooks import evaluating, input_of
from rocr.model.tensor_parallel import flaw_of, is_sharded, whole, whole_input
from rocr.model.wrappers import own_modules, uncompiled

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


@dataclass(frozen=True)
class _Run:
    """A run of an MLP on some states.

    Attributes:
        states: (tokens, hidden size) the input.
        output: (tokens, hidden size) the output.
        calls: The call of each matrix by its index in a list, in the order of the calls.
    """

    states: Tensor
    output: Tensor
    calls: dict[int, _Call]

    def ends_in(self, index: int) -> bool:
        """Return whether the output is that of a matrix, up to a factor and an offset for each feature.

        Some MLPs, such as CPM-Ant's, add the states to it.
        """
        last = self.calls[index].outer
        if last is None or last.shape != self.output.shape:
            return False
        states, output, last = (values.cpu().double() for values in (self.states, self.output, last))
        if not (output.isfinite().all() and last.isfinite().all()):
            return True
        allowed = _tolerance(self.output) * output.norm()
        return any(_is_multiple(rest, last, allowed) for rest in (output, output - states))


@dataclass
class _Call:
    """A call of a matrix.

    Attributes:
        key: (tokens, d_in) the input.
        output: (tokens, d_out) the output of the module.
        outer: (tokens, d_out) the output of the wrapper around it; None until that was called.
    """

    key: Tensor
    output: Tensor
    outer: Tensor | None = None


def find_matrix(name: str, mlp: nn.Module, hidden_size: int) -> Matrix:
    """Find the down-projection of an MLP.

    Args:
        name: The name of the MLP in the model's state dict.
        mlp: The MLP. If it is on the meta device and cannot be run, the last matrix of the right size is returned.
        hidden_size: The number of features of the residual stream.

    Raises:
        InputError: There is no down-projection, its weight is not dense or is split along its outputs, or the MLP's
            output is not that of a single matrix.
    """
    found = [
        Matrix(f"{name}.{child}" if child else name, module, outer)
        for child, module, outer in own_modules(mlp)
        if _is_matrix(module)
    ]
    if not found:
        raise InputError(
            f"{name} has no dense matrix, so rocr cannot edit it; its modules are "
            f"{[type(module).__name__ for module in mlp.modules()]}."
        )
    fitting = [matrix for matrix in found if matrix.features in (hidden_size, None)]
    chosen = fitting[-1] if fitting else found[-1]
    if len(fitting) > 1 and _can_run(mlp):
        chosen = _of_output(name, mlp, fitting, hidden_size)
    _check_dense(chosen)
    if chosen.features != hidden_size:
        raise InputError(
            f"{chosen.name} returns {chosen.features} features, but the hidden size is {hidden_size}: it is not a "
            "down-projection, and rocr cannot edit this layer."
        )
    return chosen


def check_matrix(name: str, mlp: nn.Module, matrix: Matrix, hidden_size: int) -> None:
    """Raise InputError unless the MLP's output is that of its down-projection, and this is its input times its weight.

    Values that are not finite pass: reading keys reports them. If the MLP cannot be run alone, only the product is
    checked.

    Args:
        name: The name of the MLP in the model's state dict.
        mlp: The MLP.
        matrix: The down-projection, from `find_matrix`.
        hidden_size: The number of features of the residual stream.

    Raises:
        InputError: The MLP computes something else; the message says what.
    """
    if not _can_run(mlp):
        return
    try:
        run = _run(name, mlp, [matrix], hidden_size)
    except InputError:
        _check_product(matrix, _alone(matrix))
        return
    if not run.calls:
        raise InputError(
            f"{name} computes its output without calling {matrix.name}, as a fused kernel does, so its keys cannot be "
            "read. Load the model with MLPs that call their modules."
        )
    if not run.ends_in(0):
        raise InputError(
            f"The output of {name} is not that of its last matrix {matrix.name}, even up to a factor: an edit of that "
            "weight would not have the intended effect. rocr edits MLPs that end in one matrix."
        )
    _check_product(matrix, run.calls[0])


def _is_matrix(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix, quantised or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "qweight") or "Linear" in type(module).__name__


def _can_run(mlp: nn.Module) -> bool:
    """Return whether an MLP is loaded and has a weight that is not quantised, whose dtype the states can have."""
    parameters = list(mlp.parameters())
    is_loaded = all(parameter.device.type != "meta" for parameter in parameters)
    return is_loaded and any(is_supported(parameter.dtype) for parameter in parameters)


def _check_dense(matrix: Matrix) -> None:
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
            "weights can be edited, not quantised ones. Load the model with such weights, or edit its files with `rocr "
            "unlearn --quantised`."
        )
    flaw = flaw_of(weight)
    if flaw is not None:
        raise InputError(
            f"{matrix.name} {flaw}: rocr edits weights that are in one process, or split along their inputs by tensor "
            "parallelism. Load the model in one process, or with a tp_plan."
        )


def _of_output(name: str, mlp: nn.Module, matrices: Sequence[Matrix], hidden_size: int) -> Matrix:
    """Return the matrix whose output is the MLP's output; the last one called if several fit or values are not finite.

    Raises:
        InputError: There is no such matrix, or the MLP cannot be run.
    """
    run = _run(name, mlp, matrices, hidden_size)
    fitting = [matrices[i] for i in run.calls if run.ends_in(i)]
    if not fitting:
        names = ", ".join(matrix.name.removeprefix(f"{name}.") for matrix in matrices)
        raise InputError(
            f"{name} has several matrices that return {hidden_size} features ({names}), and its output is not that of "
            "one of them, as if branches are added: there is no single down-projection to edit. rocr edits MLPs that "
            "end in one matrix."
        )
    return fitting[-1]


@torch.no_grad()
def _run(name: str, mlp: nn.Module, matrices: Sequence[Matrix], hidden_size: int) -> _Run:
    """Run random states through an MLP, without the rest of the model.

    Raises:
        InputError: The MLP raises an exception.
    """
    parameter = next(parameter for parameter in mlp.parameters() if is_supported(parameter.dtype))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, PROBE_TOKENS, hidden_size, generator=generator).to(parameter.device, parameter.dtype)
    calls: dict[int, _Call] = {}
    with ExitStack() as stack:
        stack.enter_context(calling(f"{name}, run alone on random states,"))
        stack.enter_context(torch.autocast(parameter.device.type, enabled=False))
        stack.enter_context(evaluating(mlp))
        stack.enter_context(uncompiled())
        for i, matrix in enumerate(matrices):
            stack.enter_context(_recorded(matrix, i, calls))
        # Use `forward`: calling the module could run a compiled copy, which does not call hooks.
        output = mlp.forward(states, *[torch.zeros_like(states)] * _other_inputs(mlp.forward))
        return _Run(_rows(states), _rows(output), calls)


def _other_inputs(forward: Callable[..., Any]) -> int:
    """Return how many tensors an MLP needs besides the states, such as the residual that Bloom's MLP adds."""
    needed = [
        parameter
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return max(0, len(needed) - 1)


@contextmanager
def _recorded(matrix: Matrix, index: int, calls: dict[int, _Call]) -> Iterator[None]:
    """Record the last call of a matrix in `calls[index]`, inside the context."""

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.pop(index, None)  # to keep the order of the last calls
        calls[index] = _Call(_rows(whole_input(module, input_of(inputs, named))), _rows(output))

    def record_outer(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if index in calls:
            calls[index].outer = _rows(output)

    handles: list[RemovableHandle] = []
    try:
        handles.append(matrix.module.register_forward_hook(record, with_kwargs=True))
        handles.append(matrix.outer.register_forward_hook(record_outer))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: Any) -> Tensor:
    """Return a module's output, or the first of several, as (tokens, features)."""
    while not isinstance(output, Tensor):
        output = output[0]
    values = whole(output)
    return values.reshape(-1, values.shape[-1])


def _is_multiple(values: Tensor, of: Tensor, allowed: Tensor) -> bool:
    """Return whether values are others times a factor plus an offset, both for each feature.

    Args:
        values: (tokens, features) float64.
        of: (tokens, features) float64.
        allowed: The norm of the difference that rounding may cause; at most a third of the values' norm is allowed.
    """
    values, of = values - values.mean(dim=0), of - of.mean(dim=0)
    factor = (values * of).sum(dim=0) / of.square().sum(dim=0).clamp(min=1e-300)
    return bool((values - factor * of).norm() <= torch.minimum(allowed, values.norm() / 3))


@torch.no_grad()
def _alone(matrix: Matrix) -> _Call:
    """Call a matrix on random keys, without the rest of the MLP."""
    weight = matrix.module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(PROBE_TOKENS, weight.shape[0 if matrix.is_transposed else 1], generator=generator)
    keys = keys.to(weight.device, weight.dtype)
    with calling(f"{matrix.name}, run alone on random keys,"), torch.autocast(weight.device.type, enabled=False):
        return _Call(keys, _rows(matrix.module(keys)))


def _check_product(matrix: Matrix, call: _Call) -> None:
    error = _product_error(matrix, call)
    if error > _tolerance(call.output):
        raise InputError(
            f"The output of {matrix.name}, a {type(matrix.module).__name__}, is not its input times its weight: the "
            f"relative error is {error:.2g}, so the weight is packed, scaled or computed from others. Only plain dense "
            "weights can be edited; load the model with such weights."
        )


def _product_error(matrix: Matrix, call: _Call) -> float:
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


def _tolerance(values: Tensor) -> float:
    """Return the relative error that a product may have by rounding in the dtype of its result."""
    return max(MIN_TOLERANCE, 2 * torch.finfo(values.dtype).eps)
