"""Compose edits: remove concepts from one, or merge two.

An edit keeps, for each layer, its keys K, residuals R, the product K M and the ridge λ. Every update is
Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M, and both K M Kᵀ and K M of some of the rows are parts of those of all: a change needs
neither statistics nor, where concepts only leave, the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rocr.concepts import Concept, check_concepts, folded
from rocr.config import BY_COUNT, EditConfig
from rocr.edit.apply import apply_edit, apply_updates, down_projections, holds_updates, mismatch, put_in_place_of
from rocr.edit.collisions import find_collisions
from rocr.edit.measures import EditReport, LayerMeasures, measure_layer
from rocr.edit.record import AnEdit, EditRecord
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
from rocr.keys.prompts import RenderedTemplate
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.fingerprint import Fingerprint
from rocr.solve.solve import System, solve_again
from rocr.statistics.provenance import different
from rocr.statistics.statistics import Statistics

SAME_METRIC = 1e-3
"""Largest relative difference of K M from two runs with one metric; rounding makes 1e-6, another text 1e-2."""
CHECKED_ROWS = 256


def remove_concepts(edit: AnEdit, names: Sequence[str], model: nn.Module | None) -> AnEdit:
    """Take concepts out of an edit; see `Edit.remove`."""
    left_out = _find(edit, [names] if isinstance(names, str) else names)
    stay = [i for i in range(len(edit.concepts)) if i not in left_out]
    if not stay:
        raise InputError(f"All {len(edit.concepts)} concepts would be removed; revert the edit instead.")
    rows = [row for row, concept in enumerate(edit.concept_of) if concept not in left_out]
    place = {concept: i for i, concept in enumerate(stay)}
    parts = [_rows(update, rows) for update in edit.updates]
    changed = _solved(
        edit, [edit.concepts[i] for i in stay], [place[edit.concept_of[row]] for row in rows], parts, _kept(edit, stay)
    )
    return _put_in_place(edit, changed, model)


def merge_edits(edit: AnEdit, other: EditRecord, model: nn.Module | None) -> AnEdit:
    """Join two edits of one model; see `Edit.merge`."""
    check_concepts([*edit.concepts, *other.concepts])
    _check_mergeable(edit, other)
    parts = [_joined(mine, theirs) for mine, theirs in zip(edit.updates, other.updates, strict=True)]
    concept_of = [*edit.concept_of, *(len(edit.concepts) + concept for concept in other.concept_of)]
    distance = edit.report.distance + other.report.distance
    # What the number of concepts chose in either would be chosen anew for all, whichever comes first.
    by_count = [name for name in BY_COUNT if name in (*edit.report.by_count, *other.report.by_count)]
    joined = replace(edit, report=replace(edit.report, by_count=by_count))
    changed = _solved(joined, [*edit.concepts, *other.concepts], concept_of, parts, distance)
    return _put_in_place(edit, changed, model)


def inexact_layers(config: EditConfig, by_count: Sequence[str], count: int, layers: Sequence[int]) -> list[int]:
    """The layers where a changed edit is not to rounding the one made of its concepts from the start.

    These are all layers where the number of concepts would now choose other settings than those of the edit, which
    stay. Else, with `measure="each"`, they are all but the first: keys and residuals there were measured in a model
    in which other concepts were redirected already. What they would have been without is nowhere stored: it takes a
    pass through the model, and new keys take the statistics again.

    Args:
        config: the edit's settings.
        by_count: names of those that the number of concepts chose at first.
        count: the number of concepts after the change.
        layers: the edited layers, ascending.
    """
    fresh = replace(config, **dict.fromkeys(by_count)).for_concepts(count)  # type: ignore[arg-type]
    if fresh != config:
        return list(layers)
    return list(layers[1:]) if config.measure == "each" else []


def check_base_edit(
    base_edit: EditRecord, config: EditConfig, architecture: Architecture, mark: Fingerprint, statistics: Statistics
) -> None:
    """Make sure that concepts are added with the model, settings and statistics of the edit they are added to.

    Raises:
        InputError: something differs; names both sides.
    """
    differs = mismatch(base_edit, architecture.model)
    if differs is not None:
        raise InputError(differs)
    if mark.tokenizer != base_edit.fingerprint.tokenizer:
        raise InputError(f"The edit was made for {base_edit.fingerprint}, but this model is {mark}.")
    if config != base_edit.config:
        raise InputError("Concepts can only be added with the settings of the edit they are added to.")
    recorded, given = base_edit.report.statistics, statistics.summary()
    if any(recorded[name] != given[name] for name in recorded.keys() & given.keys()):
        raise InputError(
            f"The edit was made with statistics of {_listed(recorded)}, but these are of {_listed(given)}."
        )


def check_rendered(kept: Sequence[RenderedTemplate], rendered: Sequence[RenderedTemplate], whose: str) -> None:
    """Make sure that templates are read as those of an edit were; where it does not say how, nothing can be told.

    Args:
        kept: the templates as the edit's model read them.
        rendered: the same templates now.
        whose: what renders them now, for the message.

    Raises:
        InputError: they differ; names both.
    """
    for old, new in zip(kept, rendered, strict=False):
        if old != new:
            raise InputError(
                f"The edit was made with a template that reads {repr(old.before)[-200:]} before a name and "
                f"{repr(old.after)[:200]} behind it, but {whose} gives {repr(new.before)[-200:]} and "
                f"{repr(new.after)[:200]}. Use the chat template and the chat settings that the edit was made with."
            )


def _listed(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in summary.items())


def _find(edit: AnEdit, names: Sequence[str]) -> set[int]:
    """Indices of the concepts that are named, by their names or aliases."""
    owners = {folded(name): i for i, concept in enumerate(edit.concepts) for name in concept.names}
    missing = [name for name in names if folded(name) not in owners]
    if missing or not names:
        held = ", ".join(concept.name for concept in edit.concepts[:10])
        more = f" and {len(edit.concepts) - 10} more" if len(edit.concepts) > 10 else ""
        raise InputError(f"The edit holds no {', '.join(map(repr, missing)) or 'such concept'}: it holds {held}{more}.")
    return {owners[folded(name)] for name in names}


def _kept(edit: AnEdit, stay: Sequence[int]) -> list[float]:
    return [edit.report.distance[i] for i in stay] if edit.report.distance else []


def _rows(update: LayerUpdate, rows: Sequence[int]) -> LayerUpdate:
    """The part of a layer's system that belongs to some keys."""
    system = _system(update)
    if system.product is not None:
        system = replace(system, product=system.product[rows])
    return replace(update, keys=update.keys[rows], residuals=update.residuals[rows], system=system, applied=None)


