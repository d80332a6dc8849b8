"""The edit file: safetensors with a JSON header. Reading it runs no code from the file."""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocr.concepts import Concept, check_concepts
from rocr.config import EditConfig
from rocr.edit.measures import EditReport
from rocr.edit.record import EditRecord
from rocr.edit.retained_keys import labels_from_json, labels_to_json
from rocr.edit.stored import stored_from_json, stored_to_json
from rocr.edit.support import pack_support, unpack_support
from rocr.edit.system_file import pack_system, unpack_system
from rocr.edit.update import Applied, LayerUpdate, Part
from rocr.edit.wide_file import pack_wide, pack_wide_system, routed_rows, unpack_wide
from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_DTYPES, torch_dtype
from rocr.io.json_values import flag_of, list_of, text_of, whole_number_of
from rocr.io.tensors import read_tensors, write_tensors
from rocr.keys.prompts import RenderedTemplate
from rocr.model.fingerprint import Fingerprint
from rocr.solve.factors import Factors
from rocr.solve.solve import System
from rocr.statistics.provenance import config_of

FORMAT = "rocr edit 1"
_ROWS = ("keys", "residuals")
_WIDTHS = {f"torch.{name}": torch_dtype(name).itemsize for name in SUPPORTED_DTYPES}


def save_edit(edit: EditRecord, path: str | os.PathLike[str], undo: bool, overwrite: bool) -> None:
    """Write an edit file, completely or not at all; see `Edit.save`."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for update in edit.updates:
        for name, values in _matrices(update).items():
            plain = values.detach().to("cpu", torch.float32).contiguous()
            tensors[f"layer.{update.layer}.{name}"] = plain
        if update.parts:
            routed = tensors[f"layer.{update.layer}.routed"] = routed_rows(update.keys, update)
            tensors[f"layer.{update.layer}.keys"] = pack_wide(tensors[f"layer.{update.layer}.keys"], routed, update)
        entry: dict[str, Any] = {
            "layer": update.layer,
            "parameter": update.parameter,
            "transposed": update.transposed,
        }
        entry |= {name: getattr(update, name) for name in ("base", "own") if getattr(update, name) is not None}
        if update.parts:
            entry["parts"] = [part.to_json() for part in update.parts]
        if update.applied is not None:
            entry |= {name: getattr(update.applied, name) for name in ("dtype", "before", "after")}
            if undo and update.applied.undo is not None:
                packed, entry["undo"] = pack_undo(update.applied.undo)
                tensors[f"layer.{update.layer}.undo"] = packed
            if update.applied.stored:
                entry["stored"], kept = stored_to_json(update.applied.stored, bool(update.parts))
                tensors |= {f"layer.{update.layer}.{name}": values for name, values in kept.items() if undo}
        if update.system is not None:
            entry["system"], kept = pack_system(update.system)
            if update.parts:
                kept = pack_wide_system(kept, update)
            tensors |= {f"layer.{update.layer}.{name}": values for name, values in kept.items()}
        if update.factors.support is not None:
            entry["support"] = list(update.factors.support.shape)
            tensors[f"layer.{update.layer}.support"] = pack_support(update.factors.support)
        layers.append(entry)
    header = {
        "format": FORMAT,
        "concepts": [concept.to_json() for concept in edit.concepts],
        "config": edit.config.to_json(),
        "fingerprint": edit.fingerprint.to_json(),
        "layers": layers,
        "concept_of": edit.concept_of,
        # Without the seconds, which differ between two runs that make the same edit.
        "report": {name: value for name, value in edit.report.to_json().items() if name != "seconds"},
    }
    if edit.retained:
        header["retained"] = labels_to_json(edit.retained)
    if edit.computed_with:
        header["computed_with"] = dict(edit.computed_with)
    if edit.model_type is not None:
        header["model_type"] = edit.model_type
    if edit.rendered:
        header["rendered"] = [rendered.to_json() for rendered in edit.rendered]
    write_tensors(path, header, tensors, overwrite=overwrite)


def load_edit(path: str | os.PathLike[str]) -> EditRecord:
    """Read an edit file; see `Edit.load`."""
    header, tensors = read_tensors(path, FORMAT)
    try:
        concepts = [
            Concept(entry["name"], entry["redirect"], tuple(list_of(entry["aliases"], "aliases")), entry.get("kind"))
            for entry in list_of(header["concepts"], "concepts")
        ]
        check_concepts(concepts)
        retained = labels_from_json(header.get("retained", []), len(concepts))
        updates = [_load_update(entry, tensors, len(retained)) for entry in list_of(header["layers"], "layers")]
        edit = EditRecord(
            concepts,
            EditConfig.from_json(header["config"]),
            Fingerprint(**header["fingerprint"]),
            updates,
            [whole_number_of(concept, "concept_of") for concept in list_of(header["concept_of"], "concept_of")],
            EditReport.from_json(header["report"], len(concepts)),
            config_of(header.get("computed_with", {}), "computed_with"),
            tuple(_load_rendered(entry) for entry in list_of(header.get("rendered", []), "rendered")),
            None if "model_type" not in header else text_of(header["model_type"], "model_type"),
            retained,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, zlib.error) as error:
        raise InputError(f"{path} is not a complete edit file: {repr(error)[:200]}.") from None
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    _check(edit, path)
    return edit


def pack_undo(undo: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Compress undo data. The n-th bytes of all values are stored together, since the high bytes are mostly zero.

    Args:
        undo: Integers of any shape.

    Returns:
        (bytes,) uint8, and the arguments `shape` and `width` of `unpack_undo`.
    """
    width = undo.element_size()
    planes = undo.contiguous().view(torch.uint8).reshape(-1, width).numpy().T
    packed = zlib.compress(np.ascontiguousarray(planes).tobytes(), level=1)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8), {"shape": list(undo.shape), "width": width}


