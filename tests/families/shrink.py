"""Make the configuration of any model family small, by the names of its settings.

`sizes.json` says which names mean a hidden size, a number of experts and so on. Hidden sizes are all equal, so that
the towers of a multimodal model fit each other; text models have DEPTH layers and other towers TOWER_DEPTH.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

DEPTH, TOWER_DEPTH = 6, 3
HEADS, HEAD_FEATURES = 4, 16
VOCABULARY, POSITIONS = 1024, 512
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKEN_ENDINGS = ("_token_id", "_token_index", "_token_ids", "_id")
LARGEST_SMALL_ID = 900
"""Token ids from here on are replaced by ids from the end of the small vocabulary."""
KEPT = ("id2label", "label2id", "vocabulary_map")


@dataclass(frozen=True)
class Names:
    """What the names of settings mean, from `sizes.json`."""

    size_of: dict[str, int]
    exact: dict[str, int]
    layers: frozenset[str]
    key_value_heads: frozenset[str]
    positions: frozenset[str]
    vocabulary: frozenset[str]
    towers: tuple[str, ...]
    layer_lists: tuple[str, ...]

    @classmethod
    @cache
    def read(cls) -> Names:
        found = json.loads((Path(__file__).parent / "sizes.json").read_text(encoding="utf-8"))
        size_of = {name: entry["size"] for entry in found["sizes"].values() for name in entry["names"]}
        sets = (frozenset(found[name]) for name in ("layers", "key_value_heads", "positions", "vocabulary"))
        return cls(size_of, found["exact"], *sets, tuple(found["towers"]), tuple(found["layer_lists"]))


@dataclass
class TokenIds:
    """Small ids for the special tokens of a configuration; equal ids stay equal."""

    given: dict[int, int] = field(default_factory=dict)

    def small(self, token: int) -> int:
        if token < LARGEST_SMALL_ID:
            return token
        return self.given.setdefault(token, VOCABULARY - 2 - len(self.given))


@dataclass(frozen=True)
class Part:
    """One part of a configuration, such as the one of a vision tower.

    Attributes:
        path: Where it is, such as ".vision_config".
        layers: The number of layers that it gets.
        depths: The numbers of layers that it has, which are the lengths of its lists by layer.
        heads: The number of attention heads that it has.
    """

    path: str
    layers: int
    depths: frozenset[int]
    heads: int | None

    @classmethod
    def of(cls, config: dict[str, Any], path: str) -> Part:
        names = Names.read()
        depths = frozenset(value for name, value in config.items() if name in names.layers and _is_number(value))
        heads = [config.get(name) for name in ("num_attention_heads", "n_head", "num_heads")]
        is_tower = any(word in path for word in names.towers)
        return cls(path, TOWER_DEPTH if is_tower else DEPTH, depths, next(filter(_is_number, heads), None))


def shrink(config: dict[str, Any], path: str = "", tokens: TokenIds | None = None) -> dict[str, Any]:
    """Return a configuration with small sizes."""
    tokens = tokens or TokenIds()
    part = Part.of(config, path)
    small = {name: _small(str(name), value, part, tokens) for name, value in config.items()}
    if _is_number(small.get("patch_size")) and _is_number(small.get("image_size")):
        small["image_size"] = 4 * small["patch_size"]
    return small


def _small(name: str, value: Any, part: Part, tokens: TokenIds) -> Any:
    """Return the small value of one setting."""
    if isinstance(value, dict):
        return _small_mapping(name, value, part, tokens)
    if isinstance(value, (list, tuple)):
        return _small_list(name, list(value), part, tokens)
    if value is None:
        return {"head_dim": HEAD_FEATURES, "num_key_value_heads": HEADS}.get(name)
    if isinstance(value, float):
        # Larger random weights, so that a layer changes its input by a measurable amount.
        return 0.1 if name in ("initializer_range", "init_std") else value
    return _small_number(name, value, part, tokens) if _is_number(value) else value


def _small_mapping(name: str, value: dict[str, Any], part: Part, tokens: TokenIds) -> dict[str, Any]:
    if name in KEPT:
        return value
    if name != "per_layer_config":
        return shrink(value, f"{part.path}.{name}", tokens)
    # Settings of single layers, by the layer's number; here alone a layer may have larger heads than the others.
    small = {}
    for layer, settings in value.items():
        if int(layer) < part.layers:
            of_layer = Part(part.path, part.layers, part.depths, settings.get("num_attention_heads", part.heads))
            small[str(layer)] = {key: _small(key, each, of_layer, tokens) for key, each in settings.items()}
            if "head_dim" in settings:
                small[str(layer)]["head_dim"] = 2 * HEAD_FEATURES
    return small


def _small_number(name: str, value: int, part: Part, tokens: TokenIds) -> int:
    names = Names.read()
    if name in names.vocabulary:
        return VOCABULARY
    if name.endswith(TOKEN_ENDINGS):
        return SPECIAL[name] if name in SPECIAL else tokens.small(value)
    if name in names.size_of:
        return names.size_of[name] if value > 0 else value
    if name in names.layers:
        return part.layers if value > 0 else value
    if name in names.key_value_heads:
        return value if value <= 1 else HEADS if value == part.heads else HEADS // 2
    if name in names.positions:
        return min(value, POSITIONS)
    return names.exact.get(name, value) if value else value


def _small_list(name: str, value: list[Any], part: Part, tokens: TokenIds) -> list[Any]:
    """Return a list of tokens, of layers' numbers or of settings by layer for fewer layers."""
    is_numbers = bool(value) and all(isinstance(each, int) for each in value)
    if is_numbers and "token_id" in name:
        return [SPECIAL[name]] if name in SPECIAL else [tokens.small(token) for token in value]
    if is_numbers and any(word in name for word in Names.read().layer_lists):
        return [layer for layer in value if layer < part.layers][: part.layers] or [1]
    is_by_layer = len(value) in part.depths and len(value) > part.layers
    return value[: part.layers] if is_by_layer else value


def scale_rotary_sections(config: Any) -> None:
    """Let the sections of multimodal rotary embeddings add up to half of the rotated features, in place."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    for found in (parameters, *parameters.values()):
        if isinstance(found, dict) and found.get("mrope_section"):
            width = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None) or HEAD_FEATURES
            half = int(width * (found.get("partial_rotary_factor") or 1.0)) // 2
            parts = len(found["mrope_section"])
            found["mrope_section"] = [half // parts + (part < half % parts) for part in range(parts)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
