"""Find the decoder layers of a model and their MLP down-projections, which are what rocr edits.

They are found by the structure of the model, without a table of model names: a new family of transformers is supported
if it is built like the others, and refused with a reason if it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.encoder import encoder_config, encoder_layers, is_encoder_decoder, last_matrix
from rocr.model.forward import input_embedding
from rocr.model.kind import LANGUAGE_MODEL, ModelKind
from rocr.model.projection import check_matrix, find_matrix
from rocr.model.wrappers import base_of, own_modules, own_parameters, unwrapped

MLP_NAMES = ("mlp", "feed_forward", "ffn")
CROSS_ATTENTION_NAMES = ("cross_attn", "cross_attention")


@dataclass(frozen=True)
class Block:
    """The last matrix of a layer's MLP: output (d_out) = weight (d_out, d_in) @ key (d_in).

    Attributes:
        layer: The decoder layer.
        name: The name of the module in the state dict of the model without wrappers and adapters.
        module: The module that holds the weight; under an adapter of peft, the base layer.
        transposed: Whether the weight is stored as (d_in, d_out).
    """

    layer: int
    name: str
    module: nn.Module
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model stores it: (d_out, d_in), or (d_in, d_out) if `transposed`."""
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
    """The decoder layers of a model.

    Attributes:
        model: The model of transformers without wrappers, with the active adapters. rocr runs this model and never a
            compiled copy, which does not call hooks.
        layers_name: The name of the list of layers in the model's state dict.
        layers: The list of layers. Of an encoder-decoder, they are those of the encoder.
        kind: How the model reads a text. It is only known of an architecture from `rocr.model.causality.with_kind`;
            before that, it is that of a language model.
    """

    model: nn.Module
    layers_name: str
    layers: nn.ModuleList
    kind: ModelKind = LANGUAGE_MODEL

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        embedding: nn.Module = input_embedding(self.model)
        return embedding

    def down_projection(self, layer: int) -> Block:
        """Return the down-projection of one layer.

        Raises:
            InputError: The layer is out of range, or its MLP has no dense down-projection.
        """
        name, mlp = self._mlp(layer)
        matrix = find_matrix(name, mlp, self.hidden_size)
        return Block(layer, matrix.name, matrix.module, matrix.is_transposed)

    def check_down_projection(self, layer: int) -> None:
        """Run random states through a layer's MLP, to check that an edit of its down-projection works as intended.

        Raises:
            InputError: The output of the MLP is not that of its down-projection, or the output of the down-projection
                is not its input times its weight.
        """
        name, mlp = self._mlp(layer)
        check_matrix(name, mlp, find_matrix(name, mlp, self.hidden_size), self.hidden_size)

    @property
    def hidden_size(self) -> int:
        """The number of features of the residual stream."""
        size: int = text_config(self.model).hidden_size
        return size

    @property
    def encodes_for_decoder(self) -> bool:
        """Whether the layers are those of the encoder of an encoder-decoder."""
        return is_encoder_decoder(self.model)

    def _mlp(self, layer: int) -> tuple[str, nn.Module]:
        """Return the name and the module of a layer's dense MLP."""
        if not 0 <= layer < self.depth:
            raise InputError(
                f"Layer {layer} is out of range: the model has {self.depth} decoder layers, 0 to {self.depth - 1}."
            )
        children = dict(unwrapped(self.layers[layer]).named_children())
        name = f"{self.layers_name}.{layer}"
        child = next((child for child in MLP_NAMES if child in children), None)
        if child is None:
            found = last_matrix(self.layers[layer], self.hidden_size)
            if found is not None:
                return f"{name}.{found[0]}", found[1]
            raise InputError(
                f"{name} has no MLP ({', '.join(MLP_NAMES)}): its children are {', '.join(children) or 'none'}. "
                "rocr edits decoder layers with a dense MLP."
            )
        if any(cross in children for cross in CROSS_ATTENTION_NAMES) and "self_attn" not in children:
            raise InputError(
                f"{name} attends to images only and is skipped for text, so it has no keys. Edit other layers (layers, "
                "--layers)."
            )
        mlp = unwrapped(children[child])
        if _is_mixture(mlp):
            raise InputError(
                f"{name}.{child} is a mixture of experts, which has no single dense down-projection. rocr edits dense "
                "layers."
            )
        return f"{name}.{child}", mlp


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model, also of one inside a multimodal model or a wrapper.

    Raises:
        InputError: The model has no configuration.
    """
    config = getattr(base_of(model), "config", None)
    if config is None:
        raise InputError(f"{type(model).__name__} has no `config`: rocr edits causal language models of transformers.")
    encoder = encoder_config(base_of(model))
    if encoder is not None:
        return encoder
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(model: nn.Module) -> int | None:
    """Return the number of positions of a model; None if its configuration does not name it."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    try:
        return max(1, int(found))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def find_architecture(model: nn.Module) -> Architecture:
    """Find the decoder layers: the language model's module list whose length is the number of hidden layers.

    Of an encoder-decoder, the layers of the encoder are found, since it is the encoder that reads a concept.

    Args:
        model: A causal language model, a text encoder or an encoder-decoder of transformers, which may be inside
            `torch.compile`, data parallelism or peft, and on the meta device.

    Raises:
        InputError: There is no such list, or more than one, or the model is an encoder-decoder that does not read
            text.
    """
    base = base_of(model)
    depth = getattr(text_config(model), "num_hidden_layers", None)
    if is_encoder_decoder(base):
        return Architecture(base, *encoder_layers(base))
    modules = {name: module for name, module, _ in own_modules(base)}
    lists = [name for name, each in modules.items() if isinstance(each, nn.ModuleList) and len(each) == depth]
    found = [name for name in lists if any(map(_has_mlp, modules[name].children()))]
    if not found:
        size = getattr(text_config(base), "hidden_size", None)
        found = [name for name in lists if all(last_matrix(layer, size) for layer in modules[name].children())]
    chosen = _of_the_language_model(base, modules, found)
    if len(chosen) != 1:
        which = f": {', '.join(found)}" if found else ""
        raise InputError(
            f"{type(base).__name__} has {len(found)} lists of {depth} decoder layers with an MLP "
            f"(a child named {', '.join(MLP_NAMES)}){which}; rocr needs exactly one that belongs to the language model."
        )
    layers = modules[chosen[0]]
    assert isinstance(layers, nn.ModuleList)
    return Architecture(base, chosen[0], layers)


