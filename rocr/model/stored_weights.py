"""Where the weights of a loaded model are stored in its files, and whether the files hold the loaded values.

transformers decides which files are loaded, under which names and in which dtype. An edit has to be written to the
same tensors: their names are found by the rules of transformers, and confirmed by comparing values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_KINDS
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.block import Block
from rocr.model.quantised.checkpoint import QuantisedWeight
from rocr.model.quantised.place import QuantisedPlace
from rocr.model.source import ModelSource
from rocr.model.stored_names import StoredNames
from rocr.model.tensor_parallel import is_sharded
from rocr.model.weight_files import WeightFiles, find_weight_files

RUNS, RUN_LENGTH = 16, 32
"""The part of a tensor that is compared: evenly spaced runs of consecutive values, so that few pages are read."""


@dataclass(frozen=True)
class Place:
    """Where the files hold a block: a tensor, or one expert of a tensor.

    Attributes:
        tensor: The tensor.
        expert: The index of the expert in the tensor. None if the tensor holds this block only.
        experts: The number of experts in the tensor.
        flipped: Whether the tensor holds the transpose of what the model holds.
    """

    tensor: StoredTensor
    expert: int | None = None
    experts: int = 1
    flipped: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block as the model holds it."""
        shape = self.tensor.shape
        if self.expert is not None:
            rows = math.prod(shape[:-1])
            shape = (rows // self.experts, shape[-1]) if rows % self.experts == 0 else shape
        return shape[::-1] if self.flipped else shape

    def read(self) -> Tensor:
        """Return the block as the model holds it, in the stored dtype."""
        values = self.tensor.read() if self.expert is None else self.of_expert(self.tensor.map()).clone()
        return values.T.contiguous() if self.flipped else values

    def write_to(self, tensor: Tensor, values: Tensor) -> None:
        """Put a block, as the model holds it, into the values of the whole tensor."""
        place = tensor if self.expert is None else self.of_expert(tensor)
        place.copy_(values.T if self.flipped else values)

    def of_expert(self, tensor: Tensor) -> Tensor:
        """Return the view of the expert in the values of the whole tensor."""
        return tensor.view(self.experts, -1, tensor.shape[-1])[self.expert]


def find_weights(source: ModelSource) -> WeightFiles | None:
    """Find the safetensors files that a model is loaded from; None if it has none on this machine.

    Raises:
        InputError: The files are damaged.
    """
    return find_weight_files(source.checkpoint_folder or _cached(source))


def find_stored(files: WeightFiles, names: StoredNames, block: Block) -> list[Place]:
    """Find where the files hold an edited weight; more than one place if they hold it several times.

    Raises:
        InputError: The weight is not stored in its own shape, alone or with other experts, or its dtype cannot be
            edited.
    """
    name = block.parameter_name
    converted = names.converted[name].names if name in names.converted else []
    if name not in names.plain and not (converted and block.expert is not None):
        reason = f"store it in another layout, as {converted[0]}" if converted else "do not hold it"
        raise InputError(
            f"An edited copy of {files.folder} cannot be written: {name} is edited, and the files {reason}. Save the "
            "model unquantised and in the layout of its class with save_pretrained, or write only the edit and the "
            "adapter (--save edit,lora)."
        )
    stored = [files.find(held) for held in names.plain.get(name, [])]
    places = [Place(tensor, block.expert, block.experts) for tensor in stored]
    if not stored:
        places = [_place_of_expert(files, converted, block)]
    for place in places:
        if place.tensor.kind not in SUPPORTED_KINDS or place.shape != tuple(block.stored.shape):
            raise InputError(
                f"{place.tensor.name} is stored in {place.tensor.file} as {place.tensor.kind} of shape "
                f"{place.tensor.shape}, but rocr writes float32, bfloat16 and float16 of shape "
                f"{tuple(block.parameter.shape)}, the one that was loaded."
            )
    return places


def _place_of_expert(files: WeightFiles, names: Sequence[str], block: Block) -> Place:
    """Return where one expert of a parameter is stored that transformers joins from several tensors, or transposes."""
    assert block.expert is not None
    shape = tuple(block.stored.shape)
    if len(names) == block.experts:
        tensor = files.find(names[block.expert])
        return Place(tensor, None, 1, flipped=tensor.shape != shape)
    tensor = files.find(names[0])
    return Place(tensor, block.expert, block.experts, flipped=tensor.shape[-2:] != shape)


def edited_places(files: WeightFiles, names: StoredNames, block: Block) -> list[StoredTensor]:
    """Return the tensors that an edit of a weight changes or replaces; raises as `find_stored`."""
    if find_quantised(names, block) is not None:
        return [tensor for weight in replaced_weights(names, block) for tensor in weight.places.values()]
    return [place.tensor for place in find_stored(files, names, block)]


def find_quantised(names: StoredNames, block: Block) -> QuantisedPlace | None:
    """Find where the files hold an edited weight that is quantised; None if it is not.

    Raises:
        InputError: The weight is one of several that the files hold in one quantised weight of another layout.
    """
    weights = names.quantised_of(block.parameter_name)
    if not weights:
        return None
    if len(weights) > 1 and block.expert is not None and len(weights) == block.experts:
        weight, expert = weights[block.expert], None
    elif len(weights) == 1:
        weight, expert = weights[0], block.expert
    else:
        raise InputError(
            f"{block.label} is made of {len(weights)} quantised weights such as {weights[0].module}, and rocr edits "
            "quantised experts that are stored one by one, or all in one tensor."
        )
    # Schemes give the values of one matrix as (d_out, d_in), and those of all experts as the model holds them.
    return QuantisedPlace(weight, tuple(block.stored.shape), expert, flipped=block.transposed and expert is None)


def replaced_weights(names: StoredNames, block: Block) -> list[QuantisedWeight]:
    """Return the quantised weights that become plain with an edited one.

    Those of all experts of a layer, since loaders run all experts of a layer in one kernel; else the edited one.
    """
    if block.expert is None:
        return names.quantised_of(block.parameter_name)
    prefix = f"{block.name}."
    parameters = [name for name in (*names.quantised, *names.converted) if name.startswith(prefix)]
    return [weight for name in parameters for weight in names.quantised_of(name)]


def check_loaded(files: WeightFiles, names: StoredNames, model: nn.Module, blocks: Iterable[Block]) -> None:
    """Raise InputError unless a model that was not edited yet holds the values of its files.

    Weights that will be edited are compared completely, all others by some of their values. Parameters that are not
    loaded, and those that are converted from other tensors, are skipped.

    Raises:
        InputError: A weight that will be edited cannot be written, or a weight differs; the message names it.
    """
    for block in blocks:
        quantised = find_quantised(names, block)
        if quantised is not None:
            check_dequantised(quantised, block)
            continue
        for block_place in find_stored(files, names, block):
            if not same_values(block.stored, block_place.read()):
                raise _differs(block.label, block_place.tensor)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or is_sharded(parameter) or name not in names.plain:
            continue
        for place in (files.find(stored) for stored in names.plain[name]):
            if place.kind in SUPPORTED_KINDS and not _same_samples(parameter.data, place):
                raise _differs(name, place)


def check_dequantised(place: QuantisedPlace, block: Block) -> None:
    """Raise InputError unless a loaded weight has the values of its quantised parts in the files."""
    if not same_values(block.stored, place.read()):
        raise InputError(
            f"{block.label} was loaded with other values than {place.weight.module} has in the files as "
            f"{place.weight.scheme.label}, so an edited copy of the files cannot be written. Write only the edit and "
            "the adapter (--quantised adapter)."
        )


def same_values(loaded: Tensor, stored: Tensor) -> bool:
    """Return whether a loaded tensor equals a stored one that is cast to its dtype; NaN counts as equal to NaN."""
    if loaded.shape != stored.shape:
        return False
    mine, theirs = loaded.detach().cpu(), stored.to(loaded.dtype)
    return bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all())


