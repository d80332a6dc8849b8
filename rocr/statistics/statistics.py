"""Second moments of ordinary keys: what an edit must leave alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.io.json_values import MAX_INTEGER, text_of
from rocr.io.tensors import read_tensors, write_tensors
from rocr.model.fingerprint import Fingerprint
from rocr.ops.arithmetic import plain_arithmetic
from rocr.statistics.provenance import Provenance, changed_layers, different

FORMAT = "rocr statistics 1"


@dataclass(frozen=True)
class Statistics:
    """Mean second moments of the keys of ordinary text, for some layers of one model.

    Attributes:
        moments: for each layer the (d_in, d_in) float32 matrix C = sum(k kᵀ) / tokens, symmetric, not centred.
        tokens: number of keys in each mean.
        text: what the text was: sha256 of its bytes, or how it was drawn.
        fingerprint: the model and tokenizer that read it.
        provenance: how they read it; None: not known, as of moments from elsewhere or a file that does not say.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    text: str
    fingerprint: Fingerprint
    provenance: Provenance | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are moments of, ascending."""
        return tuple(sorted(self.moments))

    def summary(self) -> dict[str, Any]:
        """What an edit's report says of them."""
        read = {} if self.provenance is None else {"dtype": self.provenance.dtype, "length": self.provenance.length}
        return {"text": self.text, "tokens": self.tokens, **read}

    def second_moment(self, layer: int) -> Tensor:
        """The mean second moment of one layer, (d_in, d_in) float32.

        Raises:
            InputError: the layer is not among them.
        """
        if layer not in self.moments:
            raise InputError(
                f"The statistics cover layers {', '.join(map(str, self.layers))}, not layer {layer}; "
                "collect them for the layers that are edited."
            )
        return self.moments[layer]

    def check_model(
        self,
        other: Fingerprint,
        dtype: str | None = None,
        config: Mapping[str, Any] | None = None,
        down_projections: Sequence[str] = (),
    ) -> None:
        """Refuse a model that the statistics were not collected on.

        Args:
            other: fingerprint of that model, up to the layer `self.fingerprint.layer`, made like that.
            dtype: of that model, such as "bfloat16"; None: not to be compared.
            config: its settings (`rocr.statistics.provenance.computed_with`); None: not to be compared.
            down_projections: digests of those before the last layer that statistics are used of
                (`rocr.model.fingerprint.down_projection_digests`); empty: not to be compared.

        Raises:
            InputError: model, tokenizer, dtype, settings or down-projections differ; names both sides.
        """
        mine = self.fingerprint
        if mine.is_old != other.is_old:
            raise InputError(
                f"Of {mine} and {other}, one is a fingerprint of rocr 0.1, which took other values: the two cannot be "
                "compared. Collect the older statistics again: rocr stats."
            )
        if (mine.model, mine.tokenizer) != (other.model, other.tokenizer):
            raise InputError(
                f"These statistics were collected on {mine}, but the model to edit is {other}. "
                "Collect statistics on the model itself: rocr stats."
            )
        if self.provenance is None:
            return
        asked = {name: value for name, value in (("dtype", dtype), *(config or {}).items()) if value is not None}
        collected, found = different({**self.provenance.config, "dtype": self.provenance.dtype}, asked)
        if collected:
            raise InputError(
                f"These statistics were collected on {mine} with {collected}, but the model to edit has {found}, so "
                "that its keys are others. Load it as it was (--dtype), or collect statistics on it: rocr stats."
            )
        changed = changed_layers(self.provenance.down_projections, down_projections)
        if changed:
            raise InputError(
                f"These statistics were collected on {mine} with other down-projections than those of the model to "
                f"edit at layer {', '.join(map(str, changed))}: one of both carries an edit, so that the keys of later "
                "layers are others. Take the edit off (revert), add the concepts to it (Edit.add), or collect "
                "statistics on this model: rocr stats."
            )

    @plain_arithmetic()
    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both texts together: means weighted by their tokens.

        Raises:
            InputError: the models, the layers or how they read the texts differ.
        """
        if self.layers != other.layers or self.fingerprint.layer != other.fingerprint.layer:
            raise InputError(f"Statistics of layers {self.layers} cannot be merged with those of {other.layers}.")
        self.check_model(other.fingerprint)
        if (self.provenance is None) != (other.provenance is None):
            raise InputError(
                "Of one of these statistics it is not known how its text was read, so that they cannot be merged: "
                "collect it again."
            )
        provenance = self.provenance.merge(other.provenance) if self.provenance and other.provenance else None
        tokens = self.tokens + other.tokens
        moments = {
            layer: (
                (self.moments[layer].double() * self.tokens + other.moments[layer].double() * other.tokens) / tokens
            )
            .float()
            .contiguous()
            for layer in self.layers
        }
        return Statistics(moments, tokens, f"{self.text}+{other.text}", self.fingerprint, provenance)

    @plain_arithmetic()
    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write one safetensors file, complete or not at all.

        Raises:
            InputError: the file exists and `overwrite` is not set.
            RocrError: it cannot be written.
        """
        header: dict[str, Any] = {
            "format": FORMAT,
            "tokens": self.tokens,
            "text": self.text,
            "fingerprint": self.fingerprint.to_json(),
        }
        if self.provenance is not None:
            header["provenance"] = self.provenance.to_json()
        tensors = {f"second_moment.{layer}": moment.cpu().contiguous() for layer, moment in self.moments.items()}
        write_tensors(path, header, tensors, overwrite=overwrite)

    @classmethod
    @plain_arithmetic()
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            InputError: it is missing, damaged, or not a statistics file.
        """
        header, tensors = read_tensors(path, FORMAT)
        try:
            statistics = cls(
                {_layer_of(name): tensor for name, tensor in tensors.items()},
                header["tokens"],
                text_of(header["text"], "text"),
                Fingerprint(**header["fingerprint"]),
                None if "provenance" not in header else Provenance(**header["provenance"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a complete statistics file: {repr(error)[:200]}.") from None
        _check(statistics, path)
        return statistics


def _check(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    tokens = statistics.tokens
    if not statistics.moments or not isinstance(tokens, int) or not 0 < tokens <= MAX_INTEGER or tokens is True:
        raise InputError(f"{path} holds {len(statistics.moments)} second moments of {str(tokens)[:60]} tokens.")
    for layer, moment in statistics.moments.items():
        if moment.dtype != torch.float32 or moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            shape: Sequence[int] = tuple(moment.shape)
            raise InputError(f"{path}: the second moment of layer {layer} is {moment.dtype} of shape {shape}.")
        if (moment.diagonal() < 0).any() or not moment.diagonal().any():
            raise InputError(f"{path}: the second moment of layer {layer} has mean squares that are negative or all 0.")
        if not torch.isfinite(moment).all():
            raise InputError(f"{path}: the second moment of layer {layer} holds values that are not finite.")
        if not torch.equal(moment, moment.T):
            raise InputError(f"{path}: the second moment of layer {layer} is not symmetric.")


def _layer_of(name: str) -> int:
    match = re.fullmatch(r"second_moment\.(0|[1-9][0-9]{0,5})", name)
    if match is None:
        raise ValueError(f"it holds a tensor {name[:60]!r}")
    return int(match[1])
