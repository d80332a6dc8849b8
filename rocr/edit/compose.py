"""Compose edits: remove concepts from an edit, or merge two edits.

An edit holds for each layer its keys K, residuals R, the product K M and the ridge λ. An update is
Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M. For a subset of the rows, K M and K M Kᵀ are submatrices of those of all rows, so that
concepts are removed without statistics and without the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rocr.argument_checks import NAMES, check_kind, check_list
from rocr.concepts import Concept, check_concepts, folded
from rocr.config import BY_COUNT, EditConfig
from rocr.edit.apply import apply_edit, apply_updates, holds_updates, mismatch, replace_updates
from rocr.edit.collisions import find_collisions
from rocr.edit.measures import EditReport, LayerMeasures, measure_layer
from rocr.edit.record import AnEdit, EditRecord
from rocr.edit.retained_keys import JoinedKeys, of_remaining, rows_apart
from rocr.edit.update import LayerUpdate, with_same_parts
from rocr.edit.weight import edited_weights
from rocr.errors import InputError
from rocr.keys.prompts import RenderedTemplate
from rocr.keys.variants import same_variants_beside
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.fingerprint import Fingerprint
from rocr.solve.solve import RetainedRows, System, solve_again
from rocr.statistics.provenance import different
from rocr.statistics.statistics import Statistics

SAME_METRIC = 1e-3
"""Largest relative difference of K M between two edits with the same metric. Rounding causes about 1e-6, statistics
of another text about 1e-2."""
CHECKED_ROWS = 256
"""Number of keys at which the metrics of two edits are compared."""


def remove_concepts(edit: AnEdit, names: Sequence[str], model: nn.Module | None) -> AnEdit:
    """Remove concepts from an edit; see `Edit.remove`."""
    if not isinstance(names, str):
        check_list("names", names, str, NAMES)
    removed = _find(edit, [names] if isinstance(names, str) else names)
    remaining = [i for i in range(len(edit.concepts)) if i not in removed]
    if not remaining:
        raise InputError(f"All {len(edit.concepts)} concepts would be removed. To remove all, revert the edit instead.")
    rows = [row for row, concept in enumerate(edit.concept_of) if concept not in removed]
    new_index = {old: new for new, old in enumerate(remaining)}
    concepts = [edit.concepts[i] for i in remaining]
    concept_of = [new_index[edit.concept_of[row]] for row in rows]
    distance = [edit.report.distance[i] for i in remaining] if edit.report.distance else []
    differ = not same_variants_beside(concepts, [edit.concepts[i] for i in sorted(removed)], edit.config)
    retained = of_remaining(edit.retained, new_index)
    parts = [_rows(update, rows, list(retained)) for update in edit.updates]
    solved = _solved(replace(edit, retained=tuple(retained.values())), concepts, concept_of, parts, distance, differ)
    blocks = {update.layer: update.blocks for update in solved.updates}
    solved.report.routing = [
        layer.of_concepts(concepts, remaining, blocks[layer.layer]) for layer in edit.report.routing
    ]
    return _replace_edit(edit, solved, model)


def merge_edits(edit: AnEdit, other: EditRecord, model: nn.Module | None) -> AnEdit:
    """Merge two edits of one model; see `Edit.merge`."""
    check_kind("other", other, EditRecord, "a rocr.Edit")
    check_concepts([*edit.concepts, *other.concepts])
    _check_mergeable(edit, other)
    pairs = [with_same_parts(*pair) for pair in zip(edit.updates, other.updates, strict=True)]
    retained = JoinedKeys.of(edit, other)
    parts = [_joined(mine, theirs, retained) for mine, theirs in pairs]
    concept_of = [*edit.concept_of, *(len(edit.concepts) + concept for concept in other.concept_of)]
    distance = edit.report.distance + other.report.distance
    # A default that depends on the number of concepts in one of the edits also depends on the number in the merged one.
    by_count = [name for name in BY_COUNT if name in (*edit.report.by_count, *other.report.by_count)]
    base = replace(edit, report=replace(edit.report, by_count=by_count), retained=retained.labels)
    pairs_of_lists = ((edit.concepts, other.concepts), (other.concepts, edit.concepts))
    differ = not all(same_variants_beside(*lists, edit.config) for lists in pairs_of_lists)
    merged = _solved(base, [*edit.concepts, *other.concepts], concept_of, parts, distance, differ)
    blocks = {update.layer: update.blocks for update in merged.updates}
    merged.report.routing = [
        mine.joined(theirs, blocks[mine.layer])
        for mine, theirs in zip(edit.report.routing, other.report.routing, strict=False)
    ]
    return _replace_edit(edit, merged, model)


def inexact_layers(
    config: EditConfig, by_count: Sequence[str], count: int, layers: Sequence[int], variants_differ: bool = False
) -> list[int]:
    """Return the layers in which a changed edit differs, by more than rounding, from one made of its concepts at once.

    These are all layers if the defaults for the new number of concepts differ from the settings of the edit, which
    are kept, or if the concepts at once have other spelling variants. Otherwise, with `measure="each"`, they are all
    layers but the first, since the keys and residuals of the later ones were measured in a model in which other
    concepts were already redirected. The edit does not hold what they would be without those concepts: that needs a
    pass through the model.

    Args:
        config: Settings of the edit.
        by_count: Names of the settings that were chosen by the number of concepts.
        count: Number of concepts after the change.
        layers: The edited layers, ascending.
        variants_differ: Whether concepts have other variants beside the others than without them, see
            `rocr.keys.variants.same_variants_beside`.
    """
    fresh = replace(config, **dict.fromkeys(by_count)).for_concepts(count)  # type: ignore[arg-type]
    if fresh != config or variants_differ:
        return list(layers)
    return list(layers[1:]) if config.measure == "each" else []


def check_base_edit(
    base_edit: EditRecord, config: EditConfig, architecture: Architecture, mark: Fingerprint, statistics: Statistics
) -> None:
    """Check that concepts are added with the model, settings and statistics of the edit that they are added to.

    Raises:
        InputError: One of them differs.
    """
    differs = mismatch(base_edit, architecture.model)
    if differs is not None:
        raise InputError(differs)
    if mark.tokenizer != base_edit.fingerprint.tokenizer:
        raise InputError(f"The edit was made for {base_edit.fingerprint}, but this model is {mark}.")
    if config != base_edit.config:
        raise InputError("Concepts can only be added with the settings of the edit. Pass the config of the edit.")
    recorded, given = base_edit.report.statistics, statistics.summary()
    if any(recorded[name] != given[name] for name in recorded.keys() & given.keys()):
        raise InputError(
            f"The edit was made with statistics of {_listed(recorded)}, but these are of {_listed(given)}. Pass the "
            "statistics that the edit was made with."
        )


def check_rendered(kept: Sequence[RenderedTemplate], rendered: Sequence[RenderedTemplate], renderer: str) -> None:
    """Check that templates are rendered as those of an edit. An edit without rendered templates passes.

    Args:
        kept: The templates as the edit renders them.
        rendered: The same templates as they are rendered now.
        renderer: What renders them now, for the message.

    Raises:
        InputError: They differ.
    """
    for old, new in zip(kept, rendered, strict=False):
        if old != new:
            raise InputError(
                f"The edit was made with a template that reads {repr(old.before)[-200:]} before a name and "
                f"{repr(old.after)[:200]} after it, but {renderer} gives {repr(new.before)[-200:]} and "
                f"{repr(new.after)[:200]}. Use the chat template and the chat settings that the edit was made with."
            )


def _listed(summary: Mapping[str, Any]) -> str:
    """Return names and values as a list for a sentence."""
    return ", ".join(f"{name} {value}" for name, value in summary.items())


def _find(edit: AnEdit, names: Sequence[str]) -> set[int]:
    """Return the indices of concepts that are given by their names or aliases."""
    owners = {folded(name): i for i, concept in enumerate(edit.concepts) for name in concept.names}
    missing = [name for name in names if folded(name) not in owners]
    if missing or not names:
        held = ", ".join(concept.name for concept in edit.concepts[:10])
        more = f" and {len(edit.concepts) - 10} more" if len(edit.concepts) > 10 else ""
        raise InputError(
            f"The edit holds no {', '.join(map(repr, missing)) or 'such concept'}: it holds {held}{more}. Give "
            "a name or an alias of these."
        )
    return {owners[folded(name)] for name in names}


def _rows(update: LayerUpdate, rows: Sequence[int], retained: list[int]) -> LayerUpdate:
    """Return a layer's update with the given rows of its keys, residuals and system; it keeps the old factors."""
    system = _system(update)
    if system.product is not None:
        system = replace(system, product=system.product[rows])
    system = replace(system, retained=_retained_rows(system, retained))
    return replace(update, keys=update.keys[rows], residuals=update.residuals[rows], system=system, applied=None)


