"""Tiny random mixtures of experts as GGUF files, with the tensors that llama.cpp reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from tests.support.models import add_tokenizer, build_model

ARCHITECTURES = {"Qwen3Moe": "qwen3moe", "Qwen2Moe": "qwen2moe", "MiniMaxM2": "minimax-m2", "Mixtral": "llama"}
"""Families, and the names of their architectures in GGUF files. transformers loads all but Mixtral, whose architecture
is that of dense models."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "initializer_range": 0.2,
}
"""Every row can be stored in Q8_0. A token has one of eight experts, so that some are not edited."""
MODELS: dict[str, dict[str, Any]] = {
    # transformers assumes this of the family's GGUF files, as llama.cpp does.
    "Qwen3Moe": SIZES | {"norm_topk_prob": True},
    "Qwen2Moe": SIZES | {"shared_expert_intermediate_size": 96},
    "Mixtral": {"hidden_size": 64},
}
MINIMAX = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 1,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip


def build_mixture(family: str, vocabulary: int, **changes: Any) -> nn.Module:
    """A tiny random mixture, always the same one."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("before version 5 of transformers, experts are modules of their own, and rocr writes no GGUF files")
    if family != "MiniMaxM2":
        return build_model(family, vocabulary, **(MODELS[family] | changes))
    if not hasattr(transformers, "MiniMaxM2Config"):
        pytest.skip("this version of transformers lacks MiniMax M2")
    config = transformers.MiniMaxM2Config(vocab_size=vocabulary, **(MINIMAX | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = transformers.MiniMaxM2ForCausalLM(config)
    return model.eval()


def write_mixture_gguf(
    model: nn.Module, family: str, tokenizer: Any, path: Path, stored_as: str = "F32", down: str | None = None
) -> Path:
    """Write a tiny mixture as a GGUF file.

    Args:
        model: The model.
        family: One of `ARCHITECTURES`.
        tokenizer: Its tokenizer.
        path: The file.
        stored_as: The type of the matrices.
        down: The type of the down-projections; None for that of the others.
    """
    gguf = pytest.importorskip("gguf")
    config: Any = model.config
    architecture = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if hasattr(config, "rotary_dim"):
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if family == "Qwen2Moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    add_tokenizer(gguf, writer, tokenizer)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy().astype(np.float32)
        if name.endswith("gate_up_proj"):
            layer, middle = name.split(".")[2], values.shape[1] // 2
            _add(gguf, writer, f"blk.{layer}.ffn_gate_exps.weight", values[:, :middle], stored_as)
            _add(gguf, writer, f"blk.{layer}.ffn_up_exps.weight", values[:, middle:], stored_as)
            continue
        if name.endswith("e_score_correction_bias"):
            _add(gguf, writer, f"blk.{name.split('.')[2]}.exp_probs_b.bias", values, "F32")
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        target = target if name.endswith((".weight", ".bias")) else f"{target}.weight"
        is_plain = values.ndim == 1 or "gate_inp" in target
        # llama.cpp stores the gate of the shared expert as a vector.
        values = values[0] if "gate_inp_shexp" in target else values
        chosen = down or stored_as if "ffn_down" in target else stored_as
        _add(gguf, writer, target, values, "F32" if is_plain else chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(gguf: Any, writer: Any, name: str, values: Any, stored_as: str) -> None:
    kind = gguf.GGMLQuantizationType[stored_as]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    if stored_as == "F32":
        writer.add_tensor(name, np.ascontiguousarray(values))
        return
    try:
        stored = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    except NotImplementedError:  # Q4_K and others, which gguf decodes and cannot encode
        shape = (*values.shape[:-1], values.shape[-1] // block, width)
        blocks = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        blocks[..., :4] = np.tile(np.float16(1e-4).reshape(1).view(np.uint8), 2)
        stored = blocks.reshape(*values.shape[:-1], -1)
    writer.add_tensor(name, stored, raw_dtype=kind)
