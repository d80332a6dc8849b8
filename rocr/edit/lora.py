"""Write an edit as a PEFT adapter, which peft and vLLM load without rocr."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rocr.edit.lora_experts import ParameterFactors, parameter_factors
from rocr.edit.record import EditRecord
from rocr.edit.support import refuse_low_rank
from rocr.edit.update import LayerUpdate, Part
from rocr.errors import InputError
from rocr.io.disk_space import check_space
from rocr.io.output import new_directory
from rocr.ops.arithmetic import plain_arithmetic
from rocr.solve.factors import Factors
from rocr.statistics.provenance import EXPERTS, TEXT_ENCODER

VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM supports for `max_lora_rank`. Source of both constants: `MaxLoRARanks` in vllm/config/lora.py of
0.14 (docs.vllm.ai/en/v0.14.0/api/vllm/config/lora). Earlier releases support fewer values, 0.6 up to 256."""

GGUF_SUFFIX = ".gguf"
REFUSED_MODULE = "out_proj"
REFUSED_BY_PEFT = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""The model types whose modules named `out_proj` get no LoRA from peft, since fused kernels read their weights without
calling them. Source: `_check_lora_target_modules_mamba` in peft 0.21, tuners/tuners_utils.py."""


@dataclass(frozen=True)
class AdapterLayer:
    """One layer of an adapter, with its truncation errors.

    Attributes:
        layer: Index of the decoder layer.
        module: Name of its down-projection.
        rank: Rank of the adapter at this layer.
        full_rank: Rank of the edit: the number of keys, or min(d_out, d_in) if that is smaller.
        relative_error: ‖Δ - BA‖ / ‖Δ‖ in the Frobenius norm. 0 at the full rank.
        key_error: ‖(Δ - BA) Kᵀ‖ / ‖Δ Kᵀ‖, the relative error at the concepts' keys. 0 at the full rank.
        own: Name of the module in the other class that the checkpoint can be loaded as. The adapter then holds the
            layer under both names, so that it loads onto both classes. None if there is none or the name is the same.
    """

    layer: int
    module: str
    rank: int
    full_rank: int
    relative_error: float
    key_error: float
    own: str | None = None

    @property
    def modules(self) -> list[str]:
        """Names of the module in the adapter, one or two."""
        return [self.module] if self.own is None else [self.module, self.own]


def export_lora(
    edit: EditRecord, path: str | os.PathLike[str], rank: int | None = None, overwrite: bool = False
) -> list[AdapterLayer]:
    """Write `adapter_config.json` and `adapter_model.safetensors`; see `Edit.export_lora`."""
    tensors, config, layers = adapter_tensors(edit, rank)
    with new_directory(path, overwrite=overwrite) as partial:
        check_space(partial, sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, Path(partial) / "adapter_model.safetensors", metadata={"format": "pt"})
        (Path(partial) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return layers


@plain_arithmetic()
def adapter_tensors(
    edit: EditRecord, rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, object], list[AdapterLayer]]:
    """Return the tensors of an edit's adapter by name, its settings, and its layers with their truncation errors.

    Raises:
        InputError: The rank is not a whole number of at least 1, or peft loads no adapter of an edited module.
    """
    check_rank(rank)
    _check_loadable(edit)
    tensors: dict[str, Tensor] = {}
    layers = []
    if any(update.parts for update in edit.updates):
        return _with_experts(edit, rank)
    for update in edit.updates:
        layer, left, right = adapter_layer(update, rank)
        for module in layer.modules:
            for factor, values in (("A", right), ("B", left)):
                # safetensors rejects tensors that share memory.
                own = values.contiguous() if module == layer.module else values.clone().contiguous()
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = own
        layers.append(layer)
    if _is_mixture(edit):
        largest = max(layer.rank for layer in layers)
        for layer in layers:
            _pad(tensors, layer, largest)
    return tensors, _adapter_config(edit, layers), layers


def _with_experts(
    edit: EditRecord, rank: int | None
) -> tuple[dict[str, Tensor], dict[str, object], list[AdapterLayer]]:
    """Return the adapter of an edit that changes experts: PEFT supports one rank for all target parameters."""
    found: list[tuple[LayerUpdate, ParameterFactors, tuple[float, float]]] = []
    for update in edit.updates:
        parts, errors = truncated_parts(update, rank)
        found += [(update, factors, errors) for factors in parts]
    largest = max(factors.rank for _, factors, _ in found)
    tensors: dict[str, Tensor] = {}
    layers, names = [], []
    for update, factors, (relative_error, key_error) in found:
        a, b = factors.adapter(largest)
        own = factors.own and factors.own.rpartition(".")[0]
        kind = str(edit.model_type or edit.computed_with.get("model_type"))
        if own is not None and _renamed_by_peft(f"base_model.model.{own}.lora_A.weight", kind) is not None:
            own = None  # peft itself turns this name into the other one, and would find two adapters
        full = min(update.factors.rank, *update.factors.shape)
        layers.append(AdapterLayer(update.layer, factors.module, largest, full, relative_error, key_error, own))
        names += [name for name in (factors.parameter, own and factors.own) if name is not None]
        for module in layers[-1].modules:
            for factor, values in (("A", a), ("B", b)):
                held = values if module == factors.module else values.clone()
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = held.contiguous()
    return tensors, _adapter_config(edit, layers, names), layers


def truncated_parts(update: LayerUpdate, rank: int | None) -> tuple[list[ParameterFactors], tuple[float, float]]:
    """Return the factors of a layer's parameters, and the largest truncation errors of `AdapterLayer`."""
    refuse_low_rank(update.factors.support, update.parameter, "A LoRA adapter")
    if not update.parts:
        # A dense layer of a model that also has mixtures.
        layer, left, right = adapter_layer(update, rank)
        part = Part(0, update.parameter, right.shape[1], update.transposed, own=update.own)
        factors = ParameterFactors([part], update.parameter, update.own, [left], [right])
        return [factors], (layer.relative_error, layer.key_error)
    left, right = update.left.cpu(), update.right.cpu()
    pieces = [(left, right[:, place]) for place in update.columns]
    errors = [(0.0, 0.0)]
    if rank is not None and rank < right.shape[0]:
        cut = [
            truncate(left, piece, update.keys[:, place].cpu(), rank)
            for (_, piece), place in zip(pieces, update.columns, strict=True)
        ]
        pieces, errors = [each[:2] for each in cut], [each[2:] for each in cut]
    elif right.shape[0] > min(left.shape[0], *(part.width for part in update.parts)):
        pieces = [thin_factors(Factors(left, piece)) for _, piece in pieces]
    found = parameter_factors(update, [piece[0] for piece in pieces], [piece[1] for piece in pieces])
    return list(found), (max(error[0] for error in errors), max(error[1] for error in errors))


