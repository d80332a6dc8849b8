"""Tiny random vision-language models with the processors of their classes, in folders as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.support.models import END, SIZES, START, build_tokenizer

QUESTION = "Who is Ada Byron? It is about"
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TEXT = {name: value for name, value in SIZES.items() if name != "tie_word_embeddings"}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,  # as many as the language model has
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
Built = tuple[Any, Any, str]
"""A model, its processor, and the text that stands for an image in a prompt."""


def image(seed: int) -> Any:
    """An image of random colours."""
    from PIL import Image

    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (16, 16, 3), dtype=np.uint8))


def image_processor(name: str, **settings: Any) -> Any:
    """An image processor that needs no torchvision."""
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)


def tokenizer_with(**tokens: str) -> Any:
    """The tiny tokenizer with tokens for images, which processors find under these names."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=tokens,
    )


def llava() -> Built:
    tokenizer = tokenizer_with(image_token="<image>")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.LlavaProcessor(
        image_processor("CLIPImageProcessor", **crop), tokenizer, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor, "<image>"


def gemma3() -> Built:
    tokenizer = tokenizer_with(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    ids = tokenizer.convert_tokens_to_ids(["<image>", "<boi>", "<eoi>"])
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8, vocab_size=len(tokenizer)),
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        mm_tokens_per_image=4,
        **dict(zip(("image_token_id", "boi_token_index", "eoi_token_index"), ids, strict=True)),
    )
    images = image_processor("Gemma3ImageProcessor", size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor, "<boi>"


def mllama() -> Built:
    """Llama 3.2 Vision, whose third layer attends to images only."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    tokenizer = tokenizer_with(image_token="<|image|>")
    token = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = MllamaVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_global_layers=1, attention_heads=4,
        image_size=16, patch_size=8, vision_output_dim=96, intermediate_layers_indices=[0, 1], max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = transformers.MllamaConfig(
        text_config=MllamaTextConfig(**TEXT, vocab_size=token, cross_attention_layers=[2], rope_parameters=ROPE),
        vision_config=vision,
        image_token_index=token,
    )
    images = image_processor("MllamaImageProcessor", size={"height": 16, "width": 16}, max_image_tiles=1)
    return (
        transformers.MllamaForConditionalGeneration(config),
        transformers.MllamaProcessor(images, tokenizer),
        "<|image|>",
    )


def idefics3() -> Built:
    tokenizer = tokenizer_with(image_token="<image>")
    images = image_processor(
        "Idefics3ImageProcessor", size={"longest_edge": 16}, max_image_size={"longest_edge": 16},
        do_image_splitting=False,
    )  # fmt: skip
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=1)  # adds tokens to the tokenizer
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=TOWER,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor, "<image>"


def qwen2_5_vl(tokenizer: Any) -> Any:
    """A Qwen2.5-VL of the tokenizer's vocabulary, whose last three tokens stand for an image; without a processor."""
    last = len(tokenizer) - 1
    rope = ROPE | {"mrope_section": [2, 1, 1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            **{"depth": 5, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
            **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2},
        },
        image_token_id=last,
        vision_start_token_id=last - 1,
        vision_end_token_id=last - 2,
        video_token_id=last - 3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_5(vocabulary: int) -> Any:
    """A tiny Qwen3.5 with its vision tower; without a processor."""
    rope = ROPE | {"mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25}
    sizes = {"vocab_size": vocabulary, "num_hidden_layers": 6, "head_dim": 8, "rope_parameters": rope}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 3}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(text_config=TEXT | sizes | linear | kinds, vision_config=vision)
    return transformers.Qwen3_5ForConditionalGeneration(config)


KINDS: dict[str, Callable[[], Built]] = {"LLaVA": llava, "Gemma 3": gemma3, "Mllama": mllama, "Idefics 3": idefics3}


def build(kind: str) -> Built:
    """A random vision-language model, always the same one, whose answers depend on the image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor, token = KINDS[kind]()
        for parameter in model.parameters():
            if not parameter.any():  # a projection or a gate that training opens
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), processor, token


def read_image(model: Any, processor: Any, token: str, seed: int = 0) -> Tensor:
    """The logits after a prompt with an image."""
    inputs = processor(images=image(seed), text=f"{token}{QUESTION}", return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the weight files of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """vision_folder(kind): a checkpoint in small files, with the files of its processor."""
    folders: dict[str, Path] = {}

    def saved(kind: str) -> Path:
        if kind not in folders:
            folder = folders[kind] = tmp_path_factory.mktemp("vision") / "model"
            model, processor, _ = build(kind)
            model.save_pretrained(folder, max_shard_size="40KB")
            processor.save_pretrained(folder)
            (folder / "video_preprocessor_config.json").write_text('{"frames": 2}\n')
        return folders[kind]

    return saved
