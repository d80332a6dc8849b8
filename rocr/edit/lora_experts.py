"""The factors of an edit of experts in the form of PEFT's `target_parameters`.

PEFT 0.19 and later store one pair of matrices for a parameter of E experts and rank r: A (r · E, in), read as
(E, r, in), and B (out, r · E), read as (out, r, E). The parameter is taken as (E, in, out) if its module has the
attribute `is_transposed`, and otherwise as (E, out, in). vLLM reads A and B alike (`_stack_moe_lora_weights` in
vllm/lora/model_manager.py). PEFT 0.18 took every parameter as (E, in, out).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.edit.update import LayerUpdate, Part


@dataclass(frozen=True)
class ParameterFactors:
    """The factors of the update of one parameter, which holds one or more experts.

    Attributes:
        parts: The parts of the update in the parameter, one for each touched expert.
        parameter: Name of the parameter in the model's state dict.
        own: As `LayerUpdate.own`, of the parameter.
        lefts: For each part, (d_out, r) float32.
        rights: For each part, (r, d_in) float32.
    """

    parts: Sequence[Part]
    parameter: str
    own: str | None
    lefts: Sequence[Tensor]
    rights: Sequence[Tensor]

    @property
    def rank(self) -> int:
        """The largest rank of a part."""
        return max(right.shape[0] for right in self.rights)

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    def adapter(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (rank · E, in) and B (out, rank · E) for a rank of at least that of the parts."""
        first = self.parts[0]
        # PEFT's own names of the two sides, where a module does not declare that its parameter is transposed.
        swapped = first.transposed != first.declared_transposed
        left, right = (self.rights, self.lefts) if swapped else (self.lefts, self.rights)
        sides = [(a.T, b.T) if swapped else (a, b) for a, b in zip(left, right, strict=True)]
        out, into = sides[0][0].shape[0], sides[0][1].shape[1]
        a = torch.zeros(first.experts, rank, into)
        b = torch.zeros(out, rank, first.experts)
        for part, (mine, theirs) in zip(self.parts, sides, strict=True):
            expert = part.expert or 0
            a[expert, : theirs.shape[0]] = theirs
            b[:, : mine.shape[1], expert] = mine
        return a.reshape(rank * first.experts, into), b.reshape(out, rank * first.experts)


def parameter_factors(
    update: LayerUpdate, lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> Iterator[ParameterFactors]:
    """Yield the factors of each parameter of a wide update.

    Args:
        update: The update of a mixture.
        lefts: For each part, (d_out, r).
        rights: For each part, (r, d_in).
    """
    rows = zip(update.parts, lefts, rights, strict=True)
    for parameter, group in itertools.groupby(rows, key=lambda row: row[0].parameter):
        members = list(group)
        parts = [member[0] for member in members]
        own = parts[0].own
        yield ParameterFactors(parts, parameter, own, [m[1] for m in members], [m[2] for m in members])
