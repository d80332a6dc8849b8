"""Concepts of one list that get in each other's way: nearly the same key, other targets, a name inside another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept, folded
from rocr.edit.update import LayerUpdate
from rocr.io.json_values import list_of, numbers_of, text_of, whole_number_of

COLLINEAR = 0.95
"""Cosine of two keys under the metric from which on the update hardly tells them apart."""
CONFLICT = 0.1
"""Share of two wanted moves that cancels from which on redirects disagree."""
KEPT = 20
BLOCK_ENTRIES = 1 << 22
_NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_NO_SPACES}]|(?:(?![{_NO_SPACES}])\w)+")
"""A word, or a character of a script that is written without spaces."""


@dataclass(frozen=True)
class Collision:
    """Two concepts that get in each other's way.

    Attributes:
        first, second: their names; of a name inside another, the inner one first.
        cosine: largest cosine of a key of one to a key of the other under the metric, k M k' / (|k| |k'|), which is
            what the solve sees of their angle; 1: the update cannot tell them apart.
        conflict: of their keys at least COLLINEAR alike, the largest |r - r'| / (|r| + |r'|) of the residuals: the
            share of the two wanted moves that no common one can serve. 0: the same move, 1: opposite ones.
    """

    first: str
    second: str
    cosine: float
    conflict: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Collision:
        """Raises: as `EditReport.from_json`."""
        found = cls(**values)
        text_of(found.first, "first")
        text_of(found.second, "second")
        numbers_of([found.cosine, found.conflict], "cosine and conflict", 2)
        return found


@dataclass(frozen=True)
class Collisions:
    """The collisions of a list of concepts, counted, and the worst of them.

    Attributes:
        layer: where the keys were measured: the first edited layer, before any weight changed.
        collinear: pairs of concepts with keys at least COLLINEAR alike.
        conflicting: those of them with a conflict of at least CONFLICT.
        inside: pairs of concepts with a name of one inside a name of the other, word by word.
        worst: the collinear pairs with the largest sum of cosine and conflict, at most 20.
        nested: the pairs of `inside` with the largest sum, at most 20.
    """

    layer: int
    collinear: int
    conflicting: int
    inside: int
    worst: list[Collision] = field(default_factory=list)
    nested: list[Collision] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Collisions:
        """Raises: as `EditReport.from_json`."""
        pairs = {
            name: [Collision.from_json(pair) for pair in list_of(values[name], name)] for name in ("worst", "nested")
        }
        found = cls(**{**values, **pairs})
        for name in ("layer", "collinear", "conflicting", "inside"):
            whole_number_of(getattr(found, name), name)
        return found


def find_collisions(concepts: Sequence[Concept], concept_of: Sequence[int], update: LayerUpdate) -> Collisions:
    """Compare every concept's keys with those of every other, in blocks of bounded memory.

    Args:
        concepts: the concepts.
        concept_of: for each key, the index of its concept.
        update: of the first edited layer, with the system that it was solved from.
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
    """Pairs (inner, outer) of concepts with a name of one inside a name of the other, word by word."""
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
    """The two rows of keys (n >= 2, d_in) with the largest cosine, in blocks of bounded memory."""
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


class _Rows:
    """Keys and residuals in the order of their concepts, keys as unit vectors under the metric."""

    def __init__(self, concept_of: Sequence[int], update: LayerUpdate) -> None:
        keys, system = update.keys, update.system
        assert system is not None, "an update that was just solved has its system"
        owners = torch.tensor(concept_of)
        order = torch.argsort(owners, stable=True)
        self.owners = owners[order].to(keys.device)
        self.starts = [0, *(owners.bincount().cumsum(0).tolist())]
        order = order.to(keys.device)
        if system.metric is not None:
            self.left = torch.nn.functional.normalize(system.metric.root(keys[order]).float(), dim=1)
            self.right = self.left
        else:
            assert system.product is not None, "a system holds a product or a metric"
            self.left, self.right = keys[order], system.product.to(keys)[order]
            length = (self.left * self.right).sum(dim=1, keepdim=True).clamp(min=1e-30).sqrt()
            self.left, self.right = self.left / length, self.right / length
        self.residuals = update.residuals[order]
        self.sizes = self.residuals.norm(dim=1)

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of rows that cut no concept in two, small enough for a block of all their cosines."""
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
        """Pairs of a block's concepts with later ones, as first * count + second, their cosines and conflicts."""
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
        """Cosines and conflicts of one concept with some others."""
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
    """The pairs with the largest sums of cosine and conflict so far: pair, cosine, conflict."""

    rows: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, pairs: Tensor, cosines: Tensor, conflicts: Tensor) -> None:
        best = (cosines + conflicts).topk(min(KEPT, len(pairs))).indices
        found = zip(pairs[best].tolist(), cosines[best].tolist(), conflicts[best].tolist(), strict=True)
        self.rows = sorted([*self.rows, *found], key=lambda row: -(row[1] + row[2]))[:KEPT]


def _largest(values: Tensor, place: Tensor, count: int) -> Tensor:
    """The largest value of each place."""
    return values.new_full((count,), -2.0).scatter_reduce(0, place, values, "amax").clamp(-1.0, 1.0)


def _conflict(dots: Tensor, sizes: Tensor, others: Tensor) -> Tensor:
    """|r - r'| / (|r| + |r'|) from products and lengths."""
    distance = (sizes.square() + others.square() - 2 * dots).clamp(min=0).sqrt()
    return distance / (sizes + others).clamp(min=1e-30)