def unpack_undo(packed: Tensor, shape: list[int], width: int) -> Tensor:
    """Return the inverse of `pack_undo`.

    Raises:
        ValueError: The bytes are not those of a tensor of this shape and width.
    """
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    size = int(np.prod(shape, dtype=np.int64)) * width
    inflater = zlib.decompressobj()
    planes = np.frombuffer(inflater.decompress(packed.numpy().tobytes(), size), dtype=np.uint8)
    if len(planes) != size or inflater.unconsumed_tail:
        raise ValueError(f"the undo data has {len(planes)} bytes, not {size}")
    values = np.ascontiguousarray(planes.reshape(width, -1).T)
    return torch.from_numpy(values).view(dtype).reshape(shape)


def _load_update(entry: dict[str, Any], tensors: dict[str, Tensor], retained: int) -> LayerUpdate:
    """Return the update of a layer from its entry in the header, the tensors of the file and its retained rows."""
    layer = whole_number_of(entry["layer"], "layer")
    parts = tuple(Part.from_json(part) for part in list_of(entry.get("parts", []), "parts"))
    if parts:
        tensors = unpack_wide(layer, parts, tensors, retained)
    support = _load_support(entry, tensors.get(f"layer.{layer}.support"))
    factors = _load_factors(layer, tensors, support)
    keys, residuals = (tensors[f"layer.{layer}.{name}"] for name in _ROWS)
    applied = None
    if "after" in entry:
        packed = tensors.get(f"layer.{layer}.undo")
        dtype, before, after = (text_of(entry[name], name) for name in ("dtype", "before", "after"))
        shape: tuple[int, ...] = factors.shape
        if parts:
            shape = (math.prod(shape),)
        elif flag_of(entry["transposed"], "transposed"):
            shape = shape[::-1]
        undo = None if packed is None else _load_undo(packed, entry["undo"], shape, dtype)
        own = _of_layer(layer, tensors)
        stored = stored_from_json(entry["stored"], own, bool(parts)) if "stored" in entry else ()
        applied = Applied(dtype, before, after, undo, stored)
    return LayerUpdate(
        layer,
        text_of(entry["parameter"], "parameter"),
        factors,
        keys,
        residuals,
        flag_of(entry["transposed"], "transposed"),
        applied,
        None if "system" not in entry else _load_system(layer, entry["system"], tensors, keys, retained, support),
        **{name: text_of(entry[name], name) for name in ("base", "own") if name in entry},
        parts=parts,
    )


def _matrices(update: LayerUpdate) -> dict[str, Tensor]:
    """Return the matrices of an update by name, without a factor that is the identity."""
    named = {
        "left": update.factors.stored_left,
        "right": update.factors.stored_right,
        "keys": update.keys,
        "residuals": update.residuals,
    }
    return {name: values for name, values in named.items() if values is not None}


def _load_support(entry: dict[str, Any], packed: Tensor | None) -> Tensor | None:
    """Return where a sparse weight is not zero; None if the update does not keep zeros."""
    if "support" not in entry:
        return None
    if packed is None:
        raise ValueError("an update keeps zeros, but the file does not hold where they are")
    rows, columns = (whole_number_of(size, "support") for size in list_of(entry["support"], "support"))
    return unpack_support(packed, rows, columns)


def _load_factors(layer: int, tensors: dict[str, Tensor], support: Tensor | None) -> Factors:
    """Return the factors of a layer; one that is not in the file is the identity."""
    left, right = (tensors.get(f"layer.{layer}.{name}") for name in ("left", "right"))
    for name, values in (("left", left), ("right", right)):
        if values is not None and values.ndim != 2:
            raise ValueError(f"{name} of layer {layer} has the shape {tuple(values.shape)}")
    if support is not None:
        return Factors(left, right, support)
    # Files of rocr 0.1 contain a factor that is the identity.
    if left is not None and right is not None:
        left, right = (None, right) if _is_identity(left) else (left, None if _is_identity(right) else right)
    return Factors(left, right)