def _joined(mine: LayerUpdate, theirs: LayerUpdate) -> LayerUpdate:
    """One layer's system of the keys of two edits."""
    first, second = _system(mine), _system(theirs)
    metric = first.metric or second.metric
    product = None
    if metric is None:
        assert first.product is not None and second.product is not None, "a system holds a product or a metric"
        product = torch.cat([first.product, second.product.to(first.product)])
    return replace(
        mine,
        keys=torch.cat([mine.keys, theirs.keys.to(mine.keys)]),
        residuals=torch.cat([mine.residuals, theirs.residuals.to(mine.residuals)]),
        system=System(first.ridge, product, metric),
        applied=None,
    )


def _solved(
    edit: AnEdit, concepts: list[Concept], concept_of: list[int], parts: Sequence[LayerUpdate], distance: list[float]
) -> AnEdit:
    """The edit of some concepts, solved from its systems and not applied yet."""
    updates, measures = [], []
    for old, part, measured in zip(edit.updates, parts, edit.report.layers, strict=True):
        assert part.system is not None
        solution = solve_again(part.keys, part.residuals, part.system)
        update = replace(part, factors=solution.factors, system=solution.system)
        weight_norm = old.factors.norm() / measured.relative_norm if measured.relative_norm else 0.0
        updates.append(update)
        measures.append(measure_layer(update, weight_norm, concept_of, measured.metric, solution))
    report = EditReport(
        layers=measures,
        distance=distance,
        statistics=edit.report.statistics,
        collisions=find_collisions(concepts, concept_of, updates[0]),
        inexact=inexact_layers(edit.config, edit.report.by_count, len(concepts), edit.layers),
        by_count=edit.report.by_count,
    )
    return dataclasses.replace(edit, concepts=concepts, concept_of=concept_of, updates=updates, report=report)


