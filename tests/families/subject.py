"""A tiny model that is edited, and what is read from it without rocr: outputs, states of layers, weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rocr.edit.update import LayerUpdate
from rocr.errors import RocrError
from rocr.model.architecture import find_architecture
from rocr.model.blocks import layer_blocks
from tests.families.tiny_models import tiny_tokenizer

NAMES = ("Ada Byron", "Stephen King", "Isaac Newton", "Niels Bohr", "Emmy Noether", "Alan Turing", "Galileo Galilei")
REDIRECTS = ("Carl Gauss", "Marie Curie")
QUESTION = "Who is {}?"
SHARED_CONTEXT = "Question: What is known about {}?"
ROUNDING = {torch.float32: 1e-3}
ROUNDING_OF_HALF = 5e-2


class Subject:
    """A model that is edited, and what is read from it without rocr."""

    def __init__(self, model: nn.Module, is_encoder: bool) -> None:
        self.model: Any = model
        self.tokenizer = tiny_tokenizer()
        self.is_encoder = is_encoder
        self.tolerance = ROUNDING.get(self.model.dtype, ROUNDING_OF_HALF)

    def run(self, tokens: Tensor, model: Any = None) -> Any:
        """The output of a whole forward pass of token ids (1, tokens)."""
        is_pair = getattr(self.model.config, "is_encoder_decoder", False)
        more = {"decoder_input_ids": tokens} if is_pair else {}
        with torch.no_grad():
            return (model or self.model)(input_ids=tokens, use_cache=False, **more)

    def tokens(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer(text)["input_ids"]])

    def outputs(self, tokens: Tensor, model: Any = None) -> Tensor:
        """Logits (tokens, vocabulary), or the last states of a model without logits."""
        found = self.run(tokens, model)
        values = found.logits if "logits" in found else found.last_hidden_state
        return values[0].float()

    def all_outputs(self, model: Any = None) -> list[Tensor] | None:
        """The outputs for a question about each name; None if the model does not run on text alone."""
        try:
            return [self.outputs(self.tokens(QUESTION.format(name)), model) for name in NAMES]
        except Exception:
            return None

    def state(self, layer: int, name: str, context: str = QUESTION) -> Tensor:
        """The output of a layer at the last token of a name in a context, flattened."""
        text = context.format(name)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        end = text.index(name) + len(name)
        place = max(i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start < end and stop > 0)
        found: list[Tensor] = []
        module = find_architecture(self.model).layers[layer]
        handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(_first_tensor(output)))
        try:
            self.run(torch.tensor([encoded["input_ids"]]))
        finally:
            handle.remove()
        count = len(encoded["input_ids"])
        # Some models keep several streams in front of the axis of the tokens or behind it.
        axis = next(axis for axis, size in enumerate(found[0].shape) if size == count)
        return found[0].detach().float().select(axis, place).flatten()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def parameters_of(update: LayerUpdate) -> set[str]:
    """The names of the parameters that an update changes."""
    return {part.parameter for part in update.parts} or {update.parameter}


def experts_of(update: LayerUpdate) -> dict[str, set[int]]:
    """The experts that an update changes in each parameter that holds several."""
    found: dict[str, set[int]] = {}
    for part in update.parts:
        if part.expert is not None:
            found.setdefault(part.parameter, set()).add(part.expert)
    return found


def editable_layers(model: nn.Module) -> list[int]:
    """At most two layers that rocr finds blocks in, layer 0 only if there is no other."""
    try:
        architecture = find_architecture(model)
    except RocrError:
        return []
    found = []
    for layer in [*range(1, architecture.depth), 0][: architecture.depth]:
        try:
            layer_blocks(architecture, layer)
        except RocrError:
            continue
        if layer or not found:
            found.append(layer)
    return sorted(found[:2])
