"""The quantisation of a checkpoint: its scheme, and where the parts of its weights are."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_DTYPES, torch_dtype
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.quantised.bitsandbytes import BitsAndBytes4, BitsAndBytes8
from rocr.model.quantised.compressed_tensors import CompressedTensors
from rocr.model.quantised.fp8 import Fp8
from rocr.model.quantised.gptq import Awq, Gptq
from rocr.model.quantised.mxfp4 import Mxfp4
from rocr.model.quantised.scheme import Scheme
from rocr.model.weight_files import WeightFiles

SCHEMES: Mapping[str, type[Scheme]] = {
    "fp8": Fp8,
    "compressed-tensors": CompressedTensors,
    "mxfp4": Mxfp4,
    "gptq": Gptq,
    "awq": Awq,
}
"""The schemes by the names in `quant_method`, besides bitsandbytes."""
FIELDS = ("quantization_config", "compression_config")
EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
"""The name of a module that is one of the experts of a mixture, or holds them."""
UNREAD_SCALES = "_scale_inv"
"""The ending of the names of scales in FP8."""
MODULES_OF_PACKAGES = {"compressed-tensors": "compressed_tensors"}
"""The names that Python imports, of packages that pip installs under other names."""


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of a checkpoint.

    Attributes:
        scheme: The scheme.
        config: The fields of config.json.
        path: The names that lead to the settings of the scheme in `config`, such as ("quantization_config",).
    """

    scheme: Scheme
    config: Mapping[str, Any]
    path: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights that are not quantised: that of config.json, or bfloat16."""
        inner = self.config.get("text_config")
        for part in (self.config, inner if isinstance(inner, dict) else {}):
            for name in ("dtype", "torch_dtype"):
                value = str(part.get(name)).removeprefix("torch.")
                if value in SUPPORTED_DTYPES:
                    return torch_dtype(value)
        return torch.bfloat16

    def config_without(self, modules: Sequence[str], plain: Sequence[str], quantised: Sequence[str]) -> str:
        """Return the text of a config.json in which some modules are not quantised; see `Scheme.without`."""
        config = json.loads(json.dumps(self.config))
        place = config
        for name in self.path[:-1]:
            place = place[name]
        place[self.path[-1]] = self.scheme.without(modules, plain, quantised)
        return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight in the files of a checkpoint.

    Attributes:
        scheme: The scheme.
        module: The name of its module in the files.
        names: The names of its parts by role.
        files: The files of the checkpoint.
    """

    scheme: Scheme
    module: str
    names: Mapping[str, str]
    files: WeightFiles

    @property
    def places(self) -> dict[str, StoredTensor]:
        """Where the parts are by role. The headers of their files are read."""
        return {role: self.files.find(name) for role, name in self.names.items()}

    @property
    def name(self) -> str:
        """The name that the weight has in a checkpoint that is not quantised."""
        return self.scheme.weight_name(self.module)

    @property
    def size(self) -> int:
        """The bytes of all parts."""
        return sum(place.size for place in self.places.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values. Of most schemes, headers tell it."""
        known = self.scheme.shape({role: place.shape for role, place in self.places.items()})
        return tuple(self.read(None).shape) if known is None else known

    def parts(self) -> dict[str, Tensor]:
        """Read the parts."""
        return {role: place.read() for role, place in self.places.items()}

    def parts_of(self, expert: int) -> dict[str, Tensor]:
        """Read the parts of one expert of a weight that holds several, with a first dimension of 1."""
        return {role: place.map()[expert : expert + 1].clone() for role, place in self.places.items()}

    def load(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the values in a dtype. Experts are read one after the other, since float32 takes more memory.

        Raises:
            InputError: As `read`.
        """
        if len(shape) < 3:
            return self.read(shape).to(dtype)
        values = torch.empty(shape, dtype=dtype)
        for expert in range(shape[0]):
            values[expert] = self.read((1, *shape[1:]), self.parts_of(expert))[0]
        return values

    def read(self, shape: tuple[int, ...] | None, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the values, float32.

        Args:
            shape: The shape that the weight must have; None for any.
            parts: The parts; None reads them from the files.

        Raises:
            InputError: The parts do not fit each other, the settings or the shape, or values are not finite.
        """
        parts = self.parts() if parts is None else parts
        try:
            values = self.scheme.read(parts)
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.module} cannot be read as {self.scheme.label}: {str(error)[:200]}. Its tensors are "
                f"{', '.join(f'{place.name} ({place.kind} {list(place.shape)})' for place in self.places.values())}."
            ) from None
        if shape is not None and tuple(values.shape) != shape:
            raise InputError(
                f"{self.module} has the shape {tuple(values.shape)} in {self.scheme.label}, but the model's weight has "
                f"{shape}. rocr edits quantised weights that are stored as (outputs, inputs)."
            )
        if not torch.isfinite(values).all():
            raise InputError(f"{self.module} has values that are not finite in {self.scheme.label}.")
        return values


def find_quantisation(folder: Path | None) -> Quantisation | None:
    """Return the quantisation of a model's folder; None if it is not quantised, or the scheme is not known."""
    if folder is None or not (folder / "config.json").is_file():
        return None
    config = parse_json((folder / "config.json").read_bytes())
    if not isinstance(config, dict):
        return None
    inner = config.get("text_config")
    for path, part in (((), config), (("text_config",), inner)):
        for field in FIELDS:
            settings = part.get(field) if isinstance(part, dict) else None
            if isinstance(settings, dict):
                scheme = scheme_of(settings)
                return None if scheme is None else Quantisation(scheme, config, (*path, field))
    return None


def scheme_of(settings: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme that the settings describe; None if it is not known."""
    method = settings.get("quant_method")
    if method == "bitsandbytes" or (method is None and settings.get("load_in_4bit") is not None):
        return BitsAndBytes4(settings) if settings.get("load_in_4bit") else BitsAndBytes8(settings)
    scheme = SCHEMES.get(method) if isinstance(method, str) else None
    return None if scheme is None else scheme(settings)


def quantised_weights(files: WeightFiles) -> list[QuantisedWeight]:
    """Return the quantised weights of a checkpoint; none if its scheme is not known."""
    quantisation = find_quantisation(files.folder)
    if quantisation is None:
        return []
    found = quantisation.scheme.modules(files.file_of)
    return [QuantisedWeight(quantisation.scheme, module, names, files) for module, names in found.items()]


def check_scales(quantisation: Quantisation, files: WeightFiles) -> None:
    """Raise InputError if the files hold scales of a weight that is stored in a form that rocr does not read.

    transformers leaves such scales out without an error if it dequantises a model, as it does on a CPU, and so loads
    other values.
    """
    known = {name for weight in quantised_weights(files) for name in weight.names.values()}
    unknown = sorted(name for name in files.file_of if name.endswith(UNREAD_SCALES) and name not in known)
    if quantisation.scheme.label == Fp8.label and unknown:
        raise InputError(
            f"{files.folder} holds {unknown[0]} and {len(unknown) - 1} more scales of FP8 weights that are not stored "
            "as NAME.weight with NAME.weight_scale_inv: rocr and transformers read FP8 experts that are stored one by "
            "one, not all experts of a layer in one tensor."
        )


def dequantise_experts(quantisation: Quantisation, files: WeightFiles, config: Any) -> None:
    """Set `config` of a mixture so that transformers loads plain weights, where it can, in place.

    Without a GPU transformers does so anyway. With one, it runs quantised experts in kernels that hide their keys.

    Args:
        quantisation: The quantisation of the model.
        files: Its files.
        config: Its configuration.
    """
    settings = getattr(config, "quantization_config", None)
    has_experts = any(EXPERTS.search(weight.module) for weight in quantised_weights(files))
    if quantisation.scheme.can_dequantise and isinstance(settings, dict) and has_experts:
        settings["dequantize"] = True


def check_packages(quantisation: Quantisation, name: str) -> None:
    """Raise InputError if a package that loads a scheme is not installed; the message names it."""
    packages = quantisation.scheme.packages
    missing = [package for package in packages if importlib.util.find_spec(_module_of(package)) is None]
    if missing:
        raise InputError(
            f"{name} is quantised as {quantisation.scheme.label}, and the package "
            f"{' and '.join(missing)} that loads it is not installed: pip install {' '.join(missing)}. Without it, "
            "rocr can read the first layers itself: give --partial, with --text or --statistics."
        )


def _module_of(package: str) -> str:
    return MODULES_OF_PACKAGES.get(package, package)
