"""How the text of statistics was read: everything that changes a key besides model, tokenizer and text."""

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
"""Configuration fields of the number of experts for each token; a mixture of experts has one of them."""

COMPUTED_WITH = (
    "model_type", "hidden_act", "hidden_activation", "activation_function", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim", "sliding_window",
    "use_sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "attention_multiplier", "embedding_multiplier",
    "residual_multiplier", *EXPERTS,
)  # fmt: skip
"""Configuration fields that the computation of keys depends on, besides the shapes of the weights."""

ADAPTER = "adapter"
"""The name of the digest of the active adapters among the settings; a model without adapters has none."""

TEXT_ENCODER = "text_encoder"
"""The name under which the settings of an edit say that its model is a text encoder."""

READ_BY = ("rocr", "torch", "transformers")
MAX_VERSION = 500
MAX_CONFIG = 20_000
"""Maximum number of characters of a configuration."""


@dataclass(frozen=True)
class Provenance:
    """How a model read a text.

    Attributes:
        dtype: The dtype of the weights, such as "bfloat16".
        length: Maximum number of tokens of a sequence. Documents are joined by the end-of-text token before they are
            cut into sequences.
        skipped: Number of tokens at the beginning of each sequence whose keys were left out.
        config: The settings of the model among `COMPUTED_WITH`.
        documents: Number of texts that were read, or of sequences that the model wrote.
        versions: Versions of rocr, torch and transformers; merged statistics can have several of one.
        down_projections: Digests of the down-projections before the last layer that was read, on which its keys
            depend (`rocr.model.fingerprint.down_projection_digests`). Empty: unknown, as in files of rocr 0.1, or
            there are none.

    Raises:
        ValueError: A value is of another type or out of its range.
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
        """Return the provenance as JSON values."""
        values = asdict(self)
        digests = list(values.pop("down_projections"))
        return values | {"down_projections": digests} if digests else values

    def merge(self, other: Provenance) -> Provenance:
        """Return the provenance of both texts together.

        Raises:
            InputError: The keys were computed in different ways; the message names the difference on both sides.
        """
        changed = changed_layers(self.down_projections, other.down_projections)
        if changed:
            raise InputError(
                f"The models of these statistics have other down-projections at layer {_listed(changed)}: one of them "
                "carried an edit, which changes the keys of later layers. Collect both on the same model."
            )
        mine, others = different(self._of_keys(), other._of_keys())
        if mine:
            raise InputError(
                f"Statistics of texts that were read differently cannot be merged: {mine}, and {others}. "
                "Collect both in the same way."
            )
        both = {name: _both(self.versions[name], other.versions[name]) for name in READ_BY}
        digests = self.down_projections or other.down_projections
        return replace(self, documents=self.documents + other.documents, versions=both, down_projections=digests)

    def _of_keys(self) -> dict[str, Any]:
        return {**self.config, "dtype": self.dtype, "length": self.length, "skipped": self.skipped}


def computed_with(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model that its keys depend on, and the digest of its adapters, as JSON values."""
    config = text_config(model)
    found = {name: _setting(config, name) for name in COMPUTED_WITH}
    found[ADAPTER] = adapter_digest(model)
    if found["rope_parameters"] is not None:
        # transformers 5 repeats them as rope_scaling, in another form than transformers 4.
        del found["rope_scaling"]
    plain: dict[str, Any] = json.loads(json.dumps({name: value for name, value in found.items() if value is not None}))
    return plain


def config_of(value: object, label: str) -> dict[str, Any]:
    """Return a value of a file if it can be settings as `computed_with` returns them.

    Raises:
        ValueError: It is not an object, or is too large.
    """
    if not isinstance(value, dict) or len(json.dumps(value)) > MAX_CONFIG:
        raise ValueError(f"{label} must be an object of at most {MAX_CONFIG:,} characters")
    return value


def different(mine: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[str, str]:
    """Return the differing settings of each side as text. Names that only one side has are not compared.

    An adapter is the exception: settings without one are those of a model without adapters.
    """
    if all("model_type" in side for side in (mine, others)) and ADAPTER in {*mine, *others}:
        mine, others = ({ADAPTER: "none", **side} for side in (mine, others))
    names = [name for name in mine if name in others and mine[name] != others[name]]
    one, other = (", ".join(f"{name} {str(side[name])[:100]}" for name in names) for side in (mine, others))
    return one, other


def changed_layers(mine: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return the layers whose digests of down-projections differ, among the layers that both sides have."""
    return [layer for layer, (one, other) in enumerate(zip(mine, others, strict=False)) if one != other]


def versions_now() -> dict[str, str]:
    """Return the versions of the packages that compute keys."""
    found = versions()
    return {name: found.get(name, "unknown") for name in READ_BY}


def _setting(config: Any, name: str) -> Any:
    """Return a setting of a configuration; None if there is none, or if it differs by layer and raises an error."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _both(mine: str, others: str) -> str:
    """Return the union of two comma-separated lists of versions."""
    return ", ".join(dict.fromkeys([*mine.split(", "), *others.split(", ")]))
