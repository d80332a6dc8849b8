"""Write an edit as a LoRA adapter in a GGUF file, which llama.cpp loads beside the model's own file.

Tensors are named as llama.cpp's `convert_lora_to_gguf.py` names them: for each edited tensor NAME, NAME.lora_a
(rank, d_in) and NAME.lora_b (d_out, rank). llama.cpp adds alpha / rank · B A x to the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rocr.edit.lora import AdapterLayer, adapter_layer, check_rank
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
        One `AdapterLayer` per layer, with its rank and truncation errors.

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
    mixture = next((update for update in edit.updates if update.parts), None)
    if mixture is not None:
        raise InputError(
            f"{mixture.parameter} holds experts, for which rocr writes no GGUF adapter. Write a PEFT adapter instead "
            "(--save lora)."
        )
    found = [adapter_layer(update, rank) for update in edit.updates]
    largest = max(layer.rank for layer, _, _ in found)
    tensors: dict[str, Tensor] = {}
    for update, (layer, left, right) in zip(edit.updates, found, strict=True):
        tensor = layout.find(update.parameter, depth)
        if tensor.shape != (left.shape[0], right.shape[1]):
            raise InputError(
                f"{tensor.name} has the shape {tensor.shape} in {layout.path}, but the edit changes a weight of shape "
                f"{(left.shape[0], right.shape[1])}."
            )
        missing = largest - layer.rank
        for end, values, padding in (("a", right, (0, 0, 0, missing)), ("b", left, (0, missing))):
            tensors[f"{tensor.name}.lora_{end}"] = torch.nn.functional.pad(values.float(), padding).contiguous()
    return tensors, [layer for layer, _, _ in found]