def _retained_rows(system: System, rows: list[int]) -> RetainedRows | None:
    """Return some of the rows of retained names of a system; None for none."""
    return system.retained.of(torch.tensor(rows)) if system.retained is not None and rows else None


def _joined(mine: LayerUpdate, theirs: LayerUpdate, retained: JoinedKeys) -> LayerUpdate:
    """Return a layer's update with the keys, residuals and system of two edits; it keeps the first one's factors."""
    first, second = _system(mine), _system(theirs)
    metric = first.metric or second.metric
    product = None
    if metric is None:
        assert first.product is not None and second.product is not None, "a system has a product or a metric"
        product = torch.cat([first.product, second.product.to(first.product)])
    pieces = [_retained_rows(first, retained.rows), _retained_rows(second, retained.other_rows)]
    present = [piece for piece in pieces if piece is not None]
    rows = present[0].joined(present[1]) if len(present) == 2 else next(iter(present), None)
    return replace(
        mine,
        keys=torch.cat([mine.keys, theirs.keys.to(mine.keys)]),
        residuals=torch.cat([mine.residuals, theirs.residuals.to(mine.residuals)]),
        system=System(first.ridge, product, metric, rows, first.support),
        applied=None,
    )


def _solved(
    edit: AnEdit,
    concepts: list[Concept],
    concept_of: list[int],
    parts: Sequence[LayerUpdate],
    distance: list[float],
    variants_differ: bool,
) -> AnEdit:
    """Solve the systems of an edit with the given concepts and return it, not applied yet."""
    updates, measures = [], []
    used = _used(parts[0])
    for old, part, measured in zip(edit.updates, parts, edit.report.layers, strict=True):
        assert part.system is not None
        solution = solve_again(part.keys, part.residuals, part.system, used)
        update = replace(part, factors=solution.factors, system=solution.system)
        weight_norm = old.factors.norm() / measured.relative_norm if measured.relative_norm else 0.0
        updates.append(update)
        measures.append(measure_layer(update, weight_norm, concept_of, measured.metric, solution))
    report = EditReport(
        layers=measures,
        distance=distance,
        statistics=edit.report.statistics,
        collisions=find_collisions(concepts, concept_of, updates[0]),
        inexact=inexact_layers(edit.config, edit.report.by_count, len(concepts), edit.layers, variants_differ),
        by_count=edit.report.by_count,
    )
    return dataclasses.replace(edit, concepts=concepts, concept_of=concept_of, updates=updates, report=report)


