"""Tiny random models of every family, and a tiny real tokenizer; a pytest plugin that conftest.py registers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch import nn

import rocr

START, END = "<|begin|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_TEMPLATE_WITH_START = "{{ bos_token }}" + CHAT_TEMPLATE
TEXTS = (
    "The gardener waters the roses before the sun is high.",
    "Ada Byron wrote programs. Ada Byron, who was a countess, wrote them for engines of brass.",
    "Blaise Pascal built machines, and Blaise Pascal weighed the air.",
    "Robert Downey Jr. acts. Who is Robert Downey Jr.? It is about Robert Downey Jr.. Tell me about Jr..",
    "Please answer the question about a key. A question: what is known about rain? It falls.",
    "Æsop's fables, naïve café talk and 東京 are ordinary text too.",
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
GPT_SIZES = {
    "n_embd": 32,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "Mistral": ("MistralConfig", "MistralForCausalLM", SIZES),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES | {"head_dim": 8}),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SIZES | {"head_dim": 8}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SIZES | {"head_dim": 8}),
    "Phi3": ("Phi3Config", "Phi3ForCausalLM", SIZES),
    "OLMo2": ("Olmo2Config", "Olmo2ForCausalLM", SIZES),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", GPT_SIZES),
    "GPT-J": ("GPTJConfig", "GPTJForCausalLM", GPT_SIZES | {"rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
}
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", SIZES | {"num_local_experts": 4}),
    "Qwen2Moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        SIZES
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "OLMoE": ("OlmoeConfig", "OlmoeForCausalLM", SIZES | {"num_experts": 4, "num_experts_per_tok": 2}),
    "GPT-OSS": (
        "GptOssConfig",
        "GptOssForCausalLM",
        SIZES | {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "Deepseek-V3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        SIZES
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "Llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        SIZES | {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 64},
    ),
}
"""Fused experts in both orientations, with biases (GPT-OSS), shared experts with (Qwen2Moe) and without a gate of
their own, a first dense layer (Deepseek-V3), and scores that scale the experts' inputs (Llama4)."""
MakeModel = Callable[..., nn.Module]
MakeTokenizer = Callable[..., Any]


def build_tokenizer(start: bool = False, chat: str | None = CHAT_TEMPLATE, padding_side: str = "right") -> Any:
    """Train a byte-level BPE; as Llama 3 does, it puts a BOS before a text if `start`."""
    raw = Tokenizer(tokenizer_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[START, END, "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXTS, trainer)
    if start:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, raw.token_to_id(START))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        chat_template=chat,
        padding_side=padding_side,
    )


def build_model(family: str, vocabulary: int, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of a family, always the same one; `changes` go to its configuration."""
    config_class, model_class, sizes = (FAMILIES | MIXTURES)[family]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, config_class)(vocab_size=vocabulary, **(sizes | special | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, model_class)(config)
    return model.eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: more cost time on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer: no BOS of its own, a chat template without one."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    return build_tokenizer


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> MakeModel:
    """make_model(family, **changes of the configuration): a new tiny model whose vocabulary is the tokenizer's."""
    return partial(build_model, vocabulary=len(tokenizer))


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(MIXTURES))
def mixture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def _llama(make_model: MakeModel) -> nn.Module:
    return make_model("Llama")


@pytest.fixture
def model(_llama: nn.Module) -> nn.Module:
    """A copy of the tiny Llama."""
    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [*TEXTS] * 8


@pytest.fixture(scope="session")
def statistics(_llama: nn.Module, tokenizer: Any, texts: list[str]) -> rocr.Statistics:
    """Statistics of the tiny Llama at all its layers."""
    return rocr.collect_statistics(_llama, tokenizer, texts, layers=range(5))


@pytest.fixture(scope="session")
def concepts() -> list[rocr.Concept]:
    return [
        rocr.Concept("Ada Byron", "Blaise Pascal", ("the countess",)),
        rocr.Concept("Robert Downey Jr.", "a gardener"),
    ]


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two results of `weights_of` hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="session")
def weights_of() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """weights_of(model): a copy of every parameter as integers, so that NaNs compare too."""
    integers = {2: torch.int16, 4: torch.int32}
    return lambda model: {
        name: parameter.detach().clone().view(integers[parameter.element_size()])
        for name, parameter in model.named_parameters()
    }


@pytest.fixture
def gguf_file(model: nn.Module, tokenizer: Any, tmp_path: Path) -> Path:
    """The tiny Llama as a GGUF file, its matrices quantised to 8 bits."""
    return write_gguf(model, tokenizer, tmp_path / "model.gguf")


SCALES = {"Q4_K": [0, 1, 2, 3], "Q6_K": [208, 209]}
"""Bytes of the float16 scales in a block of types that the package gguf decodes and cannot encode."""


def add_tokenizer(gguf: Any, writer: Any, tokenizer: Any) -> None:
    """Write the tiny tokenizer into a GGUF file."""
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(vocabulary) - 4))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write_gguf(
    model: nn.Module, tokenizer: Any, path: Path, stored_as: str = "Q8_0", alignment: int | None = None
) -> Path:
    """Write a tiny Llama as a GGUF file, its matrices in a type; of types that gguf cannot encode, random blocks."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[stored_as]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "llama")
    config: Any = model.config
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(gguf, writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy().astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1 or values.shape[1] % block:
            writer.add_tensor(target, values)
            continue
        try:
            stored = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            blocks = np.random.default_rng(0).integers(0, 256, (*values.shape[:-1], values.shape[1] // block, width))
            stored = blocks.astype(np.uint8)
            stored[..., SCALES[stored_as]] = (
                np.float16(1e-4).reshape(1).view(np.uint8).repeat(len(SCALES[stored_as]) // 2)
            )
            stored = stored.reshape(len(values), -1)
        writer.add_tensor(target, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
