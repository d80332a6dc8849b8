"""What an edit did, in numbers: how far each concept got, and how much the weights changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rocr.config import BY_COUNT, new_setting_name
from rocr.edit.collisions import Collisions
from rocr.edit.retain_impact import NeighbourReport
from rocr.edit.update import LayerUpdate
from rocr.io.json_values import list_of, numbers_of, object_of, text_of, whole_number_of
from rocr.solve.solve import CHUNK_ROWS, Solution

LEAST_WAY = 1e-3
"""Share of a concept's longest way below which a state is sent nowhere."""


@dataclass(frozen=True)
class LayerMeasures:
    """Numbers of one layer.

    Attributes:
        layer: the decoder layer.
        keys: number of keys, the largest possible rank of the update.
        metric: what protects ordinary keys.
        relative_norm: Frobenius norm of the update over that of the weight.
        closed: for each concept, the share of its residuals that the update closes at its own keys, 0 to 1.
        surviving: share of the weight's entries that the update changes after rounding to the weight's dtype.
        condition: condition number of the system that was solved, K M Kᵀ + λI.
        ridge: λ, in squared key units.
    """

    layer: int
    keys: int
    metric: str
    relative_norm: float
    closed: list[float]
    surviving: float
    condition: float
    ridge: float

    @classmethod
    def from_json(cls, values: dict[str, Any], concepts: int) -> LayerMeasures:
        """The numbers of a layer from JSON, for an edit of so many concepts; raises as `EditReport.from_json`."""
        measures = cls(**values)
        numbers_of(measures.closed, "closed", concepts)
        numbers_of([measures.relative_norm, measures.surviving, measures.condition, measures.ridge], "measures", 4)
        whole_number_of(measures.layer, "layer")
        whole_number_of(measures.keys, "keys")
        text_of(measures.metric, "metric")
        return measures


@dataclass
class EditReport:
    """Numbers of an edit.

    Attributes:
        layers: numbers of each edited layer, in order.
        distance: for each concept, how far the state at its name is from the target after the edit, as a share
            of the distance before, both at the output of the last edited layer; of concepts that were there
            before others were added or removed, as measured then.
        seconds: duration of each stage.
        statistics: what protected ordinary keys: text, tokens, dtype, length (`Statistics.summary`).
        divergence: mean Kullback-Leibler divergence on ordinary prose of the model's predictions after the edit from
            those before, in nats a token; None: not measured.
        limits_passed: a sentence for each limit of `Guards` that the edit passed and that was forced.
        collisions: concepts that get in each other's way; None: not measured.
        neighbours: what became of names that should stay; None: not measured.
        inexact: layers where this is not, to rounding, the edit made of these concepts from the start: concepts were
            added, removed or joined after keys and residuals had been measured there, or the number of concepts is
            now one for which other settings would be chosen.
        by_count: settings that were chosen by the number of concepts at first (`EditConfig.for_concepts`). They stay
            as they are recorded when concepts are added, removed or joined.
    """

    layers: list[LayerMeasures] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    divergence: float | None = None
    limits_passed: list[str] = field(default_factory=list)
    collisions: Collisions | None = None
    neighbours: NeighbourReport | None = None
    inexact: list[int] = field(default_factory=list)
    by_count: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; `by_count` is left out where it is empty, as in files of rocr 0.1."""
        return {name: value for name, value in asdict(self).items() if name != "by_count" or value}

    @classmethod
    def from_json(cls, values: dict[str, Any], concepts: int) -> EditReport:
        """The inverse of `to_json`, for an edit of so many concepts.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of a report.
        """
        layers = [LayerMeasures.from_json(layer, concepts) for layer in list_of(values["layers"], "layers")]
        report = cls(**{**values, "layers": layers})
        if report.collisions is not None:
            report.collisions = Collisions.from_json(values["collisions"])
        if report.neighbours is not None:
            report.neighbours = NeighbourReport.from_json(values["neighbours"])
        if report.distance:
            numbers_of(report.distance, "distance", concepts)
        if report.divergence is not None:
            numbers_of([report.divergence], "divergence", 1)
        numbers_of(list(object_of(report.seconds, "seconds").values()), "seconds", len(report.seconds))
        for layer in list_of(report.inexact, "inexact"):
            whole_number_of(layer, "inexact")
        report.by_count = [new_setting_name(name) for name in list_of(report.by_count, "by_count")]
        for name in report.by_count:
            if name not in BY_COUNT:
                raise ValueError(f"by_count names {repr(name)[:60]}")
        for sentence in list_of(report.limits_passed, "limits_passed"):
            text_of(sentence, "limits_passed")
        _check_statistics(object_of(report.statistics, "statistics"))
        return report


def _check_statistics(summary: dict[str, Any]) -> None:
    """Raise TypeError unless a value is what `Statistics.summary` gives, as far as its fields are there."""
    for name in ("tokens", "length"):
        if name in summary:
            whole_number_of(summary[name], name)
    for name in ("text", "dtype"):
        if name in summary:
            text_of(summary[name], name)


def measure_layer(
    update: LayerUpdate, weight_norm: float, concept_of: Sequence[int], metric: str, solution: Solution
) -> LayerMeasures:
    """Measure an update that has been applied.

    Args:
        update: the update, with what it did to the weight.
        weight_norm: Frobenius norm of the weight before it.
        concept_of: for each key, the index of its concept.
        metric: description of the metric.
        solution: what the update was solved from.
    """
    norm = update.factors.norm()
    undo = update.applied.undo if update.applied else None
    return LayerMeasures(
        layer=update.layer,
        keys=len(update.keys),
        metric=metric,
        relative_norm=norm / weight_norm if weight_norm else float("inf"),
        closed=_closed(update, concept_of),
        surviving=float((undo != 0).double().mean()) if undo is not None else float("nan"),
        condition=solution.condition,
        ridge=solution.ridge,
    )


def mean_by_concept(values: Tensor, concept_of: Sequence[int], ways: Tensor | None = None) -> list[float]:
    """Mean of the values (n,) of each concept's keys.

    Args:
        values: shares of the ways.
        concept_of: for each key, the index of its concept.
        ways: (n,) how far each key's state is sent; None: the same way. Keys that stay where they are but for rounding,
            as "Ada" of "Ada Byron" where the redirect is "Ada", are left out: there is no share of no way.
    """
    index = torch.tensor(concept_of)
    weights = torch.ones(len(index), dtype=torch.float64)
    if ways is not None:
        ways = ways.double().cpu()
        longest = torch.zeros(int(index.max()) + 1, dtype=torch.float64).scatter_reduce_(0, index, ways, "amax")
        weights = (ways >= LEAST_WAY * longest[index]).double()
    zeros = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    sums = zeros.index_add(0, index, values.double().cpu() * weights)
    return [float(mean) for mean in sums / zeros.index_add(0, index, weights)]


def _closed(update: LayerUpdate, concept_of: Sequence[int]) -> list[float]:
    """Share of each residual that the update covers: the projection of the move on it."""
    shares, ways = [], update.residuals.double().norm(dim=1)
    for start in range(0, len(update.keys), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        moved, wanted = update.factors.moves(update.keys[rows].double()), update.residuals[rows].double()
        shares.append((moved * wanted).sum(dim=1) / wanted.square().sum(dim=1).clamp(min=1e-30))
    return mean_by_concept(torch.cat(shares), concept_of, ways)
