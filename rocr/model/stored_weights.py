"""Where the weights of a loaded model are stored in its files, and whether the files hold the loaded values.

transformers decides which files are loaded, under which names and in which dtype. An edit has to be written to the
same tensors: their names are found by the rules of transformers, and confirmed by comparing values.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_KINDS
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.block import Block
from rocr.model.quantised.checkpoint import QuantisedWeight, quantised_weights
from rocr.model.source import ModelSource
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


@dataclass
class StoredNames:
    """The names that the parameters of a model have in its files.

    Attributes:
        plain: For each parameter that is loaded without a change of layout, the names of its tensors: more than one
            if it is stored under several names.
        converted: For each parameter that is joined, split, transposed or dequantised from other tensors, their
            names.
        quantised: For each parameter that is dequantised by a scheme that rocr reads, its parts in the files.
    """

    plain: dict[str, list[str]] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)
    quantised: dict[str, QuantisedWeight] = field(default_factory=dict)

    @property
    def readable(self) -> set[str]:
        """The parameters whose values rocr reads from the files itself."""
        return {*self.plain, *self.quantised}

    def places(self, files: WeightFiles, parameter: str) -> list[StoredTensor]:
        """Return the tensors in the files that hold a parameter, each once."""
        if parameter in self.quantised:
            return list(self.quantised[parameter].places.values())
        return [files.find(self.of(parameter))]

    def of(self, parameter: str) -> str:
        """Return the name of a parameter's tensor; the parameter's own name if the files hold none."""
        return self.plain.get(parameter, [parameter])[0]


def stored_names(files: WeightFiles, model: nn.Module) -> StoredNames:
    """Find the names that the parameters of a model have in its files.

    Args:
        files: The files of the model's folder. If the index lacks a parameter, all headers are read.
        model: A model of transformers, which may be on the meta device.
    """
    parameters = model.state_dict(keep_vars=True)
    found = _names(files, parameters, model)
    if files.index is not None and any(
        name not in found.readable and name not in found.converted for name, _ in model.named_parameters()
    ):
        before = len(files.file_of)
        files.read_headers()
        if len(files.file_of) > before:
            found = _names(files, parameters, model)
    return found


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
    converted = names.converted.get(name, [])
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
        tensor = files.find(sorted(names, key=_natural)[block.expert])
        return Place(tensor, None, 1, flipped=tensor.shape != shape)
    tensor = files.find(names[0])
    return Place(tensor, block.expert, block.experts, flipped=tensor.shape[-2:] != shape)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in a name by their value."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def edited_places(files: WeightFiles, names: StoredNames, block: Block) -> list[StoredTensor]:
    """Return the tensors that an edit of a weight changes or replaces; raises as `find_stored`."""
    if block.parameter_name in names.quantised:
        return names.places(files, block.parameter_name)
    return [place.tensor for place in find_stored(files, names, block)]


def check_loaded(files: WeightFiles, names: StoredNames, model: nn.Module, blocks: Iterable[Block]) -> None:
    """Raise InputError unless a model that was not edited yet holds the values of its files.

    Weights that will be edited are compared completely, all others by some of their values. Parameters that are not
    loaded, and those that are converted from other tensors, are skipped.

    Raises:
        InputError: A weight that will be edited cannot be written, or a weight differs; the message names it.
    """
    for block in blocks:
        weight = names.quantised.get(block.parameter_name)
        if weight is not None:
            check_dequantised(weight, block)
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


def check_dequantised(weight: QuantisedWeight, projection: Block) -> None:
    """Raise InputError unless a loaded weight has the values of its quantised parts in the files."""
    loaded = projection.parameter.data
    if not same_values(loaded, weight.read(tuple(loaded.shape))):
        raise InputError(
            f"{projection.parameter_name} was loaded with other values than {weight.module} has in the files as "
            f"{weight.scheme.label}, so an edited copy of the files cannot be written. Write only the edit and the "
            "adapter (--quantised adapter)."
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


def _names(files: WeightFiles, parameters: dict[str, Any], model: nn.Module) -> StoredNames:
    weights = quantised_weights(files)
    # The rules of a quantiser are for its own modules; without them, a weight has the name of the dense weight.
    rename = _renaming(model, parameters, None if weights else getattr(model, "hf_quantizer", None))
    found = StoredNames()
    for weight in weights:
        found.quantised[rename(weight.name)[0]] = weight
    parts = {name for weight in weights for name in weight.names.values()}
    for name in files.file_of:
        if name in parts:
            continue
        parameter, converted = rename(name)
        if parameter not in parameters and name in parameters:
            parameter, converted = name, False
        if parameter in parameters:
            (found.converted if converted else found.plain).setdefault(parameter, []).append(name)
    return found


def _renaming(model: nn.Module, parameters: dict[str, Any], quantizer: object) -> Callable[[str], tuple[str, bool]]:
    """Return transformers' mapping from a stored tensor to its parameter and whether the layout is changed."""
    prefix = getattr(model, "base_model_prefix", "")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return lambda name: (_renamed(name, patterns, prefix, parameters), False)
    rules = get_model_conversion_mapping(model, None, quantizer)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(name: str) -> tuple[str, bool]:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        return parameter, pattern is not None

    return renamed


def _renamed(name: str, patterns: dict[str, str], prefix: str, parameters: dict[str, Any]) -> str:
    for pattern, replacement in patterns.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in parameters:
            return candidate
    return name
