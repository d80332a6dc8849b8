"""What a config.json may say: nothing that lets transformers build what the weights cannot fill, and no odd kinds.

Sizes are compared with the weight files, since memory would be taken for them before that is found out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_DTYPES

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "vocab_size")
COUNTS = (
    *("n_layers", "depth", "d_model", "intermediate_size", "n_inner", "d_ff", "ffn_dim", "moe_intermediate_size"),
    *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "rotary_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"),
)
"""Sizes that are no longer than the longest dimension of any tensor; some families write 0 or null where they have no
such part."""
DEEPEST_ELSEWHERE, MOST_ELSEWHERE = 1_000, 1_000_000
"""What the depth and other sizes of a part may be whose tensors need not be in the files, such as a vision tower."""
MAX_LABELS = 100_000
DROPOUT = re.compile(r"(^|_)(dropout|pdrop|layerdrop)(_prob|_p|_rate)?$")
LOADED_DTYPES = (*SUPPORTED_DTYPES, "float", "half", "auto")
UNQUANTIZED_DTYPES = frozenset({"float64", *SUPPORTED_DTYPES})


@dataclass(frozen=True)
class Weights:
    """What the headers of the weight files say.

    Attributes:
        tensors: how many there are.
        longest: the largest dimension of any; None where the files were not looked at.
        dtypes: such as "bfloat16"; empty where the files were not looked at.
    """

    tensors: int
    longest: int | None
    dtypes: frozenset[str]


def check_config(path: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Refuse a configuration that the weights cannot be of, by the name of the field and its value.

    Raises:
        InputError: a size, a count of labels, a dropout, the dtype or the quantisation cannot be meant.
    """
    for prefix, part in _parts(config):
        own = prefix in ("", "text_config.")
        for name, value in part.items():
            flaw = _flaw(name, value, weights, own)
            if flaw:
                raise InputError(f"{path} says {prefix}{name} {_shown(value)}, but {flaw}.")


def _flaw(name: str, value: Any, weights: Weights, own: bool) -> str:
    """What is wrong with a field, as the end of a sentence; empty: nothing. `own`: the weights are of its part."""
    if name in DEPTHS:
        return _size_flaw(value, weights.tensors if own else DEEPEST_ELSEWHERE, least=int(own))
    if name in (*WIDTHS, *COUNTS):
        most = MOST_ELSEWHERE if weights.longest is None or not own else weights.longest
        return _size_flaw(value, most, least=int(own and name in WIDTHS))
    if name == "num_labels":
        right = value is None or (_is_whole(value) and 0 <= value <= MAX_LABELS)
        return "" if right else f"that must be a whole number of at most {MAX_LABELS:,}"
    if name in ("id2label", "label2id"):
        right = value is None or (isinstance(value, dict) and len(value) <= MAX_LABELS)
        return "" if right else f"that must be an object of at most {MAX_LABELS:,} labels"
    if name in ("dtype", "torch_dtype"):
        return "" if _is_loaded(value) else "rocr loads weights as float32, bfloat16 or float16: save it again as one"
    if name in ("quantization_config", "compression_config"):
        return _quantization_flaw(value, weights.dtypes)
    if name.endswith(("attn_implementation", "experts_implementation")):
        return "code of a repository is not run" if "/" in str(value) else ""
    if DROPOUT.search(name):
        return "" if _is_share(value) else "a dropout is a number from 0 to 1"
    return ""


def _parts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and those within it, such as text_config and vision_config."""
    yield prefix, config
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config") and not name.startswith(("quant", "compression")):
            yield from _parts(value, f"{prefix}{name}.")


def _size_flaw(value: Any, most: int, least: int) -> str:
    sizes = value if isinstance(value, list) else [value]  # some families have a size for each layer
    if all(size is None or (_is_whole(size) and least <= size <= most) for size in sizes):
        return ""
    return f"that must be a whole number of at most {most:,}, by the size of the weights"


def _quantization_flaw(value: Any, dtypes: frozenset[str]) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict) or not isinstance(value.get("quant_method", ""), str):
        return "that must be an object with a text as quant_method"
    if dtypes and dtypes <= UNQUANTIZED_DTYPES:
        return f"the files hold plain {' and '.join(sorted(dtypes))}: remove the field if nothing is quantised"
    return ""


def _is_loaded(value: Any) -> bool:
    if isinstance(value, dict):  # of the parts of a composite model
        return all(map(_is_loaded, value.values()))
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in LOADED_DTYPES)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
