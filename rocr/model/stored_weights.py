"""Where the weights of a loaded model lie in its files, and whether the files hold what was loaded.

transformers decides which files are loaded, under which names and in which dtype. What is written has to be the
same tensors: names are found by transformers' own rules, and confirmed by the values.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_KINDS
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.architecture import DownProjection
from rocr.model.source import ModelSource
from rocr.model.tensor_parallel import is_sharded
from rocr.model.weight_files import WeightFiles, find_weight_files

RUNS, RUN_LENGTH = 16, 32
"""How much of a tensor is compared: evenly spaced runs of neighbouring values, so that few pages of a file are read."""


@dataclass
class StoredNames:
    """How the parameters of a model are called in its files.

    Attributes:
        plain: for each parameter the tensors that it is loaded from as they are; more than one where it is stored
            under several names.
        converted: for each parameter that is put together from tensors of another layout (joined, split, transposed
            or dequantised), their names.
    """

    plain: dict[str, list[str]] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)

    def of(self, parameter: str) -> str:
        """The tensor of a parameter; the parameter's own name where the files hold none."""
        return self.plain.get(parameter, [parameter])[0]


def stored_names(files: WeightFiles, model: nn.Module) -> StoredNames:
    """Find what each parameter of a model, which need not be loaded, is called in its files.

    Args:
        files: of the model's folder. All headers are read where the index alone lacks a parameter.
        model: a model of transformers.
    """
    parameters = model.state_dict(keep_vars=True)
    found = _names(files.file_of, parameters, model)
    if files.index is not None and any(
        name not in found.plain and name not in found.converted for name, _ in model.named_parameters()
    ):
        before = len(files.file_of)
        files.read_headers()
        if len(files.file_of) > before:
            found = _names(files.file_of, parameters, model)
    return found


def find_weights(source: ModelSource) -> WeightFiles | None:
    """The safetensors files that a model is loaded from; None for a GGUF file and what is not on this machine.

    Raises:
        InputError: the files are damaged.
    """
    folder = source.folder or _cached(source)
    return None if folder is None or source.gguf else find_weight_files(folder)


def find_stored(files: WeightFiles, names: StoredNames, projection: DownProjection) -> list[StoredTensor]:
    """The tensors that an edited weight has to be written to.

    Raises:
        InputError: it is not stored as a tensor of its own, of its own shape and of a dtype that can be edited.
    """
    name = projection.parameter_name
    if name not in names.plain:
        others = names.converted.get(name)
        stored = f"is put together from {others[0]} and is stored otherwise" if others else "is in none of the files"
        raise InputError(
            f"{name} {stored} of {files.folder}, so that an edited copy of these files cannot be written. Save the "
            "model unquantised and in the layout of its class with save_pretrained, or write only the edit and the "
            "adapter (--save edit,lora)."
        )
    places = [files.find(stored) for stored in names.plain[name]]
    for place in places:
        if place.kind not in SUPPORTED_KINDS or place.shape != tuple(projection.parameter.shape):
            raise InputError(
                f"{place.name} is stored in {place.file} as {place.kind} of shape {place.shape}: rocr writes float32, "
                f"bfloat16 and float16 of the shape {tuple(projection.parameter.shape)} that is loaded."
            )
    return places


def check_loaded(
    files: WeightFiles, names: StoredNames, model: nn.Module, projections: Iterable[DownProjection]
) -> None:
    """Make sure that a model that was not edited yet holds what its files hold, so that these can be written.

    Edited weights are compared whole, all others by some of their values. Parameters that are not loaded, or are
    put together from several tensors, are left out.

    Raises:
        InputError: an edited weight cannot be written, or a weight differs; names it.
    """
    for projection in projections:
        for place in find_stored(files, names, projection):
            if not same_values(projection.parameter.data, place.read()):
                raise _differs(projection.parameter_name, place)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or is_sharded(parameter) or name not in names.plain:
            continue
        for place in (files.find(stored) for stored in names.plain[name]):
            if place.kind in SUPPORTED_KINDS and not _same_samples(parameter.data, place):
                raise _differs(name, place)


def same_values(loaded: Tensor, stored: Tensor) -> bool:
    """Whether a loaded tensor is what a stored one becomes in its dtype; NaNs are equal."""
    if loaded.shape != stored.shape:
        return False
    mine, theirs = loaded.detach().cpu(), stored.to(loaded.dtype)
    return bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all())


def layout(files: WeightFiles) -> dict[str, Any]:
    """What tensors the files of a model hold, for a report: how many, and a digest.

    It is of names, dtypes and shapes where all headers were read, and else of the names in the index.
    """
    if files.is_complete:
        said: Any = sorted((name, stored.kind, stored.shape) for name, stored in files.read_headers().items())
    else:
        said = sorted(files.file_of)
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return {"of": "names, dtypes and shapes" if files.is_complete else "names", "count": len(said), "sha256": digest}


def _differs(name: str, place: StoredTensor) -> InputError:
    return InputError(
        f"{name} was loaded with other values than {place.name} of {place.file} holds. transformers loaded another "
        "file, or converted it: which weights an edited copy should hold cannot be known. Put one set of weights into "
        "the folder, or write only the edit and the adapter (--save edit,lora)."
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
    """The folder in the hub's cache that a model with an id was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.name, "config.json") if source.folder is None else None
    return Path(config).parent if isinstance(config, str) else None


def _names(stored: Iterable[str], parameters: dict[str, Any], model: nn.Module) -> StoredNames:
    rename = _renaming(model, parameters)
    found = StoredNames()
    for name in stored:
        parameter, converted = rename(name)
        if parameter not in parameters and name in parameters:
            parameter, converted = name, False
        if parameter in parameters:
            (found.converted if converted else found.plain).setdefault(parameter, []).append(name)
    return found


def _renaming(model: nn.Module, parameters: dict[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """The rules by which transformers finds the parameter of a stored tensor, and whether its layout is changed."""
    prefix = getattr(model, "base_model_prefix", "")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return lambda name: (_renamed(name, patterns, prefix, parameters), False)
    rules = get_model_conversion_mapping(model, None, getattr(model, "hf_quantizer", None))
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
