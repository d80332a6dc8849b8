"""Collisions: pairs of concepts with nearly the same keys and different targets, or with one name inside the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept, folded
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
from rocr.io.json_values import list_of, numbers_of, text_of, whole_number_of

COLLINEAR = 0.95
"""Cosine of two keys under the metric from which they count as collinear: the update hardly distinguishes them."""
CONFLICT = 0.1
"""Value of `Collision.conflict` from which a pair counts as conflicting."""
MAX_REPORTED = 20
"""Largest number of pairs in each list of a report."""
BLOCK_ENTRIES = 1 << 22
"""Largest number of cosines that are computed at a time."""
_NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_NO_SPACES}]|(?:(?![{_NO_SPACES}])\w)+")
"""A word, or one character of a script that is written without spaces."""


@dataclass(frozen=True)
class Collision:
    """A pair of concepts that interfere with each other.

    Attributes:
        first: Name of one concept. If one name is inside the other, it is the inner one.
        second: Name of the other concept.
        cosine: Largest cosine of a key of one concept to a key of the other under the metric, with the inner product
            k M k'ᵀ. The update cannot distinguish keys with cosine 1.
        conflict: Share of the two wanted changes that cancels: maximum of 1 - |r + r'| / (|r| + |r'|) over the
            residuals of their keys with a cosine of at least `COLLINEAR`. 0 for residuals of one direction, 1 for
            opposite ones of one length. 0 if there are no such keys.
    """

    first: str
    second: str
    cosine: float
    conflict: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Collision:
        """Return the object with these JSON values; raises as `EditReport.from_json`."""
        found = cls(**values)
        text_of(found.first, "first")
        text_of(found.second, "second")
        numbers_of([found.cosine, found.conflict], "cosine and conflict", 2)
        return found


@dataclass(frozen=True)
class Collisions:
    """Numbers of collisions in a list of concepts, and the worst of them.

    Attributes:
        layer: The layer of the compared keys: the first edited layer, before any weight changes.
        collinear: Number of pairs of concepts with a cosine of at least `COLLINEAR`.
        conflicting: Number of these pairs with a conflict of at least `CONFLICT`.
        inside: Number of pairs of concepts with a name of one, as whole words, inside a name of the other.
        worst: The collinear pairs with the largest sum of cosine and conflict, at most 20.
        nested: The pairs of `inside` with the largest sum, at most 20.
    """

    layer: int
    collinear: int
    conflicting: int
    inside: int
    worst: list[Collision] = field(default_factory=list)
    nested: list[Collision] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Collisions:
        """Return the object with these JSON values; raises as `EditReport.from_json`."""
        pairs = {
            name: [Collision.from_json(pair) for pair in list_of(values[name], name)] for name in ("worst", "nested")
        }
        found = cls(**{**values, **pairs})
        for name in ("layer", "collinear", "conflicting", "inside"):
            whole_number_of(getattr(found, name), name)
        return found


def find_collisions(concepts: Sequence[Concept], concept_of: Sequence[int], update: LayerUpdate) -> Collisions:
    """Compare the keys of all pairs of concepts, in blocks of bounded memory.

    Args:
        concepts: The concepts.
        concept_of: For each key, the index of its concept.
        update: The update of the first edited layer, with its system.
    """
    rows = _Rows(concept_of, update)
    worst = _Worst()
    collinear = conflicting = 0
    for start, end in rows.blocks():
        pairs, cosines, conflicts = rows.collinear_pairs(start, end, len(concepts))
        collinear += len(pairs)
        conflicting += int((conflicts >= CONFLICT).sum())
        worst.add(pairs, cosines, conflicts)
    inside, nested = _find_nested(concepts, rows)

    def named(found: _Worst) -> list[Collision]:
        return [
            Collision(concepts[pair // len(concepts)].name, concepts[pair % len(concepts)].name, cosine, conflict)
            for pair, cosine, conflict in found.rows
        ]

    return Collisions(update.layer, collinear, conflicting, inside, named(worst), named(nested))


def names_inside(concepts: Sequence[Concept]) -> list[tuple[int, int]]:
    """Return the pairs (inner, outer) of concepts with a name of one, as whole words, inside a name of the other."""
    words = [[tuple(_WORD.findall(folded(name))) for name in concept.names] for concept in concepts]
    owner = {name: i for i, names in enumerate(words) for name in names if name}
    lengths = sorted({len(name) for name in owner})
    found = {
        (inner, outer): None
        for outer, names in enumerate(words)
        for name in names
        for length in lengths
        for start in range(len(name) - length + 1)
        if (inner := owner.get(name[start : start + length], outer)) != outer
    }
    return list(found)


def nearest_keys(keys: Tensor) -> tuple[int, int]:
    """Return the indices of the two rows of keys (n >= 2, d_in) with the largest cosine. Memory is bounded."""
    plain = torch.nn.functional.normalize(keys.double(), dim=1)
    best, pair = -2.0, (0, 0)
    step = max(1, BLOCK_ENTRIES // len(keys))
    for start in range(0, len(keys), step):
        cosines = plain[start : start + step] @ plain.T
        own = torch.arange(len(cosines), device=keys.device)
        cosines[own, start + own] = -2.0
        value, place = cosines.flatten().max(dim=0)
        if float(value) > best:
            best, pair = float(value), (start + int(place) // len(keys), int(place) % len(keys))
    return pair


def nearest_concepts(concept_of: Sequence[int], update: LayerUpdate, most: int) -> tuple[list[int], Tensor]:
    """Return the concepts with the largest cosine to another one, and their cosines under the metric.

    Args:
        concept_of: For each key, the index of its concept.
        update: The update of the first edited layer, with its system.
        most: Largest number of concepts to return.

    Returns:
        Indices of the concepts, and their cosines (concepts, concepts): for each pair the largest of their keys.

    Raises:
        InputError: The update has no system.
    """
    if update.system is None:
        raise InputError("The edit was written without its systems, so that its keys cannot be compared.")
    rows = _Rows(concept_of, update)
    count = len(rows.starts) - 1
    nearest = torch.full((count,), -2.0)
    for start, end in rows.blocks():
        cosines = rows.left[start:end] @ rows.right.T
        cosines[rows.owners[start:end, None] == rows.owners[None]] = -2.0
        nearest = torch.maximum(nearest, _largest(cosines.amax(dim=1).cpu(), rows.owners[start:end].cpu(), count))
    chosen = nearest.topk(min(most, count)).indices.sort().values.tolist()
    own = [torch.arange(rows.starts[i], rows.starts[i + 1]) for i in chosen]
    kept, place = torch.cat(own), torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(each) for each in own]))
    cosines = (rows.left[kept] @ rows.right[kept].T).float().cpu()
    pairs = place[:, None] * len(chosen) + place[None]
    return chosen, _largest(cosines.flatten(), pairs.flatten(), len(chosen) ** 2).view(len(chosen), len(chosen))


class _Rows:
    """Keys and residuals sorted by concept; the keys are unit vectors under the metric."""

    def __init__(self, concept_of: Sequence[int], update: LayerUpdate) -> None:
        keys, system = update.keys, update.system
        assert system is not None, "a solved update has its system"
        owners = torch.tensor(concept_of)
        order = torch.argsort(owners, stable=True)
        self.owners = owners[order].to(keys.device)
        self.starts = [0, *(owners.bincount().cumsum(0).tolist())]
        order = order.to(keys.device)
        if system.metric is not None:
            self.left = torch.nn.functional.normalize(system.metric.root(keys[order]).float(), dim=1)
            self.right = self.left
        else:
            assert system.product is not None, "a system has a product or a metric"
            self.left, self.right = keys[order], system.product.to(keys)[order]
            length = (self.left * self.right).sum(dim=1, keepdim=True).clamp(min=1e-30).sqrt()
            self.left, self.right = self.left / length, self.right / length
        self.residuals = update.residuals[order]
        self.sizes = self.residuals.norm(dim=1)

    def blocks(self) -> list[tuple[int, int]]:
        """Return ranges of rows, each of whole concepts and of bounded memory for its cosines to all rows."""
        most = max(1, BLOCK_ENTRIES // len(self.owners))
        ranges = [(0, 0)]
        for end in self.starts[1:]:
            start = ranges[-1][0]
            if end - start > most and ranges[-1][1] > start:
                ranges.append((ranges[-1][1], end))
            else:
                ranges[-1] = (start, end)
        return ranges

    def collinear_pairs(self, start: int, end: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the collinear pairs of a block's concepts and later ones, with cosines and conflicts.

        A pair is encoded as first * count + second.
        """
        cosines = self.left[start:end] @ self.right[start:].T
        near = (cosines >= COLLINEAR) & (self.owners[start:end, None] < self.owners[None, start:])
        rows, columns = near.nonzero(as_tuple=True)
        pairs = self.owners[start + rows] * count + self.owners[start + columns]
        values = cosines[rows, columns]
        if not len(rows):
            return pairs.cpu(), values.cpu(), values.cpu()
        dots = (self.residuals[start:end] @ self.residuals[start:].T)[rows, columns]
        conflicts = _conflict(dots, self.sizes[start + rows], self.sizes[start + columns])
        pairs, place = torch.unique(pairs, return_inverse=True)
        return pairs.cpu(), _largest(values, place, len(pairs)).cpu(), _largest(conflicts, place, len(pairs)).cpu()

    def compare(self, inner: int, outers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the cosines and conflicts of one concept with some others."""
        own = slice(self.starts[inner], self.starts[inner + 1])
        others = [row for outer in outers for row in range(self.starts[outer], self.starts[outer + 1])]
        sizes = torch.tensor([self.starts[outer + 1] - self.starts[outer] for outer in outers])
        place = torch.arange(len(outers)).repeat_interleave(sizes).to(self.owners.device)
        cosines = self.left[own] @ self.right[others].T
        conflicts = _conflict(
            self.residuals[own] @ self.residuals[others].T, self.sizes[own, None], self.sizes[others][None]
        )
        conflicts = conflicts.where(cosines >= COLLINEAR, 0.0)
        cosine, conflict = (_largest(values.amax(dim=0), place, len(outers)).cpu() for values in (cosines, conflicts))
        return cosine, conflict


def _find_nested(concepts: Sequence[Concept], rows: _Rows) -> tuple[int, _Worst]:
    """Return the number of pairs with one name inside the other, and the worst of them."""
    pairs = names_inside(concepts)
    by_inner: dict[int, list[int]] = {}
    for inner, outer in pairs:
        by_inner.setdefault(inner, []).append(outer)
    worst = _Worst()
    for inner, outers in by_inner.items():
        worst.add(inner * len(concepts) + torch.tensor(outers), *rows.compare(inner, outers))
    return len(pairs), worst


@dataclass
class _Worst:
    """The pairs with the largest sums of cosine and conflict so far, as (pair, cosine, conflict)."""

    rows: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, pairs: Tensor, cosines: Tensor, conflicts: Tensor) -> None:
        best = (cosines + conflicts).topk(min(MAX_REPORTED, len(pairs))).indices
        found = zip(pairs[best].tolist(), cosines[best].tolist(), conflicts[best].tolist(), strict=True)
        self.rows = sorted([*self.rows, *found], key=lambda row: -(row[1] + row[2]))[:MAX_REPORTED]


def _largest(values: Tensor, place: Tensor, count: int) -> Tensor:
    """Return the largest value for each index in `place`, of `count`."""
    return values.new_full((count,), -2.0).scatter_reduce(0, place, values, "amax").clamp(-1.0, 1.0)


def _conflict(dots: Tensor, sizes: Tensor, others: Tensor) -> Tensor:
    """Return 1 - |r + r'| / (|r| + |r'|) from inner products and lengths; 0 if both are 0."""
    left = (sizes.square() + others.square() + 2 * dots).clamp(min=0).sqrt()
    both = sizes + others
    return (1 - left / both.clamp(min=1e-30)).where(both > 0, 0.0).clamp(min=0)