def _of_the_language_model(base: nn.Module, modules: Mapping[str, nn.Module], lists: list[str]) -> list[str]:
    """Return the lists of layers that belong to the model with the text configuration, not to a vision tower."""
    kind = type(text_config(base))
    of_text = [name for name in lists if type(_owner(modules, name).config) is kind]
    if len(lists) == 1:
        return of_text
    with calling(f"{type(base).__name__}.get_decoder"):
        decoder: nn.Module = base.get_decoder() if hasattr(base, "get_decoder") else base  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()}
    in_decoder = [name for name in lists if id(modules[name]) in inside]
    return [name for name in of_text if name in in_decoder or not in_decoder]


def _owner(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the model that a module belongs to: the innermost module around it that has a configuration."""
    while name and not hasattr(modules[name], "config"):
        name = name.rpartition(".")[0]
    return modules[name]


def default_layers(depth: int) -> tuple[int, ...]:
    """Return the default layers to edit: layers n and n + 2 with n = depth / 14, which are 2 and 4 of 28.

    The model recognises a name in these layers, and few later tokens have read it yet. On Qwen2.5-Coder-1.5B, edits of
    these layers forget more than edits of layers 3 to 5 or 4 to 6, for one person and for a hundred, and most of all in
    multiple choice; edits of layers 2 to 4 forget as much and take longer (benches/search_defaults.py). Layer 0 has no
    context and is chosen only if there is no other. A model of two layers or more keeps a layer after the last edited
    one.
    """
    first = max(1, depth // 14)
    last = min(first + 2, max(depth - 2, 0))
    return tuple(sorted({min(first, max(last - 1, 0)), last}))


def authors_layers(depth: int) -> tuple[int, ...]:
    """Return the layers that the authors of the paper edit: 4 to 6 of 28 to 32.

    Source:
        The repository Acruxos/ORT, rocr_hparams for Llama-3-8B and Mistral-7B.
    """
    first = max(0, min(depth // 7, depth - 4))
    return tuple(range(first, min(first + 3, max(depth - 1, 1))))


def _has_mlp(layer: nn.Module) -> bool:
    return any(name in MLP_NAMES for name, _ in unwrapped(layer).named_children())


def _is_mixture(mlp: nn.Module) -> bool:
    names = {name for name, _ in mlp.named_children()} | {name for name, _ in mlp.named_parameters(recurse=False)}
    return "experts" in names or "router" in names or any(p.ndim > 2 for _, p in own_parameters(mlp))
