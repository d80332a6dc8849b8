"""Find the down-projection of an MLP by what it does, and make sure that it is a plain matrix product.

A few random states are run through the MLP alone. The down-projection is the matrix whose output is the MLP's output,
up to a factor and an offset that do not depend on the input.
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
LEAST_TOLERANCE = 1e-3
"""Relative error that TF32 stays below; a matrix that does something else is off by a tenth or more."""


@dataclass(frozen=True)
class Matrix:
    """A module of an MLP that multiplies by a matrix.

    Attributes:
        name: in the model's state dict, without `.weight`.
        module: what holds the weight.
        outer: the module around it whose output the MLP uses, as of peft; else the module itself.
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
        """Size of its output; None where the module does not say."""
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
    """What an MLP did with some states.

    Attributes:
        states: (tokens, hidden size) its input.
        output: (tokens, hidden size).
        calls: for each matrix that was called, by its place in a list, what went through it, in the order of calls.
    """

    states: Tensor
    output: Tensor
    calls: dict[int, _Call]

    def ends_in(self, place: int) -> bool:
        """Whether the output is a matrix's, up to a factor and an offset for each feature.

        Some MLPs, as CPM-Ant's, add the states themselves.
        """
        last = self.calls[place].outer
        if last is None or last.shape != self.output.shape:
            return False
        states, output, last = (values.cpu().double() for values in (self.states, self.output, last))
        if not (output.isfinite().all() and last.isfinite().all()):
            return True
        allowed = _tolerance(self.output) * output.norm()
        return any(_is_multiple(rest, last, allowed) for rest in (output, output - states))


@dataclass
class _Call:
    """What went through a matrix.

    Attributes:
        key: (tokens, d_in) its input.
        output: (tokens, d_out) of its module.
        outer: (tokens, d_out) of the module around it.
    """

    key: Tensor
    output: Tensor
    outer: Tensor | None = None


def find_matrix(name: str, mlp: nn.Module, hidden_size: int) -> Matrix:
    """The down-projection of an MLP.

    Args:
        name: of the MLP in the model's state dict.
        mlp: the MLP. On the meta device it cannot be run: of several matrices that fit, the last is taken.
        hidden_size: features of the residual stream.

    Raises:
        InputError: there is none, its weight is not dense or not whole, or no single matrix gives the MLP's output.
    """
    found = [
        Matrix(f"{name}.{child}" if child else name, module, outer)
        for child, module, outer in own_modules(mlp)
        if _is_matrix(module)
    ]
    if not found:
        raise InputError(f"{name} has no dense matrix; its modules are {[type(m).__name__ for m in mlp.modules()]}.")
    fitting = [matrix for matrix in found if matrix.features in (hidden_size, None)]
    chosen = fitting[-1] if fitting else found[-1]
    if len(fitting) > 1 and _can_run(mlp):
        chosen = _of_output(name, mlp, fitting, hidden_size)
    _check_dense(chosen)
    if chosen.features != hidden_size:
        raise InputError(
            f"{chosen.name} returns {chosen.features} features, but the hidden size is {hidden_size}: "
            "it is not a down-projection that rocr knows how to edit."
        )
    return chosen


