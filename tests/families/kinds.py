"""The kind of a model for the table: what it reads, and what its layers are made of."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe|moe)(\.|$)")
OTHER_MIXERS = re.compile(r"mamba|shortconv|deltanet|lightning|rwkv|recurrent|xlstm|mlstm|linearattention|kda", re.I)
READS = (
    ("vision-language", r"vision|visual|image|patch_embed"),
    ("audio-language", r"audio|speech|acoustic"),
)


def kind_of(model: nn.Module) -> str:
    """Return the kind of a model, such as "dense" or "vision-language, experts"."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    config: Any = model.config
    kinds = []
    if getattr(config, "is_encoder_decoder", False):
        kinds.append("encoder-decoder")
    else:
        kinds += [kind for kind, words in READS if any(re.search(words, name) for name, _ in modules)][:1]
    text = [(name, kind) for name, kind in modules if not any(re.search(words, name) for _, words in READS)]
    if any(OTHER_MIXERS.search(kind) for _, kind in text):
        kinds.append("hybrid" if any("Attention" in kind for _, kind in text) else "recurrent")
    if any(EXPERTS.search(name) for name, _ in text):
        kinds.append("experts")
    return ", ".join(kinds) or "dense"
