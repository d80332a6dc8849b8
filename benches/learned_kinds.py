"""The kinds of models that learn the facts: configurations of transformers, small enough to train in minutes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        config: Name of the configuration's class.
        model: Name of the model's class.
        sizes: Arguments of the configuration, besides those of `COMMON`.
        layers: Layers to edit. A model of four layers needs the last two to read a name and to answer.
        steps: Number of steps of training.
        rate: Highest learning rate.
    """

    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = (0, 1)
    steps: int = 500
    rate: float = 4e-3


COMMON: dict[str, Any] = {
    "hidden_size": 80,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT: dict[str, Any] = {"n_embd": 80, "n_inner": 512, "n_layer": 4, "n_head": 4, "n_positions": 64}
GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5: dict[str, Any] = {"d_model": 80, "d_ff": 512, "d_kv": 20, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 2}
T5 |= {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 320}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "head_dim": 8,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 20,
}
FALCON: dict[str, Any] = {"mamba_d_ssm": 80, "mamba_n_heads": 4, "mamba_d_head": 20, "mamba_d_state": 16}
FALCON |= {"mamba_n_groups": 1, "mamba_chunk_size": 32}
KINDS: dict[str, Kind] = {
    "Llama": Kind("LlamaConfig", "LlamaForCausalLM"),
    "GPT-2": Kind("GPT2Config", "GPT2LMHeadModel", GPT),
    "Gemma 3": Kind("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 20, "sliding_window": 64}),
    "Qwen3-MoE": Kind("Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS),
    "DeepSeek-V3": Kind("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK),
    "gpt-oss": Kind(
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 320, "sliding_window": 64},
    ),
    "Mixtral": Kind(
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 320},
    ),
    "Qwen3-Next": Kind(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        EXPERTS | LINEAR | {"shared_expert_intermediate_size": 160},
        steps=700,
    ),
    "Falcon-H1": Kind("FalconH1Config", "FalconH1ForCausalLM", FALCON),
    "T5": Kind("T5Config", "T5ForConditionalGeneration", T5),
}
OWN_NAMES = ("n_embd", "d_model")
"""Sizes of the kinds whose configurations have other names than those of `COMMON`."""


def build_model(kind: Kind, tokenizer: Any, seed: int) -> nn.Module:
    """Return an untrained model, the same one for the same seed."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    sizes = kind.sizes if any(name in kind.sizes for name in OWN_NAMES) else COMMON | kind.sizes
    if kind.config == "T5Config":
        ids["decoder_start_token_id"] = ids["bos_token_id"]
    config = getattr(transformers, kind.config)(vocab_size=len(tokenizer), **(sizes | ids))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, kind.model)(config)
    return model
