"""Second moments of ordinary keys: what an edit must leave alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.files import read_tensors, write_tensors
from rocr.fingerprint import Fingerprint
from rocr.json_values import MAX_NUMBER, text_of

FORMAT = "rocr statistics 1"


@dataclass(frozen=True)
class Statistics:
    """Mean second moments of the keys of ordinary text, for some layers of one model.

    Attributes:
        moments: for each layer the (d_in, d_in) float32 matrix C = sum(k kᵀ) / tokens, symmetric, not centred.
        tokens: number of keys in each mean.
        text: what the text was: sha256 of its bytes, or how it was drawn.
        fingerprint: the model and tokenizer that read it.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    text: str
    fingerprint: Fingerprint

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are moments of, ascending."""
        return tuple(sorted(self.moments))

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

    def check_model(self, other: Fingerprint) -> None:
        """Refuse a model that the statistics were not collected on.

        Args:
            other: fingerprint of that model, up to the layer `self.fingerprint.layer`.

        Raises:
            InputError: model or tokenizer differ; names both sides.
        """
        mine = self.fingerprint
        if (mine.model, mine.tokenizer) != (other.model, other.tokenizer):
            raise InputError(
                f"These statistics were collected on {mine}, but the model to edit is {other}. "
                "Collect statistics on the model itself: rocr stats."
            )

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both texts together: means weighted by their tokens.

        Raises:
            InputError: the models or layers differ.
        """
        if self.layers != other.layers or self.fingerprint.layer != other.fingerprint.layer:
            raise InputError(f"Statistics of layers {self.layers} cannot be merged with those of {other.layers}.")
        self.check_model(other.fingerprint)
        tokens = self.tokens + other.tokens
        moments = {
            layer: (
                (self.moments[layer].double() * self.tokens + other.moments[layer].double() * other.tokens) / tokens
            )
            .float()
            .contiguous()
            for layer in self.layers
        }
        return Statistics(moments, tokens, f"{self.text}+{other.text}", self.fingerprint)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write one safetensors file, complete or not at all.

        Raises:
            InputError: the file exists and `overwrite` is not set.
            RocrError: it cannot be written.
        """
        header = {
            "format": FORMAT,
            "tokens": self.tokens,
            "text": self.text,
            "fingerprint": self.fingerprint.to_json(),
        }
        tensors = {f"second_moment.{layer}": moment.cpu().contiguous() for layer, moment in self.moments.items()}
        write_tensors(path, header, tensors, overwrite=overwrite)

    @classmethod
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
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a complete statistics file: {repr(error)[:200]}.") from None
        _check(statistics, path)
        return statistics


def _check(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    tokens = statistics.tokens
    if not statistics.moments or not isinstance(tokens, int) or not 0 < tokens <= MAX_NUMBER or tokens is True:
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