def layout(files: WeightFiles) -> dict[str, Any]:
    """Describe the tensors in the files of a model for a report: their number and a digest.

    The digest is of names, dtypes and shapes if all headers were read, and else of the names in the index.
    """
    if files.is_complete:
        said: Any = sorted((name, stored.kind, stored.shape) for name, stored in files.read_headers().items())
    else:
        said = sorted(files.file_of)
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return {"of": "names, dtypes and shapes" if files.is_complete else "names", "count": len(said), "sha256": digest}


def _differs(name: str, place: StoredTensor) -> InputError:
    return InputError(
        f"{name} was loaded with other values than {place.name} in {place.file}: transformers loaded another file, or "
        "converted the values, so an edited copy of the files cannot be written. Keep one set of weights in the "
        "folder, or write only the edit and the adapter (--save edit,lora)."
    )


def _same_samples(loaded: Tensor, place: StoredTensor) -> bool:
    if tuple(loaded.shape) != place.shape:
        return False
    mine, theirs = loaded.detach().reshape(-1), place.map().reshape(-1)
    step = max(RUN_LENGTH, mine.numel() // RUNS)
    for start in range(0, mine.numel(), step):
        run = slice(start, start + RUN_LENGTH)
        if not same_values(mine[run], theirs[run]):
            return False
    return True


def _cached(source: ModelSource) -> Path | None:
    """Return the folder of a hub model in the hub's cache; None for a local model, and if it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.name, "config.json") if source.folder is None else None
    return Path(config).parent if isinstance(config, str) else None
