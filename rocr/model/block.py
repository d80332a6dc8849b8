"""A weight that is edited: the down-projection of a dense MLP, or of one expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A weight that is edited: the down-projection of a dense MLP or of one expert, d_out outputs of d_in inputs.

    Attributes:
        layer: The decoder layer.
        name: The name of the module in the state dict of the model without wrappers and adapters.
        module: The module that holds the weight; under an adapter of peft, the base layer.
        transposed: Whether the weight is stored as (d_in, d_out).
        attribute: The name of the parameter in the module.
        expert: The index of the expert if one parameter holds the weights of several. None if it holds this one only.
        experts: The number of experts whose weights the parameter holds.
    """

    layer: int
    name: str
    module: nn.Module
    transposed: bool
    attribute: str = "weight"
    expert: int | None = None
    experts: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, alone or with those of other experts."""
        parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def stored(self) -> Tensor:
        """A view of the weight as the parameter stores it: (d_out, d_in), or (d_in, d_out) if `transposed`."""
        data = self.parameter.data
        return data if self.expert is None else data.view(self.experts, -1, data.shape[-1])[self.expert]

    @property
    def weight(self) -> Tensor:
        """A (d_out, d_in) view of the weight."""
        return self.stored.T if self.transposed else self.stored

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the model's state dict."""
        return f"{self.name}.{self.attribute}" if self.name else self.attribute

    @property
    def label(self) -> str:
        """The parameter's name for messages, with the index of the expert."""
        return self.parameter_name if self.expert is None else f"{self.parameter_name}[{self.expert}]"
