"""Write an edit as a PEFT adapter, which peft and vLLM load without rocr."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rocr.output import new_directory

if TYPE_CHECKING:
    from rocr.edit import Edit


def export_lora(edit: Edit, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; see `Edit.export_lora`."""
    tensors, config = adapter_tensors(edit)
    with new_directory(path, overwrite=overwrite) as partial:
        save_file(tensors, Path(partial) / "adapter_model.safetensors", metadata={"format": "pt"})
        (Path(partial) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_tensors(edit: Edit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an edit's adapter, and its settings.

    The adapter's rank is the number of keys, or the size of the weight where that is smaller.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for update in edit.updates:
        module = update.parameter.removesuffix(".weight")
        left, right = thin_factors(update.left.cpu(), update.right.cpu())
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.contiguous()
        ranks[module] = right.shape[0]
    largest = max(ranks.values())
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": edit.fingerprint.name,
        "target_modules": sorted(ranks),
        "r": largest,
        # alpha equal to the rank makes PEFT's scale alpha / r one.
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(update.transposed for update in edit.updates),
        "inference_mode": True,
    }


def thin_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with an inner dimension of at most min(d_out, d_in).

    Args:
        left: (d_out, n) float32.
        right: (n, d_in) float32.
    """
    inner = left.shape[1]
    if inner <= min(left.shape[0], right.shape[1]):
        return left, right
    if left.shape[0] <= right.shape[1]:
        return torch.eye(left.shape[0]), (left.double() @ right.double()).float()
    return (left.double() @ right.double()).float(), torch.eye(right.shape[1])
