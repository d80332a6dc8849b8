"""Check the fields of an untrusted config.json against the weight files.

Sizes that the weights cannot fill are refused here, because transformers would allocate memory for them first.
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
"""Sizes that are at most the longest dimension of any tensor. Families without such a part may write 0 or null."""
MAX_OTHER_DEPTH, MAX_OTHER_SIZE = 1_000, 1_000_000
"""Limits for parts whose tensors may be missing in the files, such as a vision tower."""
MAX_LABELS = 100_000
DROPOUT = re.compile(r"(^|_)(dropout|pdrop|layerdrop)(_prob|_p|_rate)?$")
LOADED_DTYPES = (*SUPPORTED_DTYPES, "float", "half", "auto")
UNQUANTIZED_DTYPES = frozenset({"float64", *SUPPORTED_DTYPES})


@dataclass(frozen=True)
class Weights:
    """A summary of the headers of the weight files.

    Attributes:
        tensors: The number of tensors.
        longest: The largest dimension of any tensor; None if the headers were not read.
        dtypes: The dtypes, such as "bfloat16"; empty if the headers were not read.
    """

    tensors: int
    longest: int | None
    dtypes: frozenset[str]


def check_config(path: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Raise InputError if a configuration does not fit the weights.

    Args:
        path: The path of config.json, for the error message.
        config: The fields of config.json.
        weights: The summary of the weight files.

    Raises:
        InputError: A size, the number of labels, a dropout, the dtype or the quantisation is impossible; the message
            names the field and its value.
    """
    for prefix, part in _parts(config):
        own = prefix in ("", "text_config.")
        for name, value in part.items():
            flaw = _flaw(name, value, weights, own)
            if flaw:
                raise InputError(f"{path} says {prefix}{name} {_shown(value)}, but {flaw}.")


def _flaw(name: str, value: Any, weights: Weights, own: bool) -> str:
    """Return what is wrong with a field, as the end of a sentence; empty for nothing.

    Args:
        name: The name of the field.
        value: Its value.
        weights: The summary of the weight files.
        own: Whether the weight files hold the part of the model that the field describes.
    """
    if name in DEPTHS:
        return _size_flaw(value, weights.tensors if own else MAX_OTHER_DEPTH, least=int(own))
    if name in (*WIDTHS, *COUNTS):
        most = MAX_OTHER_SIZE if weights.longest is None or not own else weights.longest
        return _size_flaw(value, most, least=int(own and name in WIDTHS))
    if name == "num_labels":
        right = value is None or (_is_whole(value) and 0 <= value <= MAX_LABELS)
        return "" if right else f"it must be a whole number of at most {MAX_LABELS:,}"
    if name in ("id2label", "label2id"):
        right = value is None or (isinstance(value, dict) and len(value) <= MAX_LABELS)
        return "" if right else f"it must be an object of at most {MAX_LABELS:,} labels"
    if name in ("dtype", "torch_dtype"):
        return "" if _is_loaded(value) else "rocr loads weights as float32, bfloat16 or float16: save it again as one"
    if name in ("quantization_config", "compression_config"):
        return _quantization_flaw(value, weights.dtypes)
    if name.endswith(("attn_implementation", "experts_implementation")):
        return "rocr does not run code of a repository: remove the field" if "/" in str(value) else ""
    if DROPOUT.search(name):
        return "" if _is_share(value) else "a dropout is a number from 0 to 1"
    return ""


def _parts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a configuration and those inside it, such as text_config and vision_config, with their prefixes."""
    yield prefix, config
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config") and not name.startswith(("quant", "compression")):
            yield from _parts(value, f"{prefix}{name}.")


def _size_flaw(value: Any, most: int, least: int) -> str:
    sizes = value if isinstance(value, list) else [value]  # some families have a size for each layer
    if all(size is None or (_is_whole(size) and least <= size <= most) for size in sizes):
        return ""
    return f"it must be a whole number of at most {most:,}, by the size of the weights"


def _quantization_flaw(value: Any, dtypes: frozenset[str]) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict) or not isinstance(value.get("quant_method", ""), str):
        return "it must be an object with a text as quant_method"
    if dtypes and dtypes <= UNQUANTIZED_DTYPES:
        return f"the files hold plain {' and '.join(sorted(dtypes))}: remove the field if nothing is quantised"
    return ""


def _is_loaded(value: Any) -> bool:
    if isinstance(value, dict):  # one dtype for each part of a composite model
        return all(map(_is_loaded, value.values()))
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in LOADED_DTYPES)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
