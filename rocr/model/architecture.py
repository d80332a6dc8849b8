"""Find the decoder layers of a model and their MLP down-projections, which are what rocr edits.

They are found by the structure of the model, without a table of model names: a new family of transformers is supported
if it is built like the others, and refused with a reason if it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.block import Block
from rocr.model.encoder import encoder_config, encoder_layers, has_decoder, is_encoder_decoder
from rocr.model.forward import input_embedding, needs_more_than_text
from rocr.model.kind import LANGUAGE_MODEL, ModelKind
from rocr.model.layer_structure import LayerStructure, structure_of
from rocr.model.matrix import Matrix, check_product
from rocr.model.projection import check_matrix, find_matrix
from rocr.model.wrappers import base_of, own_modules, own_parameters, unwrapped

MLP_NAMES = ("mlp", "feed_forward", "ffn")
MIXTURE_NAMES = ("expert", "moe")
MIXER_NAMES = ("mixer", "block", "mlps")
CROSS_ATTENTION_NAMES = ("cross_attn", "cross_attention")
POSITIONS = ("max_position_embeddings", "max_target_positions")
"""Fields of a configuration for the number of positions, in the order of their use."""


@dataclass(frozen=True)
class Architecture:
    """The decoder layers of a model.

    Attributes:
        model: The model of transformers without wrappers, with the active adapters. rocr runs this model and never a
            compiled copy, which does not call hooks.
        layers_name: The name of the list of layers in the model's state dict.
        layers: The list of layers. Of an encoder-decoder, they are those of the encoder.
        found_blocks: The blocks of layers that were looked for; see `rocr.model.blocks`.
        kind: How the model reads a text. It is only known of an architecture from `rocr.model.causality.with_kind`;
            before that, it is that of a language model.
    """

    model: nn.Module
    layers_name: str
    layers: nn.ModuleList
    found_blocks: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    kind: ModelKind = LANGUAGE_MODEL

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def model_type(self) -> str | None:
        """The type of the whole model, such as "llava", from its configuration."""
        found = getattr(getattr(self.model, "config", None), "model_type", None)
        return found if isinstance(found, str) else None

    @property
    def reader(self) -> nn.Module:
        """The module that is run on a text: the model, or its language model if the model needs an image as well."""
        if not needs_more_than_text(self.model):
            return self.model
        parts = self.layers_name.split(".")
        around = [self.model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts))]
        with calling(f"The search for the language model of {type(self.model).__name__}"):
            return next((module for module in around if _has_logits(module)), self.model)

    @property
    def is_partial(self) -> bool:
        """Whether parameters of the model are not loaded."""
        return any(parameter.device.type == "meta" for parameter in self.model.parameters())

    @property
    def predicts_text(self) -> bool:
        """Whether the model predicts the next token of a text, and all of it is loaded."""
        return self.kind.writes_text and not self.is_partial

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
        matrix = self._matrix(layer)
        return Block(layer, matrix.name, matrix.module, matrix.is_transposed)

    def mixture(self, layer: int) -> tuple[str, nn.Module] | None:
        """Return the name and the module of a layer's mixture of experts, in its MLP or beside it; None if it has none.

        Raises:
            InputError: The layer is out of range.
        """
        self._check_range(layer)
        children = {name: unwrapped(child) for name, child in unwrapped(self.layers[layer]).named_children()}
        mlps = [name for name in children if name in MLP_NAMES]
        # An MLP beside experts, as in Gemma 4, stays as it is: the experts' output reaches every state that it does.
        beside = [name for name in children if any(part in name for part in MIXTURE_NAMES)]
        other = [name for name in children if name in MIXER_NAMES] if not mlps else []
        for name in [*beside, *mlps, *other]:
            if _is_mixture(children[name]):
                # Beside MLPs one after the other, as in LongCat, the experts stay as they are.
                is_beside = len(self.structure(layer).listed_mlps()) > 1
                return None if is_beside else (f"{self.layers_name}.{layer}.{name}", children[name])
        return None

    def check_down_projection(self, layer: int) -> None:
        """Run random states through a layer's MLP, to check that an edit of its down-projection works as intended.

        If the layer has no MLP that can be run alone, only the down-projection is run.

        Raises:
            InputError: The output of the MLP is not that of its down-projection, or the output of the down-projection
                is not its input times its weight.
        """
        named = self._mlp(layer)
        if named is None:
            check_product(self._matrix(layer))
        else:
            check_matrix(*named, self._matrix(layer), self.hidden_size)

    def structure(self, layer: int) -> LayerStructure:
        """Return the matrices of a layer by what they read and write."""
        return structure_of(f"{self.layers_name}.{layer}", self.layers[layer], self.hidden_size)

    def has_mlp(self, layer: int) -> bool:
        """Return whether a layer has an MLP or a mixture of experts, and not only a mixer such as attention."""
        return _named_mlp(self.layers[layer]) is not None or self.structure(layer).has_mlp()

    @property
    def hidden_size(self) -> int:
        """The number of features of the residual stream."""
        return _hidden_size(self.model)

    @property
    def encodes_for_decoder(self) -> bool:
        """Whether the layers are those of the encoder of an encoder-decoder."""
        return is_encoder_decoder(self.model)

    def _check_range(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise InputError(
                f"Layer {layer} is out of range: the model has {self.depth} decoder layers, 0 to {self.depth - 1}."
            )

    def _matrix(self, layer: int) -> Matrix:
        """Return the matrix of a layer that is edited: that of an MLP with a usual name, or the one by structure."""
        named = self._mlp(layer)
        return self.structure(layer).matrix() if named is None else find_matrix(*named, self.hidden_size)

    def _mlp(self, layer: int) -> tuple[str, nn.Module] | None:
        """Return the name and the module of a layer's dense MLP; None if no child has the name of one."""
        self._check_range(layer)
        name = f"{self.layers_name}.{layer}"
        if _attends_to_others_only(self.layers[layer]):
            raise InputError(
                f"{name} attends to images only and is skipped for text, so it has no keys. Edit other layers (layers, "
                "--layers)."
            )
        named = _named_mlp(self.layers[layer])
        if named is None:
            return None
        child, mlp = named
        if _is_mixture(mlp):
            if len(self.structure(layer).listed_mlps()) > 1:
                return None
            raise InputError(f"{name}.{child} is a mixture of experts, which has no single dense down-projection.")
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
        return encoder if hasattr(encoder, "hidden_size") else encoder.get_text_config()
    with calling(f"The call of get_text_config of {type(config).__name__}"):
        return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hidden_size(model: nn.Module) -> int:
    """Return the number of features of the residual stream.

    Raises:
        InputError: The configuration does not name it.
    """
    found = getattr(text_config(model), "hidden_size", None)
    if not isinstance(found, int):
        raise InputError(
            f"The configuration of {type(model).__name__}, {type(text_config(model)).__name__}, has no hidden_size: "
            "rocr edits causal language models of transformers."
        )
    return found


