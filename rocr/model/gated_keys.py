"""Read the keys of a mixture of experts: the inputs of its down-projections, times the share that reaches its output.

A mixture computes y = Σ g_e W_e k_e over the experts e that a token is routed to. Its code is not known here. While the
mixture runs, each product with one of its weights is recorded, with the input k_e. The gate g_e and the token of each
product follow from the derivative of y with respect to the product's result, which is g_e times the identity at one
token and zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rocr.errors import InputError
from rocr.model.capture import first_tensor

FORM_TOLERANCE = 1e-2
"""Largest relative difference of a derivative from a gate times the identity; rounding to bfloat16 causes 4e-3."""
_LINEAR = {"linear"}
_PRODUCTS = {"matmul", "__matmul__", "mm", "bmm"}
_SUMS_OF_PRODUCTS = {"addmm", "baddbmm"}


@dataclass(frozen=True)
class GatedKeys:
    """The keys of one weight in one call of a mixture.

    Attributes:
        weight: The index of the parameter among those that are read.
        expert: The index of the expert in the parameter; 0 if the parameter is that of one expert.
        experts: The number of experts in the parameter.
        transposed: Whether the parameter stores the weight as (d_in, d_out).
        tokens: (r,) int64 indices of tokens, counted over (batch, tokens).
        gates: (r,) float32, the share g of the product that reaches the output.
        inputs: (r, d_in) the inputs k, in the dtype of the model.
    """

    weight: int
    expert: int
    experts: int
    transposed: bool
    tokens: Tensor
    gates: Tensor
    inputs: Tensor

    @property
    def keys(self) -> Tensor:
        """The gated keys g k, (r, d_in) float32."""
        return self.inputs.float() * self.gates[:, None]

    def rows(self, chosen: Tensor) -> GatedKeys:
        """Return some of the rows, given by their indices."""
        return replace(self, tokens=self.tokens[chosen], gates=self.gates[chosen], inputs=self.inputs[chosen])


@dataclass(frozen=True)
class _Product:
    """A product of the inputs (r, d_in) that one expert gets with its weight.

    Attributes:
        result: The result (…, d_out), or those of all experts (experts, …, d_out).
        part: The index of the expert in `result`. None if it is the result of this expert alone.
    """

    weight: int
    expert: int
    experts: int
    transposed: bool
    inputs: Tensor
    result: Tensor
    part: int | None = None


@contextmanager
def gated_keys_hook(
    mixture: nn.Module,
    parameters: Sequence[nn.Parameter],
    receive: Callable[[Tensor, list[GatedKeys]], None],
    name: str | None = None,
) -> Iterator[None]:
    """Call `receive` after each call of a mixture, inside the context, with its output and its gated keys.

    Args:
        mixture: The module whose output the experts' outputs add up to.
        parameters: The parameters whose products are recorded.
        receive: Called with the output (tokens, d_out) and one entry for each expert that was called.
        name: The name of the mixture, if all parameters are known to be weights of its experts. None leaves out
            products that do not reach the output as a gate times their result.

    Raises:
        InputError: In the forward pass, if a product with a known weight reaches the output in another way.
    """
    forward = mixture.forward
    had_own = "forward" in vars(mixture)

    def recorded(*arguments: Any, **options: Any) -> Any:
        recorder = _Recorder(parameters)
        with ExitStack() as stack:
            stack.enter_context(eager_experts(mixture))
            stack.enter_context(_without_gradients(mixture))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(recorder)
            output = forward(*arguments, **options)
        states = first_tensor(output)
        receive(states.detach().reshape(-1, states.shape[-1]), recorder.gated_keys(states, name))
        return _detached(output)

    mixture.forward = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had_own:
            mixture.forward = forward  # type: ignore[method-assign]
        else:
            del mixture.forward


@contextmanager
def eager_experts(mixture: nn.Module) -> Iterator[None]:
    """Let experts of transformers run as a loop of products inside the context, not as one fused call."""
    configs = {id(config): config for module in mixture.modules() if (config := getattr(module, "config", None))}
    former = [(config, vars(config).get("_experts_implementation_internal", ...)) for config in configs.values()]
    former = [(config, value) for config, value in former if value is not ...]
    try:
        for config, _ in former:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, value in former:
            config._experts_implementation_internal = value


class _Recorder(TorchFunctionMode):
    """Records the products with some parameters, and makes each result a leaf of the graph of derivatives."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._parameters = list(parameters)
        self._places: dict[int, list[int]] = {}
        for i, parameter in enumerate(self._parameters):
            self._places.setdefault(parameter.untyped_storage().data_ptr(), []).append(i)
        self._products: list[_Product] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; if it is a product with one of the parameters, record it."""
        kwargs = kwargs or {}
        found = self._operands(getattr(function, "__name__", ""), args, kwargs)
        if found is None:
            return function(*args, **kwargs)
        with torch.no_grad():
            result = function(*args, **kwargs)
        inputs, weight, is_linear, index = found
        leaf = result.detach().requires_grad_()
        self._record(inputs.detach(), weight, is_linear, index, leaf)
        # A copy, since the mixture may change the result in place.
        return leaf.clone()

    def _operands(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, bool, int] | None:
        """Return the inputs, the weight, whether it is used as (d_out, d_in), and the parameter's index."""
        if name in _LINEAR:
            inputs = kwargs["input"] if "input" in kwargs else args[0]
            weight = kwargs["weight"] if "weight" in kwargs else args[1 if "input" not in kwargs else 0]
        elif name in _PRODUCTS and len(args) == 2:
            inputs, weight = args
        elif name in _SUMS_OF_PRODUCTS and len(args) == 3:
            _, inputs, weight = args
        else:
            return None
        if not isinstance(weight, Tensor) or not isinstance(inputs, Tensor):
            return None
        index = self._index(weight)
        return None if index is None else (inputs, weight, name in _LINEAR, index)

    def _index(self, weight: Tensor) -> int | None:
        """Return the index of the parameter that a tensor is, or is a part of."""
        for i in self._places.get(weight.untyped_storage().data_ptr(), ()):
            parameter = self._parameters[i]
            start = parameter.storage_offset()
            if weight.dtype == parameter.dtype and start <= weight.storage_offset() < start + parameter.numel():
                return i
        return None

    def _record(self, inputs: Tensor, weight: Tensor, is_linear: bool, index: int, result: Tensor) -> None:
        parameter = self._parameters[index]
        # The weight is used as (d_out, d_in) in a linear function, otherwise as (d_in, d_out).
        is_view_transposed = weight.stride(-1) != parameter.stride(-1) and weight.shape[-1] > 1
        transposed = is_view_transposed if is_linear else not is_view_transposed
        if weight.ndim == 3:
            self._products += [
                _Product(index, expert, len(weight), transposed, inputs[expert], result, expert)
                for expert in range(len(weight))
            ]
            return
        experts = max(1, parameter.numel() // max(1, weight.numel()))
        expert = (weight.storage_offset() - parameter.storage_offset()) // max(1, weight.numel())
        rows = inputs.reshape(-1, inputs.shape[-1])
        self._products.append(_Product(index, expert, experts, transposed, rows, result))

    def gated_keys(self, output: Tensor, name: str | None) -> list[GatedKeys]:
        """Return the gated keys of the products that reach an output (…, d_out) as a gate times their result.

        Args:
            output: The output of the mixture.
            name: As in `gated_keys_hook`.
        """
        with torch.enable_grad():
            flat = output.reshape(-1, output.shape[-1])
        results = {id(product.result): product.result for product in self._products}
        if not results or not flat.requires_grad:
            return []
        codes = _codes(*flat.shape).to(flat.device, flat.dtype)
        gradients = torch.autograd.grad(flat, list(results.values()), codes, allow_unused=True)
        by_result = dict(zip(results, gradients, strict=True))
        found = []
        for product in self._products:
            gradient = by_result[id(product.result)]
            if gradient is None:
                continue  # the output does not depend on the product
            if gradient.shape[-1] != flat.shape[-1]:
                _check_unknown(name, product)
                continue
            gradient = gradient if product.part is None else gradient[product.part]
            keys = _decoded(product, gradient.reshape(-1, flat.shape[-1]), codes)
            if keys is None:
                _check_unknown(name, product)
            else:
                found.append(keys)
        return found


def _check_unknown(name: str | None, product: _Product) -> None:
    """Raise InputError if a product that cannot be read is one with a known weight of an expert."""
    if name is not None:
        raise InputError(
            f"The result of expert {product.expert} of {name} does not reach the output as a gate times the result, "
            "though it did on the first tokens, so its keys cannot be read. Edit other layers (layers, --layers)."
        )


def _decoded(product: _Product, gradient: Tensor, codes: Tensor) -> GatedKeys | None:
    """Return the gated keys of a product from the derivatives (r, d_out) of the output's product with the codes.

    None if a row of the derivatives is not a gate times the code of a token.
    """
    gradient, codes = gradient.float(), codes.float()
    gates = gradient[:, 0]
    if not gradient.isfinite().all():
        # Of gates that are not finite the token is unknown; keys that are not finite are reported by the caller.
        rows = torch.arange(len(gates), device=gates.device)
        return _keys_of(product, rows, torch.full_like(rows, len(codes) - 1), torch.full_like(gates, torch.nan))
    reached = gates.nonzero().flatten()
    if not len(reached):
        return None if gradient.any() else _keys_of(product, reached, reached, gates[reached])
    gradient, gates = gradient[reached], gates[reached]
    bits = (gradient[:, 1 : 1 + _bits(len(codes))] * gates[:, None] > 0).long()
    tokens = (bits << torch.arange(bits.shape[1], device=bits.device)).sum(dim=1)
    if int(tokens.max()) >= len(codes):
        return None
    difference = (gradient - gates[:, None] * codes[tokens]).abs().amax(dim=1)
    if not (difference <= FORM_TOLERANCE * gates.abs()).all():
        return None
    return _keys_of(product, reached, tokens, gates)


def _keys_of(product: _Product, rows: Tensor, tokens: Tensor, gates: Tensor) -> GatedKeys:
    """Return the gated keys of some rows of a product's inputs, without inputs that are zero."""
    inputs = product.inputs[rows]
    kept = inputs.any(dim=1)
    if not kept.all():
        inputs, tokens, gates = inputs[kept], tokens[kept], gates[kept]
    return GatedKeys(product.weight, product.expert, product.experts, product.transposed, tokens, gates, inputs)


def _codes(tokens: int, features: int) -> Tensor:
    """Return a code of signs for each token (tokens, features): 1, the bits of its index, then signs that all share."""
    bits = _bits(tokens)
    if features < bits + 2:
        raise InputError(f"The layer has {features} features, too few to read a mixture of experts at {tokens} tokens.")
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (features,), generator=generator) * 2 - 1).float()
    codes = signs.repeat(tokens, 1)
    codes[:, 0] = 1
    places = torch.arange(tokens)
    for bit in range(bits):
        codes[:, 1 + bit] = ((places >> bit) & 1) * 2 - 1
    return codes


def _bits(tokens: int) -> int:
    return max(1, (tokens - 1).bit_length())


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Exclude the parameters of a module from derivatives inside the context, to save memory."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, (tuple, list)):
        return type(output)(map(_detached, output))
    return output