def check_matrix(name: str, mlp: nn.Module, matrix: Matrix, hidden_size: int) -> None:
    """Make sure that the MLP's output is its down-projection's, and that this is its input times its weight.

    Values that are not finite pass: reading the model then tells. Of an MLP that cannot be run alone, the product is
    checked and not the output.

    Raises:
        InputError: the MLP does something else; says what.
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
            f"{name} computes its output without calling {matrix.name}, as a fused kernel does, so that the keys "
            "cannot be read. Load the model with MLPs that call their modules."
        )
    if not run.ends_in(0):
        raise InputError(
            f"The output of {name} is not that of its last matrix {matrix.name}, also not up to a factor: an edit of "
            "that weight alone would not move it as it is meant to. rocr edits MLPs that end in one matrix."
        )
    _check_product(matrix, run.calls[0])


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix, quantised or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "qweight") or "Linear" in type(module).__name__


def _can_run(mlp: nn.Module) -> bool:
    """Whether an MLP is loaded and has some weights that are not quantised, in whose dtype states can be made."""
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
        # Quantised weights of torchao and quanto are tensors of a class of their own that call themselves bfloat16.
        or not (type(weight.data) is Tensor or is_sharded(weight))
    ):
        held = "no plain weight"
        if isinstance(weight, Tensor):
            held = f"{weight.dtype} of shape {tuple(weight.shape)}"
            if type(weight) not in (Tensor, nn.Parameter):
                held = f"a {type(weight).__name__} that stands for {held}"
        raise InputError(
            f"{matrix.name} is a {type(module).__name__} that holds {held}: only dense float32, bfloat16 and float16 "
            "weights can be edited, and no quantised ones. Load the model with such weights."
        )
    flaw = flaw_of(weight)
    if flaw is not None:
        raise InputError(
            f"{matrix.name} {flaw}: rocr edits weights that are whole, or split along their inputs by tensor "
            "parallelism. Load the model in one process, or with a tp_plan."
        )


def _of_output(name: str, mlp: nn.Module, matrices: Sequence[Matrix], hidden_size: int) -> Matrix:
    """Of several matrices, the one whose output is the MLP's; the last where values that are not finite tell nothing.

    Raises:
        InputError: there is none, or the MLP cannot be run.
    """
    run = _run(name, mlp, matrices, hidden_size)
    fitting = [matrices[i] for i in run.calls if run.ends_in(i)]
    if not fitting:
        names = ", ".join(matrix.name.removeprefix(f"{name}.") for matrix in matrices)
        raise InputError(
            f"{name} has several matrices that return {hidden_size} features ({names}), and its output is that of none "
            "of them, as of a sum of branches: there is no single down-projection to edit. rocr edits MLPs that end in "
            "one matrix."
        )
    return fitting[-1]


@torch.no_grad()
def _run(name: str, mlp: nn.Module, matrices: Sequence[Matrix], hidden_size: int) -> _Run:
    """Run random states through an MLP alone.

    Raises:
        InputError: the MLP raised an exception.
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
        # Not by calling the module: a call would go to a compiled copy, which runs no hooks.
        output = mlp.forward(states, *[torch.zeros_like(states)] * _other_inputs(mlp.forward))
        return _Run(_rows(states), _rows(output), calls)


def _other_inputs(forward: Callable[..., Any]) -> int:
    """How many tensors an MLP needs besides the states, such as the residual that Bloom's adds to its output."""
    needed = [
        parameter
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return max(0, len(needed) - 1)


@contextmanager
def _recorded(matrix: Matrix, place: int, calls: dict[int, _Call]) -> Iterator[None]:
    """Within the context, what goes through a matrix is recorded."""

    def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.pop(place, None)
        calls[place] = _Call(_rows(whole_input(module, input_of(inputs, named))), _rows(output))

    def keep_outer(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if place in calls:
            calls[place].outer = _rows(output)

    handles: list[RemovableHandle] = []
    try:
        handles.append(matrix.module.register_forward_hook(keep, with_kwargs=True))
        handles.append(matrix.outer.register_forward_hook(keep_outer))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: Any) -> Tensor:
    """A module's output, or the first of several, as (tokens, features)."""
    while not isinstance(output, Tensor):
        output = output[0]
    values = whole(output)
    return values.reshape(-1, values.shape[-1])


def _is_multiple(values: Tensor, of: Tensor, allowed: Tensor) -> bool:
    """Whether values (tokens, features) are others times a factor, and an offset, for each feature.

    Args:
        values: float64.
        of: float64.
        allowed: norm of what may be left over by rounding; it is never most of the values.
    """
    values, of = values - values.mean(dim=0), of - of.mean(dim=0)
    factor = (values * of).sum(dim=0) / of.square().sum(dim=0).clamp(min=1e-300)
    return bool((values - factor * of).norm() <= torch.minimum(allowed, values.norm() / 3))


@torch.no_grad()
def _alone(matrix: Matrix) -> _Call:
    """What goes through a matrix that is called on random keys."""
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
            f"The output of {matrix.name}, a {type(matrix.module).__name__}, is not its input times its weight, but "
            f"{error:.2g} of its norm away: the weight is packed, scaled or computed from others. Only plain dense "
            "weights can be edited; load the model with such weights."
        )


def _product_error(matrix: Matrix, call: _Call) -> float:
    """How far some features of a module's output are from its input times its weight, as a share of their norm."""
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
    """Relative error of a product in the dtype of its result, with room."""
    return max(LEAST_TOLERANCE, 2 * torch.finfo(values.dtype).eps)
