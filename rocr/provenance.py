"""How the text of statistics was read: what changes a key besides the model, its tokenizer and the text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from rocr.architectures import text_config
from rocr.errors import InputError
from rocr.json_values import text_of, whole_number_of
from rocr.versions import versions

COMPUTED_WITH = (
    "model_type", "hidden_act", "hidden_activation", "activation_function", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim", "sliding_window",
    "use_sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "attention_multiplier", "embedding_multiplier",
    "residual_multiplier",
)  # fmt: skip
"""What a configuration of transformers says of how keys are computed, besides the shapes of the weights."""

READ_BY = ("rocr", "torch", "transformers")
DTYPES = ("float32", "bfloat16", "float16")
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
    """

    dtype: str
    length: int
    skipped: int
    config: Mapping[str, Any]
    documents: int
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {repr(self.dtype)[:60]}")
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

    def to_json(self) -> dict[str, Any]:
        """The provenance as JSON values."""
        return asdict(self)

    def merge(self, other: Provenance) -> Provenance:
        """The provenance of both texts.

        Raises:
            InputError: keys of the two are not of one kind; names what differs, on both sides.
        """
        mine, others = different(self._of_keys(), other._of_keys())
        if mine:
            raise InputError(
                f"Statistics of texts that were read differently cannot be merged: {mine}, and {others}. "
                "Collect one of them as the other."
            )
        both = {name: _both(self.versions[name], other.versions[name]) for name in READ_BY}
        return replace(self, documents=self.documents + other.documents, versions=both)

    def _of_keys(self) -> dict[str, Any]:
        return {**self.config, "dtype": self.dtype, "length": self.length, "skipped": self.skipped}


def computed_with(model: nn.Module) -> dict[str, Any]:
    """The settings of a model that its keys depend on, as JSON values."""
    config = text_config(model)
    found = {name: getattr(config, name, None) for name in COMPUTED_WITH}
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
    """What differs on either side, in words; of names that only one side knows, nothing can be said."""
    names = [name for name in mine if name in others and mine[name] != others[name]]
    one, other = (", ".join(f"{name} {str(side[name])[:100]}" for name in names) for side in (mine, others))
    return one, other


def versions_now() -> dict[str, str]:
    """Versions of what computes keys."""
    found = versions()
    return {name: found.get(name, "unknown") for name in READ_BY}


def _both(mine: str, others: str) -> str:
    """Two lists of versions as one, without repetition."""
    return ", ".join(dict.fromkeys([*mine.split(", "), *others.split(", ")]))