def positions_of(model: nn.Module) -> int | None:
    """Return the number of positions that a text may have; None if the model's configuration does not name it."""
    config = text_config(model)
    named = next((found for name in POSITIONS if (found := getattr(config, name, None)) is not None), None)
    try:
        count = int(named)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return None if count < 0 else max(1, count - _reserved_positions(model, count))


def _reserved_positions(model: nn.Module, count: int) -> int:
    """Return how many positions are before the first token: RoBERTa and others number tokens after the padding."""
    base = base_of(model)
    tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    paddings = [
        table.padding_idx + 1
        for table in tables
        if table.num_embeddings == count and table.padding_idx is not None and table is not input_embedding(base)
    ]
    return max(paddings, default=0)


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
    config = text_config(model)
    # The configuration of a decoder alone may be that of an encoder-decoder, whose num_hidden_layers are the encoder's.
    base = base_of(model)
    decoder_layers = getattr(config, "decoder_layers", None) if has_decoder(base) else None
    depth = decoder_layers or getattr(config, "num_hidden_layers", None)
    if is_encoder_decoder(base):
        return Architecture(base, *encoder_layers(base))
    modules = {name: module for name, module, _ in own_modules(base)}
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    hidden_size = _hidden_size(base)
    found: list[str] = []
    for is_one in (_has_named_mlps, _has_blocks, _has_two_mlps_a_layer):
        fitting = [name for name, layers in lists.items() if is_one(name, layers, depth, hidden_size)]
        found += [name for name in fitting if name not in found]
        chosen = _of_the_language_model(base, modules, fitting)
        if len(chosen) == 1:
            return Architecture(base, chosen[0], lists[chosen[0]])
        if chosen:
            break
    which = f": {', '.join(found)}" if found else ""
    raise InputError(
        f"{type(base).__name__} has {len(found)} lists of {depth} decoder layers with an MLP or a mixer that returns "
        f"the hidden size {hidden_size}{which}; rocr needs exactly one that belongs to the language model."
    )


