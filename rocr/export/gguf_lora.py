"""Write an edit as a LoRA adapter in a GGUF file, which llama.cpp loads beside the model's own file.

Tensors are named as llama.cpp's `convert_lora_to_gguf.py` names them: for each edited tensor NAME, NAME.lora_a
(rank, d_in) and NAME.lora_b (d_out, rank). llama.cpp adds alpha / rank · B A x to the output. Those of a tensor of E
experts are (E, rank, d_in) and (E, d_out, rank), and each expert's product gets its own pair (`build_lora_mm_id` in
src/llama-graph.cpp of llama.cpp); they are zero for experts that the edit does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rocr.edit.lora import AdapterLayer, check_rank, truncated_parts
from rocr.edit.lora_experts import ParameterFactors
from rocr.errors import InputError
from rocr.export.gguf import gguf_path
from rocr.io.boundary import calling
from rocr.io.disk_space import check_space
from rocr.model.gguf_layout import GgufLayout, read_gguf_layout
from rocr.model.source import ADAPTER_GGUF, ModelSource

if TYPE_CHECKING:
    from rocr.edit.edit import Edit


def write_gguf_lora(
    edit: Edit, source: ModelSource, depth: int, folder: Path, rank: int | None = None
) -> list[AdapterLayer]:
    """Write the adapter of an edit into a folder that exists.

    Args:
        edit: The edit.
        source: The source of the model, a GGUF file, whose architecture and names the adapter has.
        depth: Number of decoder layers of the model.
        folder: The folder to write to. The file is named `lora.gguf`.
        rank: Largest rank. None leaves nothing out.

    Returns:
        One `AdapterLayer` for each edited tensor, with its rank and truncation errors.

    Raises:
        InputError: The model is no GGUF file, the file holds no tensor of an edited weight, or there is too little
            free disk space.
        RocrError: Writing fails.
    """
    layout = read_gguf_layout(gguf_path(source, "gguf-lora"))
    tensors, layers = gguf_lora_tensors(edit, layout, depth, rank)
    check_space(folder, sum(values.nbytes for values in tensors.values()))
    import gguf

    with calling(f"Writing {ADAPTER_GGUF}"):
        writer = gguf.GGUFWriter(folder / ADAPTER_GGUF, layout.architecture)
        try:
            writer.add_string(gguf.Keys.General.TYPE, "adapter")
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(max(layer.rank for layer in layers)))
            for name, values in tensors.items():
                writer.add_tensor(name, values.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return layers


def gguf_lora_tensors(
    edit: Edit, layout: GgufLayout, depth: int, rank: int | None = None
) -> tuple[dict[str, Tensor], list[AdapterLayer]]:
    """Return the tensors of the adapter of an edit by name, float32, and its layers.

    All layers are padded with zeros to one rank, so that alpha = rank makes the scale 1 for each.
    """
    check_rank(rank)
    tensors: dict[str, Tensor] = {}
    layers = []
    for pair in adapter_pairs(edit, rank):
        tensor = layout.find(pair.parameter, depth)
        expected = (*pair.b.shape[:-1], pair.a.shape[-1])
        if tensor.shape != expected:
            raise InputError(
                f"{tensor.name} has the shape {tensor.shape} in {layout.path}, but the edit changes a weight of shape "
                f"{expected}."
            )
        tensors |= {f"{tensor.name}.lora_a": pair.a, f"{tensor.name}.lora_b": pair.b}
        layers.append(pair.layer)
    return tensors, layers


@dataclass(frozen=True)
class AdapterPair:
    """The matrices of an adapter for one tensor, float32.

    Attributes:
        parameter: Name of the parameter in the model's state dict.
        a: (rank, d_in), or (E, rank, d_in) for E experts.
        b: (d_out, rank), or (E, d_out, rank).
        layer: The layer, with the truncation errors.
    """

    parameter: str
    a: Tensor
    b: Tensor
    layer: AdapterLayer


def adapter_pairs(edit: Edit, rank: int | None, padded_to: int | None = None) -> list[AdapterPair]:
    """Return the matrices of the adapter of an edit for each of its parameters.

    Args:
        edit: The edit.
        rank: Largest rank. None leaves nothing out.
        padded_to: The rank of all matrices. None is the largest rank that one of them needs.
    """
    found = []
    for update in edit.updates:
        full = min(update.factors.rank, *update.factors.shape)
        parts, errors = truncated_parts(update, rank)
        found += [(update.layer, factors, full, errors) for factors in parts]
    common = max(padded_to or 0, *(factors.rank for _, factors, _, _ in found))
    pairs = []
    for layer, factors, full, errors in found:
        own = factors.own and factors.own.rpartition(".")[0]
        described = AdapterLayer(layer, factors.module, factors.rank, full, *errors, own)
        pairs.append(AdapterPair(factors.parameter, *_matrices(factors, common), described))
    return pairs


def _matrices(factors: ParameterFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a parameter, padded with zeros to a rank."""
    first = factors.parts[0]
    count = 1 if first.expert is None else first.experts
    a = torch.zeros(count, rank, first.width)
    b = torch.zeros(count, factors.lefts[0].shape[0], rank)
    for part, left, right in zip(factors.parts, factors.lefts, factors.rights, strict=True):
        own = right.shape[0]
        a[part.expert or 0, :own] = right
        b[part.expert or 0, :, :own] = left
    return (a[0], b[0]) if first.expert is None else (a, b)
