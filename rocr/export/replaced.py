"""The quantised tensors that an output replaces, and the restoring of the model's files from them.

`replaced.safetensors` holds the bytes of each replaced tensor, of the headers of its files, and of config.json. With
them, `rocr revert` writes the files of the model as they were, byte for byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rocr.edit.weight import Weight
from rocr.errors import InputError, VerificationError
from rocr.export.copying import CONFIG_FILE, REPLACED_FILE
from rocr.export.quantised import WrittenBlock, WrittenQuantised
from rocr.export.replacing import Deferred, Replacements, header_text
from rocr.export.rewrite import rewrite_model
from rocr.io.json_values import list_of, object_of, parse_json, text_of
from rocr.io.safetensors_layout import read_layout
from rocr.io.tensors import read_header, read_tensors, write_tensors
from rocr.model.check_folder import INDEX_FILE
from rocr.model.quantised.checkpoint import Quantisation, QuantisedWeight
from rocr.model.quantised.place import QuantisedPlace
from rocr.model.stored_names import StoredNames
from rocr.model.stored_weights import replaced_weights
from rocr.model.weight_files import WeightFiles

FORMAT = "rocr replaced tensors 1"
TENSOR, HEADER, FILE = "tensor ", "header ", "file "
"""Prefixes of the names in the file, before the name of a tensor or a file."""


def kept_parts(written: Sequence[WrittenQuantised]) -> dict[str, Tensor]:
    """Return the parts that are written in their own scheme, by their names in the files."""
    found: dict[str, Tensor] = {}
    for place, block in (pair for weight in written for pair in weight.quantised):
        names = place.weight.names
        if block.parts is None:
            continue
        if place.expert is None:
            found |= {names[role]: values for role, values in block.parts.items()}
            continue
        for role, name in names.items():
            if name not in found:
                found[name] = place.weight.places[role].read()
        place.put_parts({role: found[name] for role, name in names.items()}, block.parts)
    return found


def replacements(
    quantisation: Quantisation,
    files: WeightFiles,
    names: StoredNames,
    model: nn.Module,
    edited: Sequence[Weight],
    written: Sequence[WrittenQuantised],
) -> Replacements | None:
    """Return what a model's files exchange for weights that are no longer quantised; None if there are none.

    Args:
        quantisation: The quantisation of the model.
        files: Its files.
        names: The names of its parameters in them.
        model: The model, from which the modules that were not quantised are listed.
        edited: The edited weights that are quantised in the files.
        written: The same, as they are written.
    """
    if not any(weight.is_plain for weight in written):
        return None
    values: dict[str, list[WrittenBlock]] = {}
    for place, block in (pair for weight in written for pair in weight.quantised):
        values.setdefault(place.weight.module, []).append(block)
    removed: dict[str, list[str]] = {}
    added: dict[str, dict[str, Tensor | Deferred]] = {}
    for weight in replaced_by(names, edited):
        for name in weight.names.values():
            removed.setdefault(files.file_of[name], []).append(name)
        file = files.file_of[next(iter(weight.names.values()))]
        compute = partial(_plain_values, weight, quantisation.dtype, values.get(weight.module, []))
        added.setdefault(file, {})[weight.name] = Deferred(weight.shape, quantisation.dtype, compute)
    modules = _modules(names, edited)
    others = [name for name in _matrices(model) if not names.quantised_of(f"{name}.weight")]
    quantised = [weight.module for weight in names.quantised_weights]
    config = quantisation.config_without(modules, [name for name in others if name not in modules], quantised)
    return Replacements(removed, added, config=config.encode("utf-8", "backslashreplace"))


def replaced_by(names: StoredNames, edited: Sequence[Weight]) -> list[QuantisedWeight]:
    """Return the quantised weights that become plain with edited ones, each once; see `replaced_weights`."""
    blocks = [block for weight in edited for block in weight.blocks]
    found = {weight.module: weight for block in blocks for weight in replaced_weights(names, block)}
    return list(found.values())


def save_replaced(
    files: WeightFiles, weights: Sequence[QuantisedWeight], replaced: Replacements | None, path: Path
) -> None:
    """Write the parts of quantised weights as they were, and what else restores the model's files.

    Args:
        files: The files of the model.
        weights: The weights whose parts are replaced or changed.
        replaced: What the files exchange; None if they keep their names and shapes.
        path: The file to write.
    """
    tensors: dict[str, Tensor] = {}
    for weight in weights:
        for place in weight.places.values():
            tensors[TENSOR + place.name] = place.map()
    changed = [] if replaced is None else sorted(replaced.files)
    for file in changed:
        tensors[HEADER + file] = _bytes(header_text(files.folder / file))
    if changed:
        for name in filter(None, (CONFIG_FILE, files.index)):
            tensors[FILE + name] = _bytes((files.folder / name).read_bytes())
    header = {
        "format": FORMAT,
        "added": {file: sorted(replaced.added.get(file, {})) for file in changed} if replaced is not None else {},
        "file_of": {name: files.file_of[name] for weight in weights for name in weight.names.values()},
    }
    write_tensors(path, header, tensors)


def has_replaced(folder: Path) -> bool:
    """Return whether an output holds the quantised tensors that it replaces."""
    return (folder / REPLACED_FILE).is_file()


def names_added(folder: Path) -> set[str]:
    """Return the names of the tensors in an output that took the place of quantised ones.

    Raises:
        InputError: The record is damaged.
    """
    path = folder / REPLACED_FILE
    try:
        added = object_of(read_header(path).get("added", {}), "added")
        return {text_of(name, "a name") for names in added.values() for name in list_of(names, "names")}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as replaced tensors: {str(error)[:200]}.") from None


def restore_replaced(files: WeightFiles, out: Path, others: Mapping[str, Tensor]) -> list[str]:
    """Write the files of a model as they were before a quantised output was written, into a folder that exists.

    Args:
        files: The files of the output.
        out: The folder to write to.
        others: Former values of edited tensors that were not quantised, by their names.

    Returns:
        Names of the rewritten weight files.

    Raises:
        InputError: The replaced tensors are damaged, or do not fit the files.
        VerificationError: The restored files are not complete.
    """
    path = files.folder / REPLACED_FILE
    header, tensors = read_tensors(path, FORMAT)
    try:
        added = {
            file: [text_of(name, "a name") for name in list_of(names, "names")]
            for file, names in object_of(header["added"], "added").items()
        }
        file_of = {name: text_of(file, "a file") for name, file in object_of(header["file_of"], "file_of").items()}
        parts = {name: tensors[TENSOR + name] for name in file_of}
        headers = {file: bytes(tensors[HEADER + file].tolist()) for file in added}
        texts = [tensors.get(FILE + name) for name in (CONFIG_FILE, INDEX_FILE)]
        config, index = (None if text is None else bytes(text.tolist()) for text in texts)
        for text in headers.values():
            object_of(parse_json(text), "a header")
        unknown = [name for file, names in added.items() for name in names if files.file_of.get(name) != file]
        unknown += [file for file in file_of.values() if file not in files.files]
        if unknown:
            raise ValueError(f"{unknown[0][:60]!r} is not in the output")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as replaced tensors: {str(error)[:200]}.") from None
    back: dict[str, dict[str, Tensor | Deferred]] = {}
    changes = {name: values for name, values in parts.items() if file_of[name] not in added} | dict(others)
    for name, values in parts.items():
        if file_of[name] in added:
            back.setdefault(file_of[name], {})[name] = values
    try:
        rewritten = rewrite_model(files, changes, out, (), Replacements(added, back, headers, config, index))
        for file, text in headers.items():
            if set(read_layout(out / file)) != {*object_of(parse_json(text), "a header")} - {"__metadata__"}:
                raise ValueError(f"the tensors of {file} are not those of its header")
    except (KeyError, ValueError, TypeError) as error:
        raise VerificationError(f"{path} does not fit the files of {files.folder}: {str(error)[:200]}.") from None
    return rewritten


def _plain_values(weight: QuantisedWeight, dtype: torch.dtype, edited: Sequence[WrittenBlock]) -> Tensor:
    """Return the values of a quantised weight in a plain dtype, with edited blocks in their places."""
    own = [block for block in edited if isinstance(block.place, QuantisedPlace)]
    is_whole = any(block.place.expert is None for block in own if isinstance(block.place, QuantisedPlace))
    values = torch.empty(weight.shape, dtype=dtype) if is_whole else weight.load(weight.shape, dtype)
    for block in own:
        assert isinstance(block.place, QuantisedPlace)
        block.place.put(values, block.values)
    return values


def _modules(names: StoredNames, edited: Sequence[Weight]) -> list[str]:
    """Return the modules that loaders must not convert: of experts, the module of all experts of a layer."""
    found: dict[str, None] = {}
    for block in (block for weight in edited for block in weight.blocks):
        modules = [weight.module for weight in replaced_weights(names, block)]
        if block.expert is None:
            found |= dict.fromkeys(modules)
        elif modules:
            paths = [module.split(".") for module in modules]
            shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
            found[".".join(level[0] for level in shared)] = None
    return list(found)


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)


def _matrices(model: nn.Module) -> list[str]:
    """Return the names of the modules of a model that multiply by a matrix."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
