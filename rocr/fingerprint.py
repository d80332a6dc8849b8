"""Short identities of models, tokenizers and weights, so that no file is used with what it was not made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rocr.architectures import Architecture
from rocr.errors import InputError
from rocr.json_values import text_of, whole_number_of
from rocr.sharding import whole

SAMPLED_VALUES = 512


@dataclass(frozen=True)
class Fingerprint:
    """What a model and its tokenizer are.

    Attributes:
        model: sha256 over the names, shapes and evenly spaced values of the embedding and of the layers 0 to
            `layer`, all but the down-projections, which are what edits change. The values are rounded to
            bfloat16, so that one model has one fingerprint in float32 and bfloat16.
        layer: the last decoder layer that `model` covers.
        tokenizer: sha256 over the tokenizer's definition.
        name: what the model calls itself, for messages.
    """

    model: str
    layer: int
    tokenizer: str
    name: str

    def __post_init__(self) -> None:
        whole_number_of(self.layer, "the layer of a fingerprint")
        for value in (self.model, self.tokenizer, self.name):
            text_of(value, "a part of a fingerprint")

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (model {self.model[:12]} to layer {self.layer}, tokenizer {self.tokenizer[:12]})"


def fingerprint(architecture: Architecture, tokenizer: Any, layer: int) -> Fingerprint:
    """The fingerprint of a model up to a decoder layer, and of its tokenizer."""
    config = getattr(architecture.model, "config", None)
    name = getattr(config, "name_or_path", "") or type(architecture.model).__name__
    return Fingerprint(model_digest(architecture, layer), layer, tokenizer_digest(tokenizer), str(name))


def model_digest(architecture: Architecture, layer: int) -> str:
    """The `model` part of a fingerprint; of a shallower model, all of its layers."""
    digest = hashlib.sha256()
    _add_module(digest, "embedding", architecture.embedding, leave_out=None)
    for i in range(min(layer + 1, architecture.depth)):
        down_projection = architecture.down_projection(i).module if _has_down_projection(architecture, i) else None
        _add_module(digest, f"layer {i}", architecture.layers[i], leave_out=down_projection)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over a tokenizer's vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # How the last batch was padded and cut is the tokenizer's state, not what it is.
    definition = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    definition["chat_template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over a tensor's bytes in row-major order."""
    plain = whole(tensor).detach().cpu().contiguous().reshape(-1)
    buffer: Any = plain.view(torch.uint8).numpy()
    return hashlib.sha256(buffer).hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """A tensor's dtype as files and messages call it, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def _has_down_projection(architecture: Architecture, layer: int) -> bool:
    try:
        architecture.down_projection(layer)
    except InputError:
        return False
    return True


def _add_module(digest: Any, title: str, module: nn.Module, leave_out: nn.Module | None) -> None:
    skipped = None if leave_out is None else {id(parameter) for parameter in leave_out.parameters()}
    for name, parameter in module.named_parameters():
        if skipped and id(parameter) in skipped:
            continue
        data = whole(parameter).detach()
        flat = data.reshape(-1)
        step = max(1, flat.numel() // SAMPLED_VALUES)
        values = flat[::step][:SAMPLED_VALUES].to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        digest.update(f"{title} {name} {tuple(data.shape)}\n".encode())
        digest.update(values)
