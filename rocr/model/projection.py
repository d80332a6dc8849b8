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

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.io.dtypes import is_supported
from rocr.model.hooks import evaluating, input_of
from rocr.model.matrix import PROBE_TOKENS, Call, Matrix, check_dense, check_product, is_matrix, rows_of, tolerance_of
from rocr.model.tensor_parallel import whole_input
from rocr.model.wrappers import own_modules, uncompiled


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
    calls: dict[int, Call]

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
        allowed = tolerance_of(self.output) * output.norm()
        return any(_is_multiple(rest, last, allowed) for rest in (output, output - states))


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
        if is_matrix(module)
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
    check_dense(chosen)
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
        check_product(matrix)
        return
    if not run.calls:
        raise InputError(
            f"{name} computes its output without calling {matrix.name}, as a fused kernel does, so its keys cannot be "
            "read. Load the model with MLPs that call their modules."
        )
    if not run.ends_in(0) and not _carries(name, mlp, matrix, hidden_size):
        raise InputError(
            f"The output of {name} is not that of its last matrix {matrix.name}, even up to a factor: an edit of that "
            "weight would not have the intended effect. rocr edits MLPs that end in one matrix."
        )
    check_product(matrix, run.calls[0])


def _can_run(mlp: nn.Module) -> bool:
    """Return whether an MLP is loaded and has a weight that is not quantised, whose dtype the states can have."""
    parameters = list(mlp.parameters())
    is_loaded = all(parameter.device.type != "meta" for parameter in parameters)
    return is_loaded and any(is_supported(parameter.dtype) for parameter in parameters)


def _of_output(name: str, mlp: nn.Module, matrices: Sequence[Matrix], hidden_size: int) -> Matrix:
    """Return the matrix whose output is the MLP's output; the last one called if several fit or values are not finite.

    Raises:
        InputError: There is no such matrix, or the MLP cannot be run.
    """
    run = _run(name, mlp, matrices, hidden_size)
    fitting = [matrices[i] for i in run.calls if run.ends_in(i)]
    fitting = fitting or [matrices[i] for i in run.calls if _carries(name, mlp, matrices[i], hidden_size)]
    if not fitting:
        names = ", ".join(matrix.name.removeprefix(f"{name}.") for matrix in matrices)
        raise InputError(
            f"{name} has several matrices that return {hidden_size} features ({names}), and its output is not that of "
            "one of them, as if branches are added: there is no single down-projection to edit. rocr edits MLPs that "
            "end in one matrix."
        )
    return fitting[-1]


def _carries(name: str, mlp: nn.Module, matrix: Matrix, hidden_size: int) -> bool:
    """Return whether each feature of an MLP's output is that of a matrix times a gate that other matrices compute.

    The output of the matrix is replaced by constants: the MLP's output must be constant without it, and otherwise
    change in the same features, in proportion.
    """
    features = torch.arange(hidden_size) % 2
    runs = []
    for constant in (0 * features, features, 2 * features):
        with _replaced(matrix, constant):
            runs.append(_run(name, mlp, [], hidden_size).output)
    tolerance = tolerance_of(runs[0])
    without, once, twice = (output.cpu().double() for output in runs)
    if without.shape[-1] != hidden_size or not all(output.isfinite().all() for output in runs):
        return False
    allowed = tolerance * (without.norm() + twice.norm())
    once, twice = once - without, twice - without
    is_constant = (without - without.mean(dim=0)).norm() <= allowed
    is_own = once[:, features == 0].norm() <= allowed and (once[:, features == 1].norm(dim=0) > 0).all()
    return bool(is_constant and is_own and (twice - 2 * once).norm() <= allowed)


@contextmanager
def _replaced(matrix: Matrix, constant: Tensor) -> Iterator[None]:
    """Replace each output of a matrix by `constant` (d_out,), inside the context."""

    def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return constant.to(output).expand_as(output)

    handle = matrix.outer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _run(name: str, mlp: nn.Module, matrices: Sequence[Matrix], hidden_size: int) -> _Run:
    """Run random states through an MLP, without the rest of the model.

    Raises:
        InputError: The MLP raises an exception.
    """
    parameter = next(parameter for parameter in mlp.parameters() if is_supported(parameter.dtype))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, PROBE_TOKENS, hidden_size, generator=generator).to(parameter.device, parameter.dtype)
    calls: dict[int, Call] = {}
    with ExitStack() as stack:
        stack.enter_context(calling(f"{name}, run alone on random states,"))
        stack.enter_context(torch.autocast(parameter.device.type, enabled=False))
        stack.enter_context(evaluating(mlp))
        stack.enter_context(uncompiled())
        for i, matrix in enumerate(matrices):
            stack.enter_context(_recorded(matrix, i, calls))
        # Use `forward`: calling the module could run a compiled copy, which does not call hooks.
        output = mlp.forward(states, *[torch.zeros_like(states)] * _other_inputs(mlp.forward))
        return _Run(rows_of(states), rows_of(output), calls)


def _other_inputs(forward: Callable[..., Any]) -> int:
    """Return how many tensors an MLP needs besides the states, such as the residual that Bloom's MLP adds."""
    needed = [
        parameter
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return max(0, len(needed) - 1)


@contextmanager
def _recorded(matrix: Matrix, index: int, calls: dict[int, Call]) -> Iterator[None]:
    """Record the last call of a matrix in `calls[index]`, inside the context."""

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.pop(index, None)  # to keep the order of the last calls
        calls[index] = Call(rows_of(whole_input(module, input_of(inputs, named))), rows_of(output))

    def record_outer(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if index in calls:
            calls[index].outer = rows_of(output)

    handles: list[RemovableHandle] = []
    try:
        handles.append(matrix.module.register_forward_hook(record, with_kwargs=True))
        handles.append(matrix.outer.register_forward_hook(record_outer))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
