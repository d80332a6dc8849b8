"""What an edit does to names that should stay: how far each concept's part of the update moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept, check_names, folded
from rocr.config import EditConfig
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
from rocr.io.json_values import flag_of, list_of, numbers_of, text_of, whole_number_of
from rocr.keys.plan import plan_names
from rocr.keys.read import read_layers
from rocr.model.architecture import Architecture, positions_of
from rocr.progress import ProgressCallback
from rocr.solve.solve import Solution

KEPT = 20
MAX_NEIGHBOURS = 200
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Harm:
    """How far a neighbour's output is moved.

    Attributes:
        neighbour: its name.
        concept: the concept whose part of the update does it; None: the whole update.
        layer: where.
        share: |Δ k| / |W k|, Δ being that part of the update, largest over the keys k of the neighbour's name and
            over the edited layers.
    """

    neighbour: str
    concept: str | None
    layer: int
    share: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Harm:
        """Raises: as `EditReport.from_json`."""
        found = cls(**values)
        text_of(found.neighbour, "neighbour")
        if found.concept is not None:
            text_of(found.concept, "concept")
        whole_number_of(found.layer, "layer")
        numbers_of([found.share], "share", 1)
        return found


@dataclass(frozen=True)
class NeighbourReport:
    """What became of the retained neighbours.

    Attributes:
        given: whether they were named; else they are the redirects, which are kept by their nature.
        count: how many were measured, each at all keys of its name in the unedited model.
        mean: mean over them of the share by which the whole update moves their outputs.
        moved: those that the whole update moves most, at most 20.
        worst: the pairs of a neighbour and a concept whose part of the update moves it most, at most 20; the parts
            of all concepts add up to the update.
    """

    given: bool
    count: int
    mean: float
    moved: list[Harm] = field(default_factory=list)
    worst: list[Harm] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NeighbourReport:
        """Raises: as `EditReport.from_json`."""
        lists = {name: [Harm.from_json(harm) for harm in list_of(values[name], name)] for name in ("moved", "worst")}
        found = cls(**{**values, **lists})
        flag_of(found.given, "given")
        whole_number_of(found.count, "count")
        numbers_of([found.mean], "mean", 1)
        return found


@dataclass
class Neighbours:
    """Names that should stay, their keys, and the largest moves found so far.

    Attributes:
        names: the names.
        given: whether they were named by the caller.
        name_of: for each key, the index of its name.
        keys: for each edited layer, (m, d_in) float32 keys in the unedited model.
    """

    names: list[str]
    given: bool
    name_of: list[int]
    keys: dict[int, Tensor]
    _moved: dict[int, tuple[float, int]] = field(default_factory=dict)
    _pairs: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)

    def measure(self, weight: Tensor, update: LayerUpdate, solution: Solution, concept_of: Sequence[int]) -> None:
        """Measure one layer's update, which is not applied yet.

        Args:
            weight: (d_out, d_in) before the update.
            update: the update.
            solution: what it was solved as.
            concept_of: for each of its keys, the index of the concept.
        """
        layer = update.layer
        own = self.keys[layer].to(update.keys)
        outputs = (own @ weight.to(own).T).norm(dim=1).clamp(min=1e-30)
        whole = update.factors.moves(own).norm(dim=1) / outputs
        for name, share in enumerate(self._by_name(whole[None])[0].tolist()):
            self._moved[name] = max(self._moved.get(name, (-1.0, 0)), (share, layer))
        for concepts, moves in part_moves(
            solution.coefficients(update.keys, own), len(own), update.residuals, concept_of
        ):
            shares = self._by_name(moves / outputs)
            values, places = shares.flatten().topk(min(KEPT, shares.numel()))
            for share, place in zip(values.tolist(), places.tolist(), strict=True):
                pair = (place % len(self.names), concepts[place // len(self.names)])
                self._pairs[pair] = max(self._pairs.get(pair, (-1.0, 0)), (share, layer))
        kept = sorted(self._pairs.items(), key=lambda item: -item[1][0])
        self._pairs = dict(kept[:KEPT])

    def report(self, concepts: Sequence[str]) -> NeighbourReport:
        """What was found, for an edit of concepts of these names."""
        moved = [Harm(self.names[name], None, layer, share) for name, (share, layer) in self._moved.items()]
        worst = [
            Harm(self.names[name], concepts[concept], layer, share)
            for (name, concept), (share, layer) in self._pairs.items()
        ]
        mean = sum(harm.share for harm in moved) / len(moved)
        moved.sort(key=lambda harm: -harm.share)
        return NeighbourReport(self.given, len(self.names), mean, moved[:KEPT], worst)

    def _by_name(self, shares: Tensor) -> Tensor:
        """The largest share of each name's keys: (rows, m) to (rows, names)."""
        place = torch.tensor(self.name_of, device=shares.device).expand(len(shares), -1)
        return shares.new_zeros(len(shares), len(self.names)).scatter_reduce(1, place, shares, "amax")