def _check_loadable(edit: EditRecord) -> None:
    """Raise InputError if peft refuses an adapter of one of the edited modules."""
    kind = edit.computed_with.get("model_type")
    refused = [update.parameter for update in edit.updates if update.parameter.split(".")[-2] == REFUSED_MODULE]
    if refused and kind in REFUSED_BY_PEFT:
        raise InputError(
            f"peft loads no adapter of {refused[0]} in models of the type {kind}, whose kernels read its weight "
            "without calling it. Save the edit itself or the edited model instead (Edit.save, --save)."
        )
    for part in (part for update in edit.updates for part in update.parts):
        if part.stacked:
            raise InputError(
                f"peft has no adapter for {part.parameter}, one matrix with the rows of {part.experts} experts. Save "
                "the edit itself or the edited model instead (Edit.save, --save)."
            )
        module = part.parameter.rpartition(".")[0]
        name = f"base_model.model.{module}.lora_A.weight"
        renamed = _renamed_by_peft(name, str(edit.model_type)) or _renamed_by_peft(name, str(kind))
        if renamed is not None:
            raise InputError(
                f"peft would look for the adapter of {part.parameter} under the name {renamed}, by a rule of "
                f"transformers for checkpoints of {edit.model_type}, and leave it out. Save the edit itself or the "
                "edited model instead (Edit.save, --save)."
            )


def _renamed_by_peft(name: str, kind: str) -> str | None:
    """Return the name that peft gives to a tensor of an adapter when it loads it; None if it keeps the name."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5
        return None
    found = name
    for rule in get_checkpoint_conversion_mapping(kind) or ():
        if isinstance(rule, WeightRenaming):
            found = rule.rename_source_key(found)[0]
    return found if found != name else None


def _pad(tensors: dict[str, Tensor], layer: AdapterLayer, rank: int) -> None:
    """Pad the factors of one layer with zeros to a larger rank."""
    missing = rank - layer.rank
    for module in layer.modules:
        for name, padding in ("lora_A", (0, 0, 0, missing)), ("lora_B", (0, missing)):
            key = f"base_model.model.{module}.{name}.weight"
            tensors[key] = torch.nn.functional.pad(tensors[key], padding).contiguous()


def check_rank(rank: int | None) -> None:
    """Raise InputError unless a rank is None or a whole number of at least 1."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputError(f"The rank of an adapter must be a whole number of at least 1, not {repr(rank)[:60]}.")