def _is_identity(values: Tensor) -> bool:
    rows, columns = values.shape
    return rows == columns > 1 and torch.equal(values, torch.eye(rows, dtype=values.dtype))


def _load_rendered(entry: dict[str, Any]) -> RenderedTemplate:
    if entry.keys() != {"before", "after"}:
        raise ValueError(f"a rendered template has the fields {', '.join(map(str, entry))[:60]}")
    return RenderedTemplate(text_of(entry["before"], "before"), text_of(entry["after"], "after"))


def _load_system(
    layer: int,
    entry: dict[str, Any],
    tensors: dict[str, Tensor],
    keys: Tensor,
    retained: int,
    support: Tensor | None,
) -> System:
    if support is not None and "metric" in entry:
        raise ValueError(f"the system of layer {layer} keeps zeros, but has no product")
    n, d_in = keys.shape
    return replace(unpack_system(entry, _of_layer(layer, tensors), n, d_in, retained), support=support)


def _of_layer(layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer by their names without the layer's."""
    prefix = f"layer.{layer}."
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


def _load_undo(packed: Tensor, described: dict[str, Any], shape: tuple[int, ...], dtype: str) -> Tensor:
    """Unpack undo data after checking that its size is that of the weight, since a few bytes can expand to many.

    Args:
        packed: The compressed bytes.
        described: Their shape and width, from the file.
        shape: Shape of the parameter as the model stores it, or the number of values of all blocks of a mixture.
        dtype: Dtype of the parameter, such as "torch.bfloat16".
    """
    if dtype not in _WIDTHS:
        raise ValueError(f"the weight was {dtype[:60]!r}, not one of {', '.join(_WIDTHS)}")
    width = whole_number_of(described["width"], "width")
    if packed.dtype != torch.uint8 or described["shape"] != list(shape) or width != _WIDTHS[dtype]:
        raise ValueError(
            f"the undo data is {packed.dtype} for a shape {str(described['shape'])[:60]} of {width} bytes per value, "
            f"not for the weight's {shape} of {_WIDTHS[dtype]}"
        )
    return unpack_undo(packed, described["shape"], width)


def _check(edit: EditRecord, path: str | os.PathLike[str]) -> None:
    """Raise InputError unless the parts of an edit fit together."""
    if not edit.updates or not edit.concepts:
        raise InputError(f"{path} is empty: it has {len(edit.updates)} updates of {len(edit.concepts)} concepts.")
    if not all(0 <= concept < len(edit.concepts) for concept in edit.concept_of):
        raise InputError(f"{path} is damaged: `concept_of` names concepts that it does not hold.")
    if len(set(edit.layers)) != len(edit.layers) or edit.config.layers != edit.layers:
        raise InputError(
            f"{path} is damaged: it has updates of the layers {edit.layers}, but settings for {edit.config.layers}."
        )
    measured = [layer.layer for layer in edit.report.layers]
    if measured and measured != list(edit.layers):
        raise InputError(
            f"{path} is damaged: it has updates of the layers {edit.layers}, but measures of {measured[:20]}."
        )
    if edit.rendered and len(edit.rendered) != len(edit.config.templates):
        raise InputError(
            f"{path} is damaged: it has {len(edit.rendered)} rendered templates, but settings with "
            f"{len(edit.config.templates)}."
        )
    for update in edit.updates:
        factors, n, (d_out, d_in) = update.factors, len(edit.concept_of), update.factors.shape
        # An edit of more keys than inputs has factors of rank d_in, also after concepts are removed.
        if factors.support is not None and factors.support.shape != factors.shape:
            raise InputError(
                f"{path} is damaged: the zeros of layer {update.layer} are those of a weight "
                f"{tuple(factors.support.shape)}, not {factors.shape}."
            )
        rank = n if update.parts or (factors.matrix is None and factors.rank == n) else min(d_out, d_in)
        rank = rank if factors.support is None else factors.rank  # that of keys and retained keys
        expected = {"left": (d_out, rank), "right": (rank, d_in), "keys": (n, d_in), "residuals": (n, d_out)}
        for name, values in _matrices(update).items():
            if tuple(values.shape) != expected[name] or values.dtype != torch.float32:
                raise InputError(
                    f"{path} is damaged: {name} of layer {update.layer} is {values.dtype} of shape "
                    f"{tuple(values.shape)}, not float32 of shape {expected[name]}."
                )
            if not torch.isfinite(values).all():
                raise InputError(f"{path} is damaged: {name} of layer {update.layer} has values that are not finite.")