def _of_the_language_model(base: nn.Module, modules: Mapping[str, nn.Module], lists: list[str]) -> list[str]:
    """Return the lists of layers that belong to the model with the text configuration, not to a vision tower."""
    kind = type(text_config(base))
    of_text = [name for name in lists if type(_owner(modules, name).config) is kind]
    if len(lists) <= 1:
        return of_text
    with calling(f"{type(base).__name__}.get_decoder"):
        decoder: nn.Module = base.get_decoder() if hasattr(base, "get_decoder") else base  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()}
    in_decoder = [name for name in lists if id(modules[name]) in inside]
    chosen = [name for name in of_text if name in in_decoder or not in_decoder]
    if len(chosen) <= 1:
        return chosen
    return [name for name in chosen if not all(map(_attends_to_others_only, modules[name].children()))]


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


def _has_logits(module: nn.Module) -> bool:
    """Return whether a module is a language model with a matrix that computes logits."""
    find = getattr(module, "get_output_embeddings", None)
    return callable(find) and find() is not None


def _named_mlp(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the name and the module of a layer's child that is named as an MLP; None if there is none."""
    children = dict(unwrapped(layer).named_children())
    return next(((name, unwrapped(children[name])) for name in MLP_NAMES if name in children), None)


def _has_named_mlps(_name: str, layers: nn.ModuleList, depth: int | None, _hidden_size: int) -> bool:
    """Return whether a list has the length of the model, and some of its layers have MLPs or experts of usual names."""
    return len(layers) == depth and any(
        name in MLP_NAMES or any(part in name for part in MIXTURE_NAMES)
        for layer in layers
        for name, _ in unwrapped(layer).named_children()
    )


def _has_blocks(name: str, layers: nn.ModuleList, depth: int | None, hidden_size: int) -> bool:
    """Return whether a list has the length of the model, and some of its layers have a matrix that could be edited."""
    return len(layers) == depth and any(structure_of(name, layer, hidden_size).has_block() for layer in layers)


def _has_two_mlps_a_layer(name: str, layers: nn.ModuleList, depth: int | None, hidden_size: int) -> bool:
    """Return whether the layers of a list count as two each in the length of the model, as those of LongCat do."""
    return 2 * len(layers) == depth and all(
        len(structure_of(name, layer, hidden_size).listed_mlps()) == 2 for layer in layers
    )


def _attends_to_others_only(layer: nn.Module) -> bool:
    """Return whether a layer attends to images or to an encoder, and not to the text itself."""
    children = dict(unwrapped(layer).named_children())
    return any(name in children for name in CROSS_ATTENTION_NAMES) and "self_attn" not in children


def _is_mixture(mlp: nn.Module) -> bool:
    """Return whether a module holds experts: parameters of three dimensions, or modules of that name.

    Modules of that name are a list, or one with matrices of its own, such as DBRX's, whose rows are those of all
    experts.
    """
    for name, child in mlp.named_modules():
        if "expert" in name and "shared" not in name and not isinstance(child, (nn.Linear, nn.Embedding)):
            own = child.named_parameters(recurse=False)
            if isinstance(child, nn.ModuleList) or any(parameter.ndim == 2 for _, parameter in own):
                return True
    held = {id(p) for module in mlp.modules() if "Conv" in type(module).__name__ for p in module.parameters()}
    return any(p.ndim > 2 and p.shape[0] > 1 and id(p) not in held for _, p in own_parameters(mlp))