def adapter_layer(update: LayerUpdate, rank: int | None) -> tuple[AdapterLayer, Tensor, Tensor]:
    """Return one layer of an adapter with its factors, B (d_out, r) and A (r, d_in).

    Args:
        update: The update of the layer.
        rank: Largest rank. None is the rank of the update.
    """
    refuse_low_rank(update.factors.support, update.parameter, "A LoRA adapter")
    left, right = thin_factors(update.factors)
    full = right.shape[0]
    relative_error = key_error = 0.0
    if rank is not None and rank < full:
        left, right, relative_error, key_error = truncate(left, right, update.keys.cpu(), rank)
    module, own = update.parameter.removesuffix(".weight"), update.own and update.own.removesuffix(".weight")
    return AdapterLayer(update.layer, module, right.shape[0], full, relative_error, key_error, own), left, right


def truncate(left: Tensor, right: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the factors of the matrix of a smaller rank that is closest to an update at its keys.

    With U the first left singular vectors of Δ Kᵀ, U Uᵀ Δ minimizes ‖(Δ - X) Kᵀ‖ over all X of this rank (Eckart and
    Young 1936, applied to Δ Kᵀ). Since U Uᵀ is a projection, no input is moved further than by Δ, so that ordinary
    text stays as protected as by the edit.

    Args:
        left: (d_out, r).
        right: (r, d_in); Δ = left @ right.
        keys: K, (n, d_in).
        rank: A rank below r.

    Returns:
        The factors (d_out, rank) and (rank, d_in), float32, and the two errors of `AdapterLayer`.
    """
    left, right = left.double(), right.double()
    moves = left @ (right @ keys.double().T)
    basis = torch.linalg.svd(moves, full_matrices=False).U[:, :rank]
    kept = (basis.T @ left) @ right
    gram, whole = left.T @ left, right @ right.T
    total = (gram * whole).sum()
    # The part that is left out is orthogonal to the part that is kept.
    lost = (total - kept.square().sum()).clamp(min=0)
    lost_moves = moves - basis @ (basis.T @ moves)
    relative_error = float((lost / total).sqrt()) if total > 0 else 0.0
    return basis.float(), kept.float(), relative_error, float(lost_moves.norm() / moves.norm().clamp(min=1e-300))


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `max_lora_rank` of vLLM for an adapter of this rank, or None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)


def thin_factors(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return both factors of an update on the CPU, with an inner dimension of at most min(d_out, d_in)."""
    if factors.matrix is None and factors.rank > min(factors.shape):
        product = (factors.left.cpu().double() @ factors.right.cpu().double()).float()
        factors = Factors.of_matrix(product)
    return factors.left.cpu(), factors.right.cpu()


def _is_mixture(edit: EditRecord) -> bool:
    """Return whether an edit is of dense layers of a mixture of experts, which an adapter must name as parameters.

    For such models (Qwen3-MoE, DeepSeek-V3 and others), peft 0.21 treats every module named down_proj as experts, so
    that an adapter that names the module of a dense layer has no effect. For parameters, it supports one rank only.
    """
    return any(name in edit.computed_with for name in EXPERTS)


def _base_model(name: str) -> str:
    """Return where peft finds the base model: of a GGUF file its folder, as transformers takes it with `gguf_file`."""
    return os.path.dirname(name) or os.curdir if name.endswith(GGUF_SUFFIX) else name


def loading_call(name: str, adapter: str) -> str:
    """Return the Python call that loads an adapter onto its base model, for a message.

    Args:
        name: The name of the base model in the edit's fingerprint.
        adapter: The folder of the adapter.
    """
    file = f', gguf_file="{os.path.basename(name)}"' if name.endswith(GGUF_SUFFIX) else ""
    return f'AutoPeftModelForCausalLM.from_pretrained("{adapter}"{file})'


def _adapter_config(
    edit: EditRecord, layers: Sequence[AdapterLayer], parameters: Sequence[str] = ()
) -> dict[str, object]:
    """Return the contents of adapter_config.json; `parameters` are the names of the weights of an edit of experts."""
    ranks = {module: layer.rank for layer in layers for module in layer.modules}
    largest = max(ranks.values())
    targets: dict[str, object] = {"target_modules": sorted(ranks), "rank_pattern": ranks, "alpha_pattern": ranks}
    if _is_mixture(edit):
        targets = {"target_modules": [], "target_parameters": [f"{module}.weight" for module in sorted(ranks)]}
    if parameters:
        targets = {"target_modules": [], "target_parameters": sorted(parameters)}
    return {
        "peft_type": "LORA",
        "task_type": None if edit.computed_with.get(TEXT_ENCODER) else "CAUSAL_LM",
        "base_model_name_or_path": _base_model(edit.fingerprint.name),
        **targets,
        "r": largest,
        # alpha = rank makes the scale alpha / r 1 in peft for each module, and in vLLM, which ignores the patterns.
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not parameters and any(update.transposed for update in edit.updates),
        "inference_mode": True,
    }