def read_neighbours(
    architecture: Architecture,
    tokenizer: Any,
    concepts: Sequence[Concept],
    names: Sequence[str] | None,
    config: EditConfig,
    progress: ProgressCallback,
) -> Neighbours | None:
    """Read the keys of names that should stay, in the unedited model.

    Args:
        architecture: of the model.
        tokenizer: its tokenizer.
        concepts: those that are unlearned.
        names: the neighbours; None: the redirects, at most 200 of them.
        config: the settings, with layers.
        progress: told after every batch.

    Returns:
        None where there is no name to measure.

    Raises:
        InputError: a name is not as a list of concepts may have it, is on the list, has no token that can be a key, or
            is longer than the model's positions.
    """
    chosen = list(dict.fromkeys(concept.redirect for concept in concepts))[:MAX_NEIGHBOURS]
    if names is not None:
        chosen = _checked_names(names, concepts)
    if not chosen:
        return None
    reading, name_of = plan_names(tokenizer, chosen, config)
    reading.check_positions([chosen[name] for name in name_of], positions_of(architecture.model))
    layers = config.layer_numbers
    states = read_layers(architecture, reading, max(layers), layers, progress=progress, stage="neighbours")
    keys = {layer: found.keys for layer, found in states.items() if found.keys is not None}
    return Neighbours(chosen, names is not None, name_of, keys)


def _checked_names(names: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"neighbours must be a list of names, not {repr(names)[:100]}.")
    check_names("neighbour", names)
    listed = {folded(name) for concept in concepts for name in concept.names}
    wrong = [name for name in names if folded(name) in listed]
    if wrong:
        shown = ", ".join(map(repr, wrong[:5]))
        raise InputError(f"{shown}: a neighbour that is itself to be unlearned cannot be kept; take it off one list.")
    return list(dict.fromkeys(names))


def part_moves(
    coefficients: Callable[[Tensor], Tensor], count: int, residuals: Tensor, concept_of: Sequence[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """How far each concept's part of an update moves outputs: |residualsᵀ a| over its own rows.

    The squared length is aᵀ (R Rᵀ) a with the few rows R of a concept, so that no output is ever formed.

    Args:
        coefficients: gives for rows of keys their coefficients a at m other keys, (rows, m).
        count: m.
        residuals: (n, d_out).
        concept_of: for each row, the index of its concept.

    Yields:
        Indices of some concepts, and their moves (concepts, m).
    """
    rows_of: dict[int, list[int]] = {}
    for row, concept in enumerate(concept_of):
        rows_of.setdefault(concept, []).append(row)
    longest = max(map(len, rows_of.values()))
    step = max(1, CHUNK_ENTRIES // (longest * max(residuals.shape[1], count)))
    concepts = list(rows_of)
    for start in range(0, len(concepts), step):
        chunk = concepts[start : start + step]
        rows = [row for concept in chunk for row in rows_of[concept]]
        places = [i * longest + j for i, concept in enumerate(chunk) for j in range(len(rows_of[concept]))]
        index = torch.tensor(rows, device=residuals.device)
        parts = residuals.new_zeros(len(chunk) * longest, residuals.shape[1])
        parts[places] = residuals[index]
        weights = coefficients(index).to(residuals)
        padded = weights.new_zeros(len(chunk) * longest, weights.shape[1])
        padded[places] = weights
        parts, padded = parts.view(len(chunk), longest, -1), padded.view(len(chunk), longest, -1)
        squares = (padded * (parts @ parts.mT @ padded)).sum(dim=1)
        yield chunk, squares.clamp(min=0).sqrt()
