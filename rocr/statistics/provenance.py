"""How the text of statistics was read: what changes a key besides the model, its tokenizer and the text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_DTYPES
from rocr.io.json_values import text_of, whole_number_of
from rocr.io.versions import versions
from rocr.model.architecture import text_config
from rocr.model.fingerprint import adapter_digest

EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""Names of the number of experts that a token is sent to: a configuration that has one is of a mixture of experts."""

COMPUTED_WITH = (
    "model_type", "hidden_act", "hidden_activation", "activation_function", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim", "sliding_window",
    "use_sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "attention_multiplier", "embedding_multiplier",
    "residual_multiplier", *EXPERTS,
)  # fmt: skip
"""What a configuration of transformers says of how keys are computed, besides the shapes of the weights."""

ADAPTER = "adapter"
"""What the digest of a model's active adapters stands under beside its settings; a model without adapters has none."""

READ_BY = ("rocr", "torch", "transformers")
MAX_VERSION = 500
MAX_CONFIG = 20_000
"""Characters of a configuration."""


@dataclass(frozen=True)
class Provenance:
    """How a model read a text.

    Attributes:
        dtype: of the weights that made the keys, such as "bfloat16".
        length: tokens of a sequence at most. Documents are joined by the end-of-text token and cut there.
        skipped: tokens at the beginning of each sequence whose keys were left out.
        config: settings of the model, those of `COMPUTED_WITH` that it has.
        documents: texts that were read, or sequences that the model wrote itself.
        versions: of rocr, torch and transformers; several of one where statistics were merged.
        down_projections: digests of those before the last layer that was read, which its keys depend on
            (`rocr.model.fingerprint.down_projection_digests`); empty: not known, as of rocr 0.1, or there are none.
    """

    dtype: str
    length: int
    skipped: int
    config: Mapping[str, Any]
    documents: int
    versions: Mapping[str, str]
    down_projections: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(SUPPORTED_DTYPES)}, not {repr(self.dtype)[:60]}")
        whole_number_of(self.length, "length", least=2)
        whole_number_of(self.skipped, "skipped")
        if self.skipped >= self.length:
            raise ValueError(f"of sequences of {self.length} tokens, {self.skipped} cannot be left out")
        config_of(self.config, "config")
        whole_number_of(self.documents, "documents", least=1)
        if not isinstance(self.versions, dict) or set(self.versions) != set(READ_BY):
            raise ValueError(f"versions must be those of {', '.join(READ_BY)}, not {repr(self.versions)[:60]}")
        for name, version in self.versions.items():
            if len(text_of(version, f"the version of {name}")) > MAX_VERSION:
                raise ValueError(f"the version of {name} has {len(version):,} characters")
        if not isinstance(self.down_projections, (list, tuple)):
            raise ValueError(f"down_projections must be a list, not {repr(self.down_projections)[:60]}")
        for digest in self.down_projections:
            text_of(digest, "a digest of a down-projection")
        object.__setattr__(self, "down_projections", tuple(self.down_projections))

    def to_json(self) -> dict[str, Any]:
        """The provenance as JSON values."""
        values = asdict(self)
        digests = list(values.pop("down_projections"))
        return values | {"down_projections": digests} if digests else values

    def merge(self, other: Provenance) -> Provenance:
        """The provenance of both texts.

        Raises:
            InputError: keys of the two are not of one kind; names what differs, on both sides.
        """
        changed = changed_layers(self.down_projections, other.down_projections)
        if changed:
            raise InputError(
                f"The models of these statistics have other down-projections at layer {_listed(changed)}: one of them "
                "carried an edit, so that the keys of later layers are others. Collect one of them as the other."
            )
        mine, others = different(self._of_keys(), other._of_keys())
        if mine:
            raise InputError(
                f"Statistics of texts that were read differently cannot be merged: {mine}, and {others}. "
                "Collect one of them as the other."
            )
        both = {name: _both(self.versions[name], other.versions[name]) for name in READ_BY}
        digests = self.down_projections or other.down_projections
        return replace(self, documents=self.documents + other.documents, versions=both, down_projections=digests)

    def _of_keys(self) -> dict[str, Any]:
        return {**self.config, "dtype": self.dtype, "length": self.length, "skipped": self.skipped}


def computed_with(model: nn.Module) -> dict[str, Any]:
    """The settings of a model that its keys depend on, and the digest of its adapters, as JSON values."""
    config = text_config(model)
    found = {name: _setting(config, name) for name in COMPUTED_WITH}
    found[ADAPTER] = adapter_digest(model)
    if found["rope_parameters"] is not None:
        # transformers 5 gives them by their former name too, where they would differ from those of transformers 4.
        del found["rope_scaling"]
    plain: dict[str, Any] = json.loads(json.dumps({name: value for name, value in found.items() if value is not None}))
    return plain


def config_of(value: object, label: str) -> dict[str, Any]:
    """A value of a file that must be settings as `computed_with` gives them.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict) or len(json.dumps(value)) > MAX_CONFIG:
        raise ValueError(f"{label} must be an object of at most {MAX_CONFIG:,} characters")
    return value


def different(mine: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[str, str]:
    """What differs on either side, in words; of names that only one side knows, nothing can be said.

    An adapter is the exception: settings that do not name one are of a model without.
    """
    if all("model_type" in side for side in (mine, others)) and ADAPTER in {*mine, *others}:
        mine, others = ({ADAPTER: "none", **side} for side in (mine, others))
    names = [name for name in mine if name in others and mine[name] != others[name]]
    one, other = (", ".join(f"{name} {str(side[name])[:100]}" for name in names) for side in (mine, others))
    return one, other


def changed_layers(mine: Sequence[str], others: Sequence[str]) -> list[int]:
    """The layers whose down-projections differ by their digests, as far as both sides know them."""
    return [layer for layer, (one, other) in enumerate(zip(mine, others, strict=False)) if one != other]


def versions_now() -> dict[str, str]:
    """Versions of what computes keys."""
    found = versions()
    return {name: found.get(name, "unknown") for name in READ_BY}


def _setting(config: Any, name: str) -> Any:
    """A setting of a configuration; None where it has none of that name, or one that differs by layer and raises."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _both(mine: str, others: str) -> str:
    """Two lists of versions as one, without repetition."""
    return ", ".join(dict.fromkeys([*mine.split(", "), *others.split(", ")]))
