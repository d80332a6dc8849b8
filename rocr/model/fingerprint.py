"""Digests of models, tokenizers and weights, to check that a file is used with the model that it was made for."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.json_values import text_of, whole_number_of
from rocr.model.architecture import Architecture
from rocr.model.blocks import LayerBlocks, find_blocks, layer_blocks
from rocr.model.tensor_parallel import whole
from rocr.model.wrappers import adapter_parameters, base_of, own_buffers, own_parameters

SAMPLED_VALUES = 512
"""The number of values of each tensor that a fingerprint covers."""
SAMPLED_OF_EDITED = 4096
"""The same for down-projections: after rounding to bfloat16, an edit may change few values."""
PREFIX = "2:"
"""The prefix of the model digests. Those of rocr 0.1 have none; they cover every n-th value of a tensor, which for many
shapes are the values of a single column."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a model and its tokenizer.

    Attributes:
        model: The sha256 of the names, shapes and some values of the embedding and of the layers 0 to `layer`, with
            stored buffers, and without adapters, packed weights, and down-projections, which edits change. The values
            are rounded to bfloat16, so that a model has the same fingerprint in float32 and bfloat16.
        layer: The last decoder layer that `model` covers.
        tokenizer: The sha256 of the tokenizer's definition.
        name: The name in the model's configuration, for messages.
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
        """Whether `model` was computed by rocr 0.1."""
        return not self.model.startswith(PREFIX)

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (model {self.model[:12]} to layer {self.layer}, tokenizer {self.tokenizer[:12]})"


def fingerprint(architecture: Architecture, tokenizer: Any, layer: int, like: Fingerprint | None = None) -> Fingerprint:
    """Compute the fingerprint of a model up to a decoder layer, and of its tokenizer.

    Args:
        architecture: The architecture of the model.
        tokenizer: The model's tokenizer.
        layer: The last decoder layer to cover.
        like: A fingerprint to compare with, which may be one of rocr 0.1; None for none.

    Raises:
        InputError: A weight is on the meta device.
    """
    config = getattr(architecture.model, "config", None)
    name = getattr(config, "name_or_path", "") or type(architecture.model).__name__
    digest = model_digest(architecture, layer, like.model if like else PREFIX)
    return Fingerprint(digest, layer, tokenizer_digest(tokenizer), str(name))


def model_digest(architecture: Architecture, layer: int, like: str = PREFIX) -> str:
    """Compute the `model` part of a fingerprint.

    Args:
        architecture: The architecture of the model.
        layer: The last decoder layer to cover; a model with fewer layers is covered completely.
        like: A digest to compare with. If it is one of rocr 0.1, the digest is computed as rocr 0.1 did.

    Raises:
        InputError: A weight is on the meta device.
    """
    is_old = not like.startswith(PREFIX)
    values = _evenly_spaced if is_old else _sampled
    digest = hashlib.sha256()
    _add_module(digest, "embedding", architecture.embedding, [], values)
    layers = range(min(layer + 1, architecture.depth))
    blocks = _blocks(architecture, layers)
    for i in layers:
        left_out: list[nn.Parameter] = []
        if i in blocks:
            left_out = blocks[i].parameters
            if is_old:  # rocr 0.1 edits no mixtures
                left_out = [] if blocks[i].is_mixture else list(blocks[i].module.parameters())
        _add_module(digest, f"layer {i}", architecture.layers[i], left_out, values)
    return digest.hexdigest() if is_old else PREFIX + digest.hexdigest()


def down_projection_digests(architecture: Architecture, layer: int) -> tuple[str, ...]:
    """Return the sha256 of values of the blocks of each decoder layer before `layer`, rounded to bfloat16.

    The keys of a layer depend on the blocks before it, which a fingerprint does not cover. The digest of a layer
    without blocks is empty: the fingerprint covers that layer.
    """
    found = []
    layers = range(min(layer, architecture.depth))
    blocks = _blocks(architecture, layers)
    for i in layers:
        digest = hashlib.sha256()
        for parameter in blocks[i].parameters if i in blocks else ():
            digest.update(_as_bfloat16(_sampled(whole(parameter).detach().reshape(-1), SAMPLED_OF_EDITED)))
        found.append(digest.hexdigest() if i in blocks else "")
    return tuple(found)


def adapter_digest(model: nn.Module) -> str | None:
    """Return the sha256 of values of the active adapters of peft in a model; None if there are none.

    A merged adapter is part of the weights and does not count.
    """
    digest, found = hashlib.sha256(), False
    for name, parameter, scale in adapter_parameters(base_of(model)):
        found = True
        _add(digest, f"{name} {scale:g}", parameter, _sampled)
    return digest.hexdigest() if found else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer's vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # The padding and truncation of the last batch are state of the tokenizer, not part of its definition.
    definition = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    definition["chat_template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def tensor_digest(*tensors: Tensor) -> str:
    """Return the sha256 of the bytes of tensors, one after the other, each in row-major order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = whole(tensor).detach().cpu().contiguous().reshape(-1)
        buffer: Any = plain.view(torch.uint8).numpy()
        digest.update(buffer)
    return digest.hexdigest()


def _blocks(architecture: Architecture, layers: Sequence[int]) -> dict[int, LayerBlocks]:
    """Return the blocks of those of some layers that can be edited."""
    with suppress(InputError):  # all at once, since the blocks of mixtures are found by running the model
        return dict(find_blocks(architecture, layers))
    found = {}
    for layer in layers:
        with suppress(InputError):
            found[layer] = layer_blocks(architecture, layer)
    return found


def _add_module(
    digest: Any,
    title: str,
    module: nn.Module,
    left_out: Sequence[nn.Parameter],
    values: Callable[[Tensor, int], Tensor],
) -> None:
    for name, parameter in own_parameters(module):
        # bitsandbytes stores packed weights in another order once the model ran on a CPU.
        is_packed = not parameter.is_floating_point()
        if all(parameter is not each for each in left_out) and not is_packed:
            _add(digest, f"{title} {name}", parameter, values)
    if values is not _evenly_spaced:  # rocr 0.1 does not cover buffers
        for name, buffer in own_buffers(module):
            _add(digest, f"{title} {name}", buffer, values)


def _add(digest: Any, title: str, parameter: Tensor, values: Callable[[Tensor, int], Tensor]) -> None:
    if parameter.device.type == "meta":
        raise InputError(
            f"{title} is on the meta device: it is not loaded, or a device_map offloads it to the CPU or disk until "
            "its layer runs. Load the model up to the last edited layer onto a device."
        )
    data = whole(parameter).detach()
    digest.update(f"{title} {tuple(data.shape)}\n".encode())
    digest.update(_as_bfloat16(values(data.reshape(-1), SAMPLED_VALUES)))


def _sampled(flat: Tensor, count: int) -> Tensor:
    """Return values at random places, with the tensor's size as seed, so that they are spread over rows and columns."""
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
