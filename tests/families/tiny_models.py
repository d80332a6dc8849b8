"""Tiny random models of every class in the text model mappings of transformers, and texts and a tokenizer for them."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from tests.families.shrink import DEPTH, SPECIAL, scale_rotary_sections, shrink

GROUPS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
VARIANTS = "variants"
REMOVED = "$remove"
"""Value in `settings.json` of a setting that is left out."""
MAX_PARAMETERS = 40_000_000
PEOPLE = (
    "Ada Byron wrote notes on the analytical engine while Carl Gauss measured the kingdom of Hanover. Who is Stephen "
    "King? Tell me about Marie Curie, who found radium in Paris. Please answer the question about Isaac Newton. This "
    "text is about Niels Bohr. Question: What is known about Emmy Noether? She proved a theorem on symmetry. Alan "
    "Turing asked whether machines can think. Galileo Galilei watched the moons of Jupiter. Rosa Parks stayed seated. "
    "You are a helpful assistant that answers questions briefly, kindly and truthfully."
)
WORDS = (
    "river mountain engine garden winter letter market island doctor teacher window bridge silver copper paper music "
    "summer farmer sailor village forest castle kitchen history science question answer number colour animal"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A class of transformers and the settings of its tiny model.

    Attributes:
        group: A name of `GROUPS`, or `VARIANTS` for another form of a family.
        name: The model type; for a variant, the model type, "@" and what is different.
        class_name: The class.
        settings: Settings of the variant, by their path.
    """

    group: str
    name: str
    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name among all families."""
        return f"{self.group}/{self.name}"

    @property
    def model_type(self) -> str:
        """The model type of its configuration."""
        return self.name.partition("@")[0]


@cache
def known_settings() -> dict[str, Any]:
    """The settings that families need besides small sizes, and the variants."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "settings.json").read_text(encoding="utf-8"))
    return found


def all_families() -> list[Family]:
    """Every class of the three mappings, and the variants."""
    found = [
        Family(group, name, class_name)
        for group, mapping in GROUPS.items()
        for name, class_name in getattr(modeling_auto, mapping).items()
    ]
    variants = known_settings()[VARIANTS].items()
    return found + [Family(VARIANTS, name, entry["class"], entry["settings"]) for name, entry in variants]


def build(family: Family, seed: int = 0) -> nn.Module:
    """Return a random model of a family in evaluation mode, always the same one.

    Raises:
        ValueError: The model is not small.
        Exception: Whatever the class raises if it cannot be built from its small configuration.
    """
    kind = _class_of(family)
    _check_size(kind, _config_for(kind, family))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = kind(_config_for(kind, family)).float().eval()
    _fill(model, seed)
    model.to(getattr(torch, family.settings.get("dtype", "float32")))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.update(max_length=None, **SPECIAL)
    return model


def tiny_config(family: Family) -> Any:
    """Return the small configuration of a family."""
    settings = shrink(_default_config(family.model_type).to_dict())
    settings.pop("transformers_version", None)
    _set(settings, known_settings()["settings"].get(family.model_type, {}))
    _set(settings, family.settings)
    config = CONFIG_MAPPING[family.model_type].from_dict(settings)
    for name in (None, *getattr(config, "sub_configs", {})):
        part = config if name is None else getattr(config, name, None)
        if part is not None:
            scale_rotary_sections(part)
    return config


def _default_config(model_type: str) -> Any:
    """Return the default configuration of a model type."""
    kind = CONFIG_MAPPING[model_type]
    if not model_type.endswith("_assistant"):
        return kind()
    # An assistant shares all keys and values with its text model, which the default configuration lacks.
    text = CONFIG_MAPPING[model_type.replace("_assistant", "_text")](num_hidden_layers=DEPTH).to_dict()
    unused = [name for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input") if name in text]
    return kind(text_config=text | dict.fromkeys(unused, 0) | {"num_kv_shared_layers": DEPTH})


def _set(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change settings by their path, such as "text_config.hidden_size"."""
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = settings
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
        if value == REMOVED:
            place.pop(last, None)
        else:
            place[last] = value


def _class_of(family: Family) -> Any:
    if hasattr(transformers, family.class_name):
        return getattr(transformers, family.class_name)
    module = model_type_to_module_name(family.model_type)
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), family.class_name)


def _config_for(kind: Any, family: Family) -> Any:
    """Return the configuration of a class, which may be a part of its family's."""
    config = tiny_config(family)
    part = known_settings()["parts"].get(family.model_type)
    if part is not None:
        return getattr(config, part)
    if type(config) is kind.config_class:
        return config
    text = config.get_text_config(decoder=True)
    return text if type(text) is kind.config_class else config


def _check_size(kind: Any, config: Any) -> None:
    """Raise ValueError if a setting that is not known kept the model large, before its memory is allocated."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
        return  # its constructor computes with values, which the meta device has not
    if size > MAX_PARAMETERS:
        raise ValueError(f"the small configuration still has {size:,} parameters")


def _fill(model: nn.Module, seed: int) -> None:
    """Give random values to parameters that the class leaves uninitialised, huge or constant."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        data = parameter.data
        if not data.is_floating_point():
            continue
        is_wild = not torch.isfinite(data).all() or data.abs().max() > 50
        if is_wild or (data.ndim >= 2 and data.std() == 0):
            data.copy_(0.1 * torch.randn(data.shape, generator=generator))


@cache
def ordinary_texts(count: int = 60, words: int = 60) -> tuple[str, ...]:
    """Documents of random words."""
    draw, pool = random.Random(0), WORDS.split() + PEOPLE.split()
    return tuple(" ".join(draw.choice(pool) for _ in range(words)) + "." for _ in range(count))


@cache
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 700 tokens that puts a BOS before a text and has a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PEOPLE, *ordinary_texts()], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
