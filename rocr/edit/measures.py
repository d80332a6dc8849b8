"""Measurements of an edit: how far each concept moves to its redirect, and how much the weights change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rocr.config import BY_COUNT, new_setting_name
from rocr.edit.collisions import Collisions
from rocr.edit.harm import Harm
from rocr.edit.retain_impact import RetainReport
from rocr.edit.routing import LayerRouting
from rocr.edit.update import LayerUpdate
from rocr.io.json_values import list_of, numbers_of, object_of, text_of, whole_number_of
from rocr.solve.solve import CHUNK_ROWS, Solution


@dataclass(frozen=True)
class LayerMeasures:
    """Measurements of one edited layer.

    Attributes:
        layer: Index of the decoder layer.
        keys: Number of keys, which is the largest possible rank of the update.
        metric: Description of the metric, which protects ordinary keys.
        relative_norm: Frobenius norm of the update over that of the weight.
        closed: For each concept, the share of its residuals that the update closes at its own keys, those of variants
            included. 1 closes all.
        surviving: Share of the weight's entries that the update changes after rounding to the dtype of the weight.
        condition: Condition number of the solved system, K M Kᵀ + λI.
        ridge: λ, in the units of squared keys.
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
        """Return measurements from JSON values, for an edit of this many concepts; raises as `EditReport.from_json`."""
        measures = cls(**values)
        numbers_of(measures.closed, "closed", concepts)
        numbers_of([measures.relative_norm, measures.surviving, measures.condition, measures.ridge], "measures", 4)
        whole_number_of(measures.layer, "layer")
        whole_number_of(measures.keys, "keys")
        text_of(measures.metric, "metric")
        return measures


@dataclass
class EditReport:
    """Measurements of an edit.

    Attributes:
        layers: Measurements of each edited layer, in ascending order.
        distance: For each concept, the distance of the states at its names from their targets after the edit, as a
            share of the distance before it, both at the output of the last edited layer; variants of the names do not
            count. When concepts are added, removed or merged, those already in the edit keep the value measured at
            first.
        seconds: Duration of each stage, in seconds.
        statistics: The statistics that protect ordinary keys: text, tokens, dtype, length (`Statistics.summary`).
        divergence: Mean Kullback-Leibler divergence of the model's predictions on ordinary prose after the edit from
            those before it, in nats per token. None if it was not measured.
        drift: Mean distance of a text encoder's last states on ordinary prose after the edit from those before it, as a
            share of their length. None for language models, for which `divergence` is measured.
        limits_passed: One sentence for each limit of `Guards` that the edit exceeds, which `Guards(force=True)` allows.
        collisions: Concepts that interfere with each other. None if they were not measured.
        retained: Impact on the retained names. None if it was not measured. Files and reports call it `neighbours`.
        inexact: Layers in which this edit differs, by more than rounding, from an edit made of its concepts at once:
            concepts were added, removed or merged after keys and residuals had been measured there, or the number of
            concepts is now one for which other settings are the default.
        by_count: Settings that were chosen by the number of concepts (`EditConfig.for_concepts`). They keep their
            recorded values when concepts are added, removed or merged.
        routing: For each edited layer with a mixture of experts, how the concepts are routed in it.
        harmed: Names that are not unlearned and about which the edited model answers otherwise, of the controls or the
            retained names that the edit moves most; the most harmed first. See `rocr.edit.harm`.
    """

    layers: list[LayerMeasures] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    divergence: float | None = None
    limits_passed: list[str] = field(default_factory=list)
    collisions: Collisions | None = None
    retained: RetainReport | None = None
    inexact: list[int] = field(default_factory=list)
    by_count: list[str] = field(default_factory=list)
    routing: list[LayerRouting] = field(default_factory=list)
    drift: float | None = None
    harmed: list[Harm] = field(default_factory=list)

    @property
    def neighbours(self) -> RetainReport | None:
        """The name of this attribute in rocr 0.1; same as `retained`."""
        return self.retained

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, with the field names of rocr 0.1.

        An empty `by_count`, `routing` or `harmed` and a `drift` of None are left out.
        """
        values = {("neighbours" if name == "retained" else name): value for name, value in asdict(self).items()}
        if self.retained is not None:
            values["neighbours"] = self.retained.to_json()
        return {
            name: value
            for name, value in values.items()
            if name not in ("by_count", "routing", "drift", "harmed") or value not in ([], None)
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], concepts: int) -> EditReport:
        """Return the inverse of `to_json`, for an edit of this many concepts.

        Raises:
            KeyError, TypeError, ValueError: The values are not those of a report.
        """
        values = dict(values)
        layers = [LayerMeasures.from_json(layer, concepts) for layer in list_of(values.pop("layers"), "layers")]
        retained = values.pop("neighbours", None)
        retained = None if retained is None else RetainReport.from_json(retained)
        routing = [LayerRouting.from_json(layer, concepts) for layer in list_of(values.pop("routing", []), "routing")]
        harmed = [Harm.from_json(harm) for harm in list_of(values.pop("harmed", []), "harmed")]
        report = cls(layers=layers, retained=retained, routing=routing, harmed=harmed, **values)
        if report.collisions is not None:
            report.collisions = Collisions.from_json(values["collisions"])
        if report.distance:
            numbers_of(report.distance, "distance", concepts)
        if report.divergence is not None:
            numbers_of([report.divergence], "divergence", 1)
        if report.drift is not None:
            numbers_of([report.drift], "drift", 1)
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
    """Raise TypeError unless each field of `Statistics.summary` that is present has its type."""
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
        update: The update, with the record of the applied change.
        weight_norm: Frobenius norm of the weight before the update.
        concept_of: For each key, the index of its concept.
        metric: Description of the metric.
        solution: The solution that gives the update.
    """
    norm = update.factors.norm()
    surviving = None if update.applied is None else update.applied.surviving
    return LayerMeasures(
        layer=update.layer,
        keys=len(update.keys),
        metric=metric,
        relative_norm=norm / weight_norm if weight_norm else float("inf"),
        closed=_closed(update, concept_of),
        surviving=float("nan") if surviving is None else surviving,
        condition=solution.condition,
        ridge=solution.ridge,
    )


def mean_by_concept(values: Tensor, concept_of: Sequence[int], weights: Tensor) -> list[float]:
    """Return the weighted mean of `values` over the keys of each concept; 0 if all of its weights are 0.

    Args:
        values: (n,) one value for each key.
        concept_of: For each key, the index of its concept.
        weights: (n,) the weight of each key, at least 0.
    """
    index, weights = torch.tensor(concept_of), weights.double().cpu()
    zeros = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    sums = zeros.index_add(0, index, values.double().cpu() * weights)
    return [float(mean) for mean in sums / zeros.index_add(0, index, weights).clamp(min=1e-300)]


def _closed(update: LayerUpdate, concept_of: Sequence[int]) -> list[float]:
    """Return for each concept the share of its residuals that the update closes: the projection of the move on them.

    Keys count by the square of their residual, times the weight of their row: with several keys, it is the projection
    of all moves side by side.
    """
    shares, squares = [], update.residuals.double().square().sum(dim=1)
    for start in range(0, len(update.keys), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        moved, wanted = update.factors.moves(update.keys[rows].double()), update.residuals[rows].double()
        shares.append((moved * wanted).sum(dim=1) / wanted.square().sum(dim=1).clamp(min=1e-30))
    return mean_by_concept(torch.cat(shares), concept_of, squares)
