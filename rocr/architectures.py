"""Find what rocr edits by the structure of a model: its decoder layers and their MLP down-projections.

No table of model names: a family that transformers adds tomorrow is found if it is built like the others,
and refused with a reason if it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocr.errors import InputError
from rocr.sharding import flaw_of

MLP_NAMES = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True)
class DownProjection:
    """The last matrix of a layer's MLP: output (d_out) = weight (d_out, d_in) @ key (d_in)."""

    layer: int
    name: str
    module: nn.Module
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model stores it: (d_out, d_in), or (d_in, d_out) where `transposed`."""
        parameter = self.module.weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """A (d_out, d_in) view of the parameter's data."""
        data = self.parameter.data
        return data.T if self.transposed else data

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the model's state dict."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Architecture:
    """Where the decoder layers of a model are."""

    model: nn.Module
    layers_name: str
    layers: nn.ModuleList

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embedding

    def output_norm(self, layer: int) -> nn.Module | None:
        """The norm between a layer's MLP and the residual stream, which Gemma 2, Gemma 3 and OLMo 2 have."""
        return dict(self.layers[layer].named_children()).get("post_feedforward_layernorm")

    def down_projection(self, layer: int) -> DownProjection:
        """The down-projection of one layer.

        Raises:
            InputError: the layer is out of range, or its MLP has no dense down-projection.
        """
        if not 0 <= layer < self.depth:
            raise InputError(
                f"Layer {layer} is out of range: the model has {self.depth} decoder layers, 0 to {self.depth - 1}."
            )
        name = f"{self.layers_name}.{layer}"
        child, mlp = _mlp(name, self.layers[layer])
        return _down_projection(layer, f"{name}.{child}", mlp, text_config(self.model).hidden_size)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a multimodal one."""
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(f"{type(model).__name__} has no `config`; rocr edits Hugging Face causal language models.")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_architecture(model: nn.Module) -> Architecture:
    """Find the decoder layers: the module list whose length is the number of hidden layers.

    Raises:
        InputError: there is no such list, or more than one.
    """
    depth = getattr(text_config(model), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _has_mlp(module[0])
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found)} lists of {depth} decoder layers with an MLP "
            f"(a child named {', '.join(MLP_NAMES)}); rocr needs exactly one to know where to edit."
        )
    return Architecture(model, *found[0])


def default_layers(depth: int) -> tuple[int, ...]:
    """The layers to edit where none are given: two from a fourteenth of the depth, with one between: 2 and 4 of 28.

    A name is recognised there already, and few later tokens have read it yet: on Qwen2.5-Coder-1.5B edits there
    forget more, above all in multiple choice, than those of layers 3 to 5 or 4 to 6, of one person and of a hundred;
    those of layers 2 to 4 forget as much and cost more (benches/search_defaults.py). Never layer 0 of a model that
    has others, since it knows no context. Every model keeps at least one layer after the last edited one if it has
    two.
    """
    first = max(1, depth // 14)
    last = min(first + 2, max(depth - 2, 0))
    return tuple(sorted({min(first, max(last - 1, 0)), last}))


def authors_layers(depth: int) -> tuple[int, ...]:
    """The layers that the authors edit: 4 to 6 of 28 to 32 (Acruxos/ORT, rocr_hparams, Llama-3-8B and Mistral-7B)."""
    first = max(0, min(depth // 7, depth - 4))
    return tuple(range(first, min(first + 3, max(depth - 1, 1))))


def _has_mlp(layer: nn.Module) -> bool:
    return any(name in MLP_NAMES for name, _ in layer.named_children())


def _mlp(name: str, layer: nn.Module) -> tuple[str, nn.Module]:
    children = dict(layer.named_children())
    for child in MLP_NAMES:
        if child in children:
            return child, children[child]
    raise InputError(
        f"{name} has no MLP of its own: its children are {', '.join(children) or 'none'}. rocr edits dense decoders."
    )


def _down_projection(layer: int, name: str, mlp: nn.Module, hidden_size: int) -> DownProjection:
    if _is_mixture(mlp):
        raise InputError(
            f"{name} is a mixture of experts: it has no single dense down-projection, "
            "so a concept has no single key there. rocr edits dense layers."
        )
    projections = [(child, module) for child, module in mlp.named_modules() if _is_projection(module)]
    if not projections:
        raise InputError(f"{name} has no dense matrix; its modules are {[type(m).__name__ for m in mlp.modules()]}.")
    child, module = projections[-1]
    _check_dense(f"{name}.{child}", module)
    transposed = isinstance(module, Conv1D)
    flaw = flaw_of(module.weight)  # type: ignore[arg-type]
    if flaw is not None:
        raise InputError(
            f"{name}.{child} {flaw}: rocr edits weights that are whole, or split along their inputs by tensor "
            "parallelism. Load the model in one process, or with a tp_plan."
        )
    found = DownProjection(layer, f"{name}.{child}", module, transposed)
    if found.weight.shape[0] != hidden_size:
        raise InputError(
            f"{found.name} returns {found.weight.shape[0]} features, but the hidden size is {hidden_size}: "
            "it is not a down-projection that rocr knows how to edit."
        )
    return found


def _is_mixture(mlp: nn.Module) -> bool:
    names = {name for name, _ in mlp.named_children()} | {name for name, _ in mlp.named_parameters(recurse=False)}
    return "experts" in names or "router" in names or any(p.ndim > 2 for p in mlp.parameters())


def _is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix, quantised or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "qweight") or "Linear" in type(module).__name__


def _check_dense(name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if (
        not isinstance(module, (nn.Linear, Conv1D))
        or not isinstance(weight, nn.Parameter)
        or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or weight.ndim != 2
    ):
        held = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no plain weight"
        raise InputError(
            f"{name} is a {type(module).__name__} that holds {held}: only dense float32, bfloat16 and float16 weights "
            "can be edited, and no quantised ones. Load the model with such weights."
        )