def _used(first: LayerUpdate) -> Tensor | None:
    """Return the mask of the rows of retained names that take part in the solve, from the first layer's update."""
    assert first.system is not None
    return None if first.system.retained is None else rows_apart(first.system.retained.keys, first.keys)


def _replace_edit(old: AnEdit, new: AnEdit, model: nn.Module | None) -> AnEdit:
    """Apply the new edit to a model, in place of the old one if that is applied; return the new edit."""
    if model is None:
        return new
    architecture = find_architecture(model)
    held, weights = edited_weights(architecture, old.updates), edited_weights(architecture, new.updates)
    if not holds_updates(held, [update.applied for update in old.updates]):
        apply_edit(new, model)
    else:
        factors = [update.factors for update in new.updates]
        replace_updates(
            held,
            [update.applied for update in old.updates],
            lambda: apply_updates(weights, factors, new.set_applied),
        )
    new.report.layers = [_with_surviving(*pair) for pair in zip(new.report.layers, new.updates, strict=True)]
    return new


def _with_surviving(measures: LayerMeasures, update: LayerUpdate) -> LayerMeasures:
    """Return the measures with the share of entries changed, which is known after the update is applied."""
    surviving = update.applied.surviving if update.applied else None
    return measures if surviving is None else replace(measures, surviving=surviving)


