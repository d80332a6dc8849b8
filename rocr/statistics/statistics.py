"""Second moments of ordinary keys, which an edit protects."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
_NUMBER = "0|[1-9][0-9]{0,5}"


@dataclass(frozen=True)
class MixtureMoments:
    """Mean second moments of the gated keys of a mixture of experts.

    Attributes:
        moments: For each block of the layer the matrix C = sum(g² k kᵀ) / tokens, (d_in, d_in) float32. All are
            divided by the number of tokens of the text, so that together they are the diagonal blocks of the second
            moment of the wide key.
        routed: (blocks,) int64, the number of the tokens that were routed to each block.
    """

    moments: tuple[Tensor, ...]
    routed: Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean second moments of the keys of ordinary text, for some layers of one model.

    Attributes:
        moments: For each dense layer the matrix C = sum(k kᵀ) / tokens, (d_in, d_in) float32, symmetric, not centred.
        tokens: Number of keys in each mean.
        text: Identifier of the text: the sha256 of its bytes, or how it was drawn.
        fingerprint: The model and tokenizer that read the text.
        provenance: How they read it. None: unknown, for example for moments from another program.
        mixtures: The moments of layers with a mixture of experts.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    text: str
    fingerprint: Fingerprint
    provenance: Provenance | None = None
    mixtures: Mapping[int, MixtureMoments] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line, such as "Statistics(8,192 tokens, layers=(4, 5), model='…', text='…')"."""
        return (
            f"Statistics({self.tokens:,} tokens, layers={self.layers}, model={self.fingerprint.name[:60]!r}, "
            f"text={self.text[:40]!r})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the moments, ascending."""
        return tuple(sorted([*self.moments, *self.mixtures]))

    def summary(self) -> dict[str, Any]:
        """Return a description for the report of an edit, as JSON values."""
        read = {} if self.provenance is None else {"dtype": self.provenance.dtype, "length": self.provenance.length}
        return {"text": self.text, "tokens": self.tokens, **read}

    def second_moment(self, layer: int) -> Tensor:
        """Return the mean second moment of one dense layer, (d_in, d_in) float32.

        Raises:
            InputError: There is no second moment of the layer, or it has one for each of its experts.
        """
        (moment,) = self.second_moments(layer)
        return moment

    def second_moments(self, layer: int) -> tuple[Tensor, ...]:
        """Return the mean second moment of each block of one layer: of the only one, or of each expert.

        Raises:
            InputError: There is no second moment of the layer.
        """
        if layer in self.mixtures:
            return self.mixtures[layer].moments
        if layer not in self.moments:
            raise InputError(
                f"The statistics cover layers {', '.join(map(str, self.layers))}, not layer {layer}; "
                "collect them for the layers that are edited."
            )
        return (self.moments[layer],)

    def check_model(
        self,
        other: Fingerprint,
        dtype: str | None = None,
        config: Mapping[str, Any] | None = None,
        down_projections: Sequence[str] = (),
    ) -> None:
        """Raise InputError unless the statistics were collected on a model.

        Args:
            other: The fingerprint of the model up to layer `self.fingerprint.layer`, in the same format.
            dtype: The dtype of its weights, such as "bfloat16". None is not compared.
            config: Its settings (`rocr.statistics.provenance.computed_with`). None is not compared.
            down_projections: Digests of its down-projections before the last layer whose statistics are used
                (`rocr.model.fingerprint.down_projection_digests`). Empty is not compared.

        Raises:
            InputError: Model, tokenizer, dtype, settings or down-projections differ; the message names both sides.
        """
        mine = self.fingerprint
        if mine.is_old != other.is_old:
            raise InputError(
                f"Of {mine} and {other}, one is a fingerprint of rocr 0.1, which hashed other values: the two cannot "
                "be compared. Collect the older statistics again: rocr stats."
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
                f"These statistics were collected on {mine} with {collected}, but the model to edit has {found}, which "
                "changes its keys. Load the model as it was then (--dtype), or collect statistics on it: rocr stats."
            )
        changed = changed_layers(self.provenance.down_projections, down_projections)
        if changed:
            raise InputError(
                f"These statistics were collected on {mine} with other down-projections than those of the model to "
                f"edit at layer {', '.join(map(str, changed))}: one of the two carries an edit, which changes the keys "
                "of later layers. Undo the edit (revert), add the concepts to it (Edit.add), or collect statistics on "
                "this model: rocr stats."
            )

    @plain_arithmetic()
    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both texts together: the means, weighted by their tokens.

        Args:
            other: Statistics of the same layers of the same model, on another text.

        Returns:
            The merged statistics; the sum is computed in float64 and rounded once to float32.

        Raises:
            InputError: The models or the layers differ, or the texts were read in different ways.
        """
        if self.layers != other.layers or self.fingerprint.layer != other.fingerprint.layer:
            raise InputError(
                f"Statistics of layers {self.layers} cannot be merged with those of {other.layers}: collect both for "
                "the same layers."
            )
        self.check_model(other.fingerprint)
        if (self.provenance is None) != (other.provenance is None):
            raise InputError(
                "One of these statistics has no provenance (how its text was read): collect it again before merging."
            )
        provenance = self.provenance.merge(other.provenance) if self.provenance and other.provenance else None
        tokens = self.tokens + other.tokens

        def mean(mine: Tensor, theirs: Tensor) -> Tensor:
            return ((mine.double() * self.tokens + theirs.double() * other.tokens) / tokens).float().contiguous()

        moments = {layer: mean(moment, other.moments[layer]) for layer, moment in self.moments.items()}
        mixtures = {}
        for layer, mine in self.mixtures.items():
            theirs = other.mixtures[layer]
            pairs = zip(mine.moments, theirs.moments, strict=True)
            mixtures[layer] = MixtureMoments(tuple(mean(*pair) for pair in pairs), mine.routed + theirs.routed)
        return Statistics(moments, tokens, f"{self.text}+{other.text}", self.fingerprint, provenance, mixtures)

    @plain_arithmetic()
    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the statistics to one safetensors file, atomically.

        Args:
            path: The file.
            overwrite: Whether an existing file is replaced.

        Raises:
            InputError: The file exists and `overwrite` is false.
            RocrError: The file cannot be written.
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
        for layer, mixture in self.mixtures.items():
            tensors[f"routed.{layer}"] = mixture.routed.cpu()
            for block, moment in enumerate(mixture.moments):
                tensors[f"second_moment.{layer}.{block}"] = moment.cpu().contiguous()
        write_tensors(path, header, tensors, overwrite=overwrite)

    @classmethod
    @plain_arithmetic()
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that `save` wrote, also one of rocr 0.1.

        Args:
            path: The file.

        Raises:
            InputError: The file is missing or damaged, or is not a statistics file.
        """
        header, tensors = read_tensors(path, FORMAT)
        try:
            moments, mixtures = _sorted(tensors)
            statistics = cls(
                moments,
                header["tokens"],
                text_of(header["text"], "text"),
                Fingerprint(**header["fingerprint"]),
                None if "provenance" not in header else Provenance(**header["provenance"]),
                mixtures,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a complete statistics file: {repr(error)[:200]}.") from None
        _check(statistics, path)
        return statistics


def _check(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Raise InputError unless the contents of a file are valid."""
    tokens = statistics.tokens
    if not statistics.layers or not isinstance(tokens, int) or not 0 < tokens <= MAX_INTEGER or tokens is True:
        raise InputError(f"{path} holds {len(statistics.layers)} second moments of {str(tokens)[:60]} tokens.")
    for layer, moment in statistics.moments.items():
        _check_moment(moment, f"{path}: the second moment of layer {layer}")
    for layer, mixture in statistics.mixtures.items():
        for block, moment in enumerate(mixture.moments):
            _check_moment(moment, f"{path}: the second moment of block {block} of layer {layer}", may_be_zero=True)
        if not any(moment.any() for moment in mixture.moments):
            raise InputError(f"{path}: all second moments of the experts of layer {layer} are 0.")
        routed = mixture.routed
        if routed.dtype != torch.int64 or routed.shape != (len(mixture.moments),) or not (routed >= 0).all():
            raise InputError(
                f"{path}: the numbers of tokens of the experts of layer {layer} are {routed.dtype} of shape "
                f"{tuple(routed.shape)}, not {len(mixture.moments)} whole numbers."
            )


def _check_moment(moment: Tensor, what: str, may_be_zero: bool = False) -> None:
    """Raise InputError unless a tensor is a second moment; that of an expert without tokens may be zero."""
    if moment.dtype != torch.float32 or moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        shape: Sequence[int] = tuple(moment.shape)
        raise InputError(f"{what} is {moment.dtype} of shape {shape}.")
    if (moment.diagonal() < 0).any() or not (may_be_zero or moment.diagonal().any()):
        raise InputError(f"{what} has mean squares that are negative or all 0.")
    if not torch.isfinite(moment).all():
        raise InputError(f"{what} holds values that are not finite.")
    if not torch.equal(moment, moment.T):
        raise InputError(f"{what} is not symmetric.")


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[int, Tensor], dict[int, MixtureMoments]]:
    """Return the moments of dense layers and of mixtures in a file's tensors.

    Raises:
        ValueError: The file contains another tensor, or lacks one of a mixture.
    """
    moments: dict[int, Tensor] = {}
    routed: dict[int, Tensor] = {}
    blocks: dict[int, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(second_moment|routed)\.({_NUMBER})(?:\.({_NUMBER}))?", name)
        if match is None or (match[1] == "routed" and match[3] is not None):
            raise ValueError(f"it contains a tensor {name[:60]!r}")
        layer = int(match[2])
        if match[1] == "routed":
            routed[layer] = tensor
        elif match[3] is None:
            moments[layer] = tensor
        else:
            blocks.setdefault(layer, {})[int(match[3])] = tensor
    for layer in routed.keys() | blocks.keys():
        if sorted(blocks.get(layer, {})) != list(range(len(routed.get(layer, ())))) or layer in moments:
            raise ValueError(f"it contains a part of the second moments of the experts of layer {layer}")
    return moments, {
        layer: MixtureMoments(tuple(blocks[layer][block] for block in range(len(counts))), counts)
        for layer, counts in routed.items()
    }