def _put_in_place(old: AnEdit, new: AnEdit, model: nn.Module | None) -> AnEdit:
    """Give a model that carries the old edit the new one; without a model, only return it."""
    if model is None:
        return new
    projections = down_projections(find_architecture(model), new.updates)
    if not holds_updates(projections, [update.applied for update in old.updates]):
        apply_edit(new, model)
        return _with_survival(new)
    factors = [update.factors for update in new.updates]
    put_in_place_of(
        projections,
        [update.applied for update in old.updates],
        lambda: apply_updates(projections, factors, new.keep),
    )
    return _with_survival(new)


def _with_survival(edit: AnEdit) -> AnEdit:
    """The edit with the share of entries changed, which is known once it is applied."""

    def measured(layer: LayerMeasures, update: LayerUpdate) -> LayerMeasures:
        undo = update.applied.undo if update.applied else None
        return layer if undo is None else replace(layer, surviving=float((undo != 0).double().mean()))

    edit.report.layers = [measured(*pair) for pair in zip(edit.report.layers, edit.updates, strict=True)]
    return edit


def _check_mergeable(edit: AnEdit, other: EditRecord) -> None:
    marks = (edit.fingerprint, other.fingerprint)
    if len({(mark.model, mark.layer, mark.tokenizer) for mark in marks}) > 1:
        raise InputError(
            f"The edits were made for two models, or with statistics up to different layers: {marks[0]} and {marks[1]}."
        )
    one, another = different(edit.computed_with, other.computed_with)
    if one:
        raise InputError(f"The edits were made for models of the same weights, one with {one}, one with {another}.")
    check_rendered(edit.rendered, other.rendered, "the other edit's tokenizer")
    if edit.config != other.config or edit.layers != other.layers:
        raise InputError("The edits were made with different settings; make one with the settings of the other.")
    for mine, theirs in zip(edit.updates, other.updates, strict=True):
        if None not in (mine.base, theirs.base) and mine.base != theirs.base:
            raise InputError(
                f"The edits were measured with different weights {mine.parameter}: one was made in a model that "
                "carried another edit, or in another dtype. Make both on the unedited model, or `add` the concepts."
            )
        first, second = _system(mine), _system(theirs)
        difference = max(abs(first.ridge / second.ridge - 1), _difference(mine, theirs, first, second))
        if difference > SAME_METRIC:
            raise InputError(
                f"The edits protect ordinary keys of layer {mine.layer} differently (by {difference:.2g}): they were "
                "made with different statistics. Make one with the statistics of the other."
            )


def _difference(mine: LayerUpdate, theirs: LayerUpdate, first: System, second: System) -> float:
    """How far two metrics differ on each other's keys: K₁ (K₂ M₂)ᵀ should be (K₁ M₁) K₂ᵀ."""
    ours, others = _product(mine, first), _product(theirs, second)
    keys, other_keys = mine.keys[:CHECKED_ROWS].double(), theirs.keys[:CHECKED_ROWS].to(mine.keys).double()
    here, there = ours @ other_keys.T, keys @ others.to(ours).T
    return float((here - there).norm() / here.norm().clamp(min=1e-300))


def _product(update: LayerUpdate, system: System) -> Tensor:
    if system.product is not None:
        return system.product[:CHECKED_ROWS].double()
    assert system.metric is not None
    return system.metric.apply(update.keys[:CHECKED_ROWS]).double()


def _system(update: LayerUpdate) -> System:
    if update.system is None:
        raise InputError(f"The edit of {update.parameter} was saved without what it could be solved from again.")
    return update.system
