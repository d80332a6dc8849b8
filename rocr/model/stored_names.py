"""The names that the parameters of a model have in its files, and how parameters are made of stored tensors.

transformers decides which tensors are loaded, under which names, and which are joined, split or transposed. Its own
rules are used, so that this module has no knowledge of single models.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from rocr.errors import InputError
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.quantised.checkpoint import QuantisedWeight, quantised_weights
from rocr.model.weight_files import WeightFiles


@dataclass
class Conversion:
    """How transformers makes a parameter of stored tensors, such as one of all experts of those of each expert.

    Attributes:
        rule: The WeightConverter of transformers.
        patterns: For each stored tensor the pattern of the rule that its name matches. Quantised weights have the
            name that they have in a checkpoint that is not quantised.
    """

    rule: Any
    patterns: dict[str, str] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        """The names of the stored tensors; numbers in names are sorted by their values, as transformers does."""
        return sorted(self.patterns, key=_natural)

    def values(self, parameter: str, model: nn.Module, read: Callable[[str], Tensor]) -> Tensor:
        """Return the values of the parameter.

        Args:
            parameter: The name of the parameter.
            model: The model, which may be on the meta device.
            read: Returns the values of a stored tensor by its name.

        Raises:
            InputError: The stored tensors do not fit each other.
        """
        rule = copy.deepcopy(self.rule)
        for name in self.names:
            rule.add_tensor(parameter, name, self.patterns[name], partial(read, name))
        try:
            made = rule.convert(parameter, model=model, config=model.config)[parameter]
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise InputError(
                f"{parameter} cannot be made of {self.names[0]} and {len(self.names) - 1} more stored tensors: "
                f"{str(error)[:200]}."
            ) from None
        values: Tensor = made[0] if isinstance(made, list) else made
        return values


@dataclass
class StoredNames:
    """The names that the parameters of a model have in its files.

    Attributes:
        plain: For each parameter that is loaded without a change of layout, the names of its tensors: more than one
            if it is stored under several names.
        converted: For each parameter that is joined, split or transposed from other tensors, how.
        quantised: For each parameter that is one quantised weight of a scheme that rocr reads, that weight.
        packed: The quantised weights that conversions are made of, by their names in `Conversion.patterns`.
    """

    plain: dict[str, list[str]] = field(default_factory=dict)
    converted: dict[str, Conversion] = field(default_factory=dict)
    quantised: dict[str, QuantisedWeight] = field(default_factory=dict)
    packed: dict[str, QuantisedWeight] = field(default_factory=dict)

    @property
    def readable(self) -> set[str]:
        """The parameters whose values rocr reads from the files itself."""
        return {*self.plain, *self.quantised, *self.converted}

    @property
    def quantised_weights(self) -> list[QuantisedWeight]:
        """All quantised weights."""
        return [*self.quantised.values(), *self.packed.values()]

    def quantised_of(self, parameter: str) -> list[QuantisedWeight]:
        """Return the quantised weights that a parameter is made of; empty if it is not quantised."""
        if parameter in self.quantised:
            return [self.quantised[parameter]]
        names = self.converted[parameter].names if parameter in self.converted else []
        return [self.packed[name] for name in names if name in self.packed]

    def places(self, files: WeightFiles, parameter: str) -> list[StoredTensor]:
        """Return the tensors in the files that hold a parameter, each once."""
        if parameter in self.converted:
            names = self.converted[parameter].names
            plain = [files.find(name) for name in names if name not in self.packed]
        else:
            plain = [] if parameter in self.quantised else [files.find(self.of(parameter))]
        return plain + [place for weight in self.quantised_of(parameter) for place in weight.places.values()]

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
    if files.index is not None and any(name not in found.readable for name, _ in model.named_parameters()):
        before = len(files.file_of)
        files.read_headers()
        if len(files.file_of) > before:
            found = _names(files, parameters, model)
    return found


def _names(files: WeightFiles, parameters: dict[str, Any], model: nn.Module) -> StoredNames:
    weights = quantised_weights(files)
    # The rules of a quantiser are for its own modules; without them, a weight has the name of the dense weight.
    rules = _rules(model, parameters, None if weights else getattr(model, "hf_quantizer", None))
    found = StoredNames()
    for weight in weights:
        parameter, rule, pattern = rules(weight.name)
        if rule is None:
            found.quantised[parameter] = weight
        elif parameter in parameters:
            found.converted.setdefault(parameter, Conversion(rule)).patterns[weight.name] = pattern
            found.packed[weight.name] = weight
    parts = {name for weight in weights for name in weight.names.values()}
    for name in files.file_of:
        if name in parts:
            continue
        parameter, rule, pattern = rules(name)
        if parameter not in parameters and name in parameters:
            parameter, rule = name, None
        if parameter not in parameters:
            continue
        if rule is None:
            found.plain.setdefault(parameter, []).append(name)
        else:
            found.converted.setdefault(parameter, Conversion(rule)).patterns[name] = pattern
    return found


def _rules(
    model: nn.Module, parameters: dict[str, Any], quantizer: object
) -> Callable[[str], tuple[str, Any | None, str]]:
    """Return transformers' mapping from a stored tensor to its parameter.

    Returns:
        A function of the stored name that gives the name of the parameter, the converter that changes the layout or
        None, and the pattern of the converter that the name matches.
    """
    prefix = getattr(model, "base_model_prefix", "")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return lambda name: (_renamed(name, patterns, prefix, parameters), None, "")
    rules = get_model_conversion_mapping(model, None, quantizer)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}

    def found(name: str) -> tuple[str, Any | None, str]:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        return parameter, None if pattern is None else of_pattern[pattern], pattern or ""

    return found


def _renamed(name: str, patterns: Mapping[str, str], prefix: str, parameters: dict[str, Any]) -> str:
    for pattern, replacement in patterns.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in parameters:
            return candidate
    return name


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in a name by their value."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