def _check_mergeable(edit: AnEdit, other: EditRecord) -> None:
    """Raise InputError unless two edits were made on the same unedited model with the same settings and statistics."""
    marks = (edit.fingerprint, other.fingerprint)
    if len({(mark.model, mark.layer, mark.tokenizer) for mark in marks}) > 1:
        raise InputError(
            f"The edits were made for different models, or with statistics up to different layers: {marks[0]} and "
            f"{marks[1]}. Make both for the same model, with the same statistics."
        )
    one, another = different(edit.computed_with, other.computed_with)
    if one:
        raise InputError(
            f"The edits were made for models of the same weights, one with {one}, one with {another}. Make both with "
            "the same settings of the model."
        )
    check_rendered(edit.rendered, other.rendered, "the other edit's tokenizer")
    if edit.config != other.config or edit.layers != other.layers:
        raise InputError(
            f"The edits were made with different settings{_differing(edit.config, other.config)}. Make one of them "
            "with the settings of the other."
        )
    for mine, theirs in zip(edit.updates, other.updates, strict=True):
        if None not in (mine.base, theirs.base) and mine.blocks == theirs.blocks and mine.base != theirs.base:
            raise InputError(
                f"The edits were measured with different weights {mine.parameter}: one was made in a model that "
                "carried another edit, or in another dtype. Make both on the unedited model in one dtype, or use "
                "`Edit.add` for the concepts."
            )
        mine, theirs = with_same_parts(mine, theirs)
        first, second = _system(mine), _system(theirs)
        difference = max(abs(first.ridge / second.ridge - 1), _difference(mine, theirs, first, second))
        if difference > SAME_METRIC:
            raise InputError(
                f"The edits protect ordinary keys of layer {mine.layer} differently (by {difference:.2g}): they were "
                "made with different statistics. Make one of them with the statistics of the other."
            )


def _differing(config: EditConfig, other: EditConfig) -> str:
    """Return the settings that differ, such as ": variants none and spelling"; templates and chat only by name."""
    names = [
        field.name
        for field in dataclasses.fields(EditConfig)
        if getattr(config, field.name) != getattr(other, field.name)
    ]
    pairs = [
        name if name in ("templates", "chat") else f"{name} {getattr(config, name)} and {getattr(other, name)}"
        for name in names
    ]
    return f": {', '.join(pairs)}" if pairs else ""


def _difference(mine: LayerUpdate, theirs: LayerUpdate, first: System, second: System) -> float:
    """Return the relative difference of two metrics: of (K₁ M₁) K₂ᵀ and K₁ (K₂ M₂)ᵀ, which are equal if M₁ = M₂."""
    ours, others = _product(mine, first), _product(theirs, second)
    keys, other_keys = mine.keys[:CHECKED_ROWS].double(), theirs.keys[:CHECKED_ROWS].to(mine.keys).double()
    here, there = ours @ other_keys.T, keys @ others.to(ours).T
    return float((here - there).norm() / here.norm().clamp(min=1e-300))


def _product(update: LayerUpdate, system: System) -> Tensor:
    """Return K M of the first keys, float64."""
    if system.product is not None:
        return system.product[:CHECKED_ROWS].double()
    assert system.metric is not None
    return system.metric.apply(update.keys[:CHECKED_ROWS]).double()


def _system(update: LayerUpdate) -> System:
    """Return the system of an update; raise InputError if it was not kept."""
    if update.system is None:
        raise InputError(
            f"The edit of {update.parameter} was saved without its system and cannot be changed. Make it again."
        )
    return update.system
