"""Short identities of models, tokenizers and weights, so that no file is used with what it was not made for."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.json_values import text_of, whole_number_of
from rocr.model.architecture import Architecture, DownProjection
from rocr.model.tensor_parallel import whole
from rocr.model.wrappers import adapter_parameters, base_of, own_buffers, own_parameters

SAMPLED_VALUES = 512
"""Of each tensor of a fingerprint."""
SAMPLED_OF_EDITED = 4096
"""Of each down-projection: an edit may change few of the values that are rounded to bfloat16."""
PREFIX = "2:"
"""What the digests of a fingerprint begin with; those of rocr 0.1 have none. They took every n-th value of a tensor, in
many shapes those of a single column."""


@dataclass(frozen=True)
class Fingerprint:
    """What a model and its tokenizer are.

    Attributes:
        model: sha256 over the names, shapes and some values of the embedding and of the layers 0 to `layer`, buffers
            included that are stored, all but the down-projections, which are what edits change, and adapters. The
            values are rounded to bfloat16, so that one model has one fingerprint in float32 and bfloat16.
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

    @property
    def is_old(self) -> bool:
        """Whether `model` was computed as rocr 0.1 did."""
        return not self.model.startswith(PREFIX)

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (model {self.model[:12]} to layer {self.layer}, tokenizer {self.tokenizer[:12]})"


def fingerprint(architecture: Architecture, tokenizer: Any, layer: int, like: Fingerprint | None = None) -> Fingerprint:
    """The fingerprint of a model up to a decoder layer, and of its tokenizer.

    Args:
        architecture: of the model.
        tokenizer: its tokenizer.
        layer: the last decoder layer to cover.
        like: a fingerprint that this one is to be compared with, maybe one of rocr 0.1; None: none.
    """
    config = getattr(architecture.model, "config", None)
    name = getattr(config, "name_or_path", "") or type(architecture.model).__name__
    digest = model_digest(architecture, layer, like.model if like else PREFIX)
    return Fingerprint(digest, layer, tokenizer_digest(tokenizer), str(name))


def model_digest(architecture: Architecture, layer: int, like: str = PREFIX) -> str:
    """The `model` part of a fingerprint; of a shallower model, all of its layers.

    Args:
        architecture: of the model.
        layer: the last decoder layer to cover.
        like: a digest that this one is to be compared with: one of rocr 0.1 is computed as rocr 0.1 did.
    """
    is_old = not like.startswith(PREFIX)
    values = _evenly_spaced if is_old else _sampled
    digest = hashlib.sha256()
    _add_module(digest, "embedding", architecture.embedding, [], values)
    for i in range(min(layer + 1, architecture.depth)):
        edited = _down_projection(architecture, i)
        left_out: list[nn.Parameter] = []
        if edited is not None:
            left_out = list(edited.module.parameters()) if is_old else [edited.parameter]
        _add_module(digest, f"layer {i}", architecture.layers[i], left_out, values)
    return digest.hexdigest() if is_old else PREFIX + digest.hexdigest()


def down_projection_digests(architecture: Architecture, layer: int) -> tuple[str, ...]:
    """For each decoder layer before `layer`, sha256 over values of its down-projection, rounded to bfloat16.

    The keys of a layer depend on the down-projections before it, which a fingerprint leaves out. Of a layer without a
    dense down-projection the digest is empty: the fingerprint covers it.
    """
    found = []
    for i in range(min(layer, architecture.depth)):
        edited = _down_projection(architecture, i)
        digest = hashlib.sha256()
        if edited is not None:
            digest.update(_as_bfloat16(_sampled(whole(edited.parameter).detach().reshape(-1), SAMPLED_OF_EDITED)))
        found.append(digest.hexdigest() if edited is not None else "")
    return tuple(found)


def adapter_digest(model: nn.Module) -> str | None:
    """sha256 over values of the adapters of peft that are active in a model; None where there is none.

    A merged adapter is a part of the weights, and no longer one of these.
    """
    digest, found = hashlib.sha256(), False
    for name, parameter, scale in adapter_parameters(base_of(model)):
        found = True
        _add(digest, f"{name} {scale:g}", parameter, _sampled)
    return digest.hexdigest() if found else None


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


def _down_projection(architecture: Architecture, layer: int) -> DownProjection | None:
    try:
        return architecture.down_projection(layer)
    except InputError:
        return None


def _add_module(
    digest: Any,
    title: str,
    module: nn.Module,
    left_out: Sequence[nn.Parameter],
    values: Callable[[Tensor, int], Tensor],
) -> None:
    for name, parameter in own_parameters(module):
        if all(parameter is not each for each in left_out):
            _add(digest, f"{title} {name}", parameter, values)
    if values is not _evenly_spaced:  # rocr 0.1 left them out
        for name, buffer in own_buffers(module):
            _add(digest, f"{title} {name}", buffer, values)


def _add(digest: Any, title: str, parameter: Tensor, values: Callable[[Tensor, int], Tensor]) -> None:
    if parameter.device.type == "meta":
        raise InputError(
            f"{title} is on the meta device: its values were never loaded, or lie on the CPU or disk until its layer "
            "runs (offloading by a device_map). Put the model up to the last edited layer onto a device."
        )
    data = whole(parameter).detach()
    digest.update(f"{title} {tuple(data.shape)}\n".encode())
    digest.update(_as_bfloat16(values(data.reshape(-1), SAMPLED_VALUES)))


def _sampled(flat: Tensor, count: int) -> Tensor:
    """Values at places that are drawn by the size of a tensor alone, so that they lie in all its rows and columns."""
    size = flat.numel()
    if size <= count:
        return flat
    draw = random.Random(size).random
    places = sorted(int(draw() * size) for _ in range(count))
    return flat[torch.tensor(places, device=flat.device)]


def _evenly_spaced(flat: Tensor, count: int) -> Tensor:
    return flat[:: max(1, flat.numel() // count)][:count]


def _as_bfloat16(values: Tensor) -> Any:
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
