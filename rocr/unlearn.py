"""ROCR (Ye, Zhang and Wu, arXiv 2506.07795) for many concepts at once, in closed form.

For each edited layer with weight W (d_out, d_in), rows being samples:

    keys       K (n, d_in)     inputs of the down-projection at the tokens of the concepts' names
    residuals  R (n, d_out)    what the output at each key lacks on the way to its target
    metric     M (d_in, d_in)  from the second moment of ordinary keys, which it protects
    update     Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M, added to W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocr.concepts import Concept, check_concepts, check_length
from rocr.config import EditConfig
from rocr.edit.apply import apply_updates, down_projections, put_in_place_of, take_back
from rocr.edit.collisions import find_collisions
from rocr.edit.compose import check_base_edit, check_rendered, inexact_layers
from rocr.edit.edit import Edit
from rocr.edit.guards import (
    Guards,
    Predictions,
    check_closed,
    check_distance,
    check_layer,
    check_predictions,
    predict,
    with_closest,
    with_culprits,
)
from rocr.edit.measures import EditReport, mean_by_concept, measure_layer
from rocr.edit.retain_impact import Neighbours, read_neighbours
from rocr.edit.update import Applied, LayerUpdate
from rocr.io.dtypes import dtype_name
from rocr.keys.plan import KeyPlan, Reading, plan_keys
from rocr.keys.read import States, read_layers, read_states
from rocr.model.architecture import Architecture, DownProjection, find_architecture, positions_of
from rocr.model.causality import check_causal
from rocr.model.chat import with_date
from rocr.model.fingerprint import Fingerprint, down_projection_digests, fingerprint
from rocr.model.gains import divide_by_gains, layers_with_gain
from rocr.model.layers import check_moments, resolve_layers
from rocr.model.tensor_parallel import whole
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, Stopwatch, silent
from rocr.solve.metric import build_metric
from rocr.solve.solve import Solution, check_finite, solve_layer
from rocr.statistics.collect import CollectOptions, collect_statistics
from rocr.statistics.provenance import computed_with
from rocr.statistics.statistics import Statistics


def unlearn(
    model: nn.Module,
    tokenizer: Any,
    concepts: Sequence[Concept],
    statistics: Statistics | None = None,
    config: EditConfig | None = None,
    progress: ProgressCallback = silent,
    guards: Guards | None = None,
    base_edit: Edit | None = None,
    neighbours: Sequence[str] | None = None,
) -> Edit:
    """Redirect concepts in a model, in place: where it reads one, it perceives the redirect instead.

    Args:
        model: A causal language model of transformers with dense MLPs.
        tokenizer: Its tokenizer.
        concepts: What to redirect to what.
        statistics: Second moments of ordinary keys at the edited layers. None collects them from text that the model
            writes itself.
        config: The settings. None is `EditConfig()`.
        progress: Called with the progress of each stage.
        guards: The limits that the edit must stay within. None is `Guards()`.
        base_edit: An edit whose concepts stay redirected, from the keys and residuals that it holds. The model must
            be without it; `Edit.add` takes care of that.
        neighbours: Names that should stay, to measure what the edit does to them. None measures the redirects.

    Returns:
        The edit, which is applied to the model. After any exception the model has its first weights, bit for bit.

    Raises:
        InputError: Concepts, settings, statistics or model do not fit together.
        GuardError: Keys, states or weights are not finite, or the edit exceeds a limit; names the concepts.

    Source:
        Ye, Zhang and Wu, "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795, section 4.
    """
    updates: list[LayerUpdate] = []  # every update that a weight carries
    guards = guards or Guards()
    try:
        with plain_arithmetic():
            task = _plan(model, tokenizer, concepts, config, guards, base_edit)
            statistics = statistics or _collect(model, tokenizer, task.config, progress)
            origin = _check_statistics(task, tokenizer, statistics)
            report = _begin_report(task, statistics)
            timed = Stopwatch(report.seconds)
            architecture, layers, all_concepts, concept_of = (
                task.architecture,
                task.layers,
                task.all_concepts,
                task.concept_of,
            )

            with timed("targets"):
                reader = _Reader(task, progress, layers_with_gain(architecture, layers))
                targets = reader.targets()
            with timed("keys"):
                template_keys = reader.template_keys()
                readings = reader.keys(layers if task.config.measure == "once" else layers[:1])
                goals = _Goals.of(targets, readings[layers[0]].hidden, task)
            retained = read_neighbours(architecture, tokenizer, all_concepts, neighbours, task.config, progress)
            with timed("check"):
                predictions = predict(architecture, tokenizer)

            for i, layer in enumerate(layers):
                projection = architecture.down_projection(layer)
                with timed("keys"):
                    states = readings[layer] if layer in readings else reader.keys([layer])[layer]
                    keys, residuals = _keys_and_residuals(task, layer, states, goals, layers_left=len(layers) - i)
                with timed("metric"):
                    moment = statistics.second_moment(layer).to(keys.device)
                    metric = build_metric(moment, task.config, template_keys.get(layer))
                with timed("solve"), with_closest(keys, concept_of, all_concepts):
                    ridge = task.config.ridge * (metric.ordinary if task.config.relative_ridge else 1.0)
                    solution = solve_layer(keys, residuals, metric, ridge)
                    update = LayerUpdate.solved(projection, keys, residuals, solution)
                with timed("compare"):
                    _compare(task, projection, update, solution, retained, report)
                with timed("apply"), with_culprits(update, concept_of, all_concepts):
                    weight_norm = float(whole(projection.weight).float().norm())
                    apply_updates([projection], [update.factors], partial(_record, updates, update))
                with timed("measure"):
                    measures = measure_layer(updates[-1], weight_norm, concept_of, metric.describe(), solution)
                    report.layers.append(measures)
                report.limits_passed += check_layer(guards, measures, updates[-1], concept_of, all_concepts)
                progress(Progress("edit", i + 1, len(layers), "layers"))

            with timed("measure"):
                distance = goals.distance(reader.states_after_edit(), task)
            with timed("check"):
                _check_edit(task, guards, updates, predictions, distance, report)
            report.distance = _with_distance_of_base(task, distance)
            if retained is not None:
                report.neighbours = retained.report([concept.name for concept in all_concepts])
            settings = computed_with(model)
            return Edit(all_concepts, task.config, origin, updates, concept_of, report, settings, task.plan.rendered)
    except BaseException:
        # Here and not in a context: an interruption at a context's own exit would miss it.
        if updates:
            take_back(task.architecture, updates)
        raise


def add_concepts(
    edit: Edit,
    concepts: Sequence[Concept],
    model: nn.Module,
    tokenizer: Any,
    statistics: Statistics,
    progress: ProgressCallback = silent,
    guards: Guards | None = None,
) -> Edit:
    """Add concepts to an edit and apply the result in its place; see `Edit.add`."""
    # A file that records no date was made with the default one.
    edit = replace(edit, config=replace(edit.config, chat=with_date(edit.config.chat, tokenizer)))
    projections = down_projections(find_architecture(model), edit.updates)
    return put_in_place_of(
        projections,
        [update.applied for update in edit.updates],
        lambda: unlearn(model, tokenizer, concepts, statistics, edit.config, progress, guards, base_edit=edit),
    )


@dataclass(frozen=True)
class _Task:
    """What is unlearned from which model.

    Attributes:
        architecture: The model's decoder layers and down-projections.
        concepts: The new concepts.
        config: The settings, with nothing left to be chosen.
        by_count: Names of the settings that the number of concepts chose.
        plan: Which tokens of which prompts are read.
        base_edit: An edit whose concepts stay redirected; None where there is none.
    """

    architecture: Architecture
    concepts: list[Concept]
    config: EditConfig
    by_count: list[str]
    plan: KeyPlan
    base_edit: Edit | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to edit, ascending."""
        return self.config.layers or ()

    @property
    def all_concepts(self) -> list[Concept]:
        """The concepts of the base edit, then the new ones."""
        return [*self.base_edit.concepts, *self.concepts] if self.base_edit else self.concepts

    @property
    def concept_of(self) -> list[int]:
        """For each key, of the base edit or new, the index of its concept in `all_concepts`."""
        if self.base_edit is None:
            return self.plan.concept_of
        offset = len(self.base_edit.concepts)
        return [*self.base_edit.concept_of, *(offset + concept for concept in self.plan.concept_of)]

    def check_finite(self, what: str, layer: int, values: Tensor) -> None:
        """Raise GuardError, with the concepts' names, unless values (n, features) of the new keys are finite."""
        check_finite(what, layer, values, self.plan.concept_of, self.concepts)


def _plan(
    model: nn.Module,
    tokenizer: Any,
    concepts: Sequence[Concept],
    config: EditConfig | None,
    guards: Guards,
    base_edit: Edit | None,
) -> _Task:
    """Settle the settings and decide which tokens become keys; check all of it before anything is read."""
    concepts = list(concepts)
    everything = [*base_edit.concepts, *concepts] if base_edit else concepts
    check_length(len(everything), guards.concepts)
    check_concepts(everything)
    config = config or (base_edit.config if base_edit else EditConfig())
    by_count = base_edit.report.by_count if base_edit else config.left_to_the_count()
    architecture = find_architecture(model)
    config = resolve_layers(config.for_concepts(len(concepts)), architecture)
    config = replace(config, chat=with_date(config.chat, tokenizer))
    plan = plan_keys(tokenizer, concepts, config)
    if base_edit is not None:
        check_rendered(base_edit.rendered, plan.rendered, "the tokenizer now")
    plan.check_positions(concepts, positions_of(model))
    plan.check_ways(concepts)
    return _Task(architecture, concepts, config, by_count, plan, base_edit)


def _collect(model: nn.Module, tokenizer: Any, config: EditConfig, progress: ProgressCallback) -> Statistics:
    """Collect statistics from text that the model writes itself."""
    # Each process collects for itself, since only one of a group may be editing.
    options = CollectOptions(seed=config.seed, distributed=False, chat=config.chat)
    return collect_statistics(model, tokenizer, None, config.layers or (), options, progress)


def _check_statistics(task: _Task, tokenizer: Any, statistics: Statistics) -> Fingerprint:
    """Check that the statistics, and the base edit, belong to the model; return the model's fingerprint."""
    architecture, last = task.architecture, max(task.layers)
    origin = fingerprint(architecture, tokenizer, statistics.fingerprint.layer, like=statistics.fingerprint)
    read_up_to = min(statistics.fingerprint.layer, architecture.depth - 1)
    dtype = dtype_name(architecture.down_projection(read_up_to).weight.dtype)
    settings = computed_with(architecture.model)
    statistics.check_model(origin, dtype, settings, down_projection_digests(architecture, last))
    check_causal(architecture, last)
    if task.base_edit is not None:
        check_base_edit(task.base_edit, task.config, architecture, origin, statistics)
    check_moments(architecture, {layer: statistics.second_moment(layer) for layer in task.layers})
    return origin


def _begin_report(task: _Task, statistics: Statistics) -> EditReport:
    """Return a report of what is known before anything is measured."""
    report = EditReport(by_count=task.by_count, statistics=statistics.summary())
    if task.base_edit is not None:
        report.inexact = inexact_layers(task.config, task.by_count, len(task.all_concepts), task.layers)
    return report


@dataclass(frozen=True)
class _Reader:
    """Reads states and keys from the model as it is at the moment.

    Attributes:
        task: What is unlearned.
        progress: Called after every batch.
        measured: Layers where what lies between the down-projection and the residual stream is measured.
    """

    task: _Task
    progress: ProgressCallback
    measured: tuple[int, ...]

    def targets(self) -> Tensor:
        """Return (n, d_out): the states on reading the redirects, at the output of the last edited layer."""
        targets = self._states(self.task.plan.targets, "targets")
        self.task.check_finite("target states", max(self.task.layers), targets)
        return targets

    def template_keys(self) -> dict[int, Tensor]:
        """Return for each layer the keys (m, d_in) of the templates' own tokens; empty where they weigh nothing."""
        task = self.task
        if task.plan.held is None:
            return {}
        last, stage = max(task.layers), "held keys"
        found = read_layers(task.architecture, task.plan.held, last, task.layers, progress=self.progress, stage=stage)
        return {layer: states.keys for layer, states in found.items() if states.keys is not None}

    def keys(self, layers: Sequence[int]) -> dict[int, States]:
        """Return for some layers the keys, and the states at the output of the last edited layer, from one pass."""
        task, stage = self.task, f"keys of layer {', '.join(map(str, layers))}"
        found = read_layers(
            task.architecture,
            task.plan.keys,
            max(task.layers),
            layers,
            progress=self.progress,
            stage=stage,
            measured=self.measured,
        )
        if task.plan.current is None:
            return found
        hidden = self._states(task.plan.current, stage)
        return {layer: replace(states, hidden=hidden) for layer, states in found.items()}

    def states_after_edit(self) -> Tensor:
        """Return (n, d_out): the states at the output of the last edited layer where the residuals were measured."""
        hidden = self._states(self.task.plan.current or self.task.plan.keys, "check")
        self.task.check_finite("states after the edit", max(self.task.layers), hidden)
        return hidden

    def _states(self, reading: Reading, stage: str) -> Tensor:
        last = max(self.task.layers)
        return read_states(self.task.architecture, reading, last, progress=self.progress, stage=stage).hidden


@dataclass(frozen=True)
class _Goals:
    """Where the states are sent.

    Attributes:
        states: (n, d_out) at the output of the last edited layer.
        first_distance: (n,) Euclidean distance to them before the edit.
    """

    states: Tensor
    first_distance: Tensor

    @classmethod
    def of(cls, targets: Tensor, hidden: Tensor, task: _Task) -> _Goals:
        """Go from states (n, d_out) towards targets (n, d_out), each key as far as settings and plan say."""
        way = task.config.strength * torch.tensor(task.plan.reach).to(targets)[:, None]
        goals = hidden + way * (targets - hidden)
        return cls(goals, (goals - hidden).norm(dim=1))

    def distance(self, hidden: Tensor, task: _Task) -> list[float]:
        """Return for each new concept the distance of states (n, d_out) to the goals, as a share of the first one."""
        shares = (self.states - hidden).norm(dim=1) / self.first_distance.clamp(min=1e-12)
        return mean_by_concept(shares, task.plan.concept_of, self.first_distance)


def _keys_and_residuals(
    task: _Task, layer: int, states: States, goals: _Goals, layers_left: int
) -> tuple[Tensor, Tensor]:
    """Return keys (n, d_in) and residuals (n, d_out) of a layer, those of the base edit first.

    Each layer takes an equal share of what is left of the way: of all layers where everything is measured before the
    first edit, else of the layers that are still to be edited.
    """
    assert states.keys is not None
    device = task.architecture.down_projection(layer).weight.device
    share = 1 / (len(task.layers) if task.config.measure == "once" else layers_left)
    keys, residuals = states.keys, ((goals.states - states.hidden) * share).to(device)
    if states.gains is not None:
        residuals = divide_by_gains(residuals, states.gains.to(device))
    task.check_finite("keys", layer, keys)
    task.check_finite("residuals", layer, residuals)
    if task.base_edit is None:
        return keys, residuals
    base = next(update for update in task.base_edit.updates if update.layer == layer)
    return torch.cat([base.keys.to(keys), keys]), torch.cat([base.residuals.to(residuals), residuals])


def _compare(
    task: _Task,
    projection: DownProjection,
    update: LayerUpdate,
    solution: Solution,
    retained: Neighbours | None,
    report: EditReport,
) -> None:
    """Measure, before an update is applied, what its concepts do to each other and to names that should stay."""
    if report.collisions is None:
        report.collisions = find_collisions(task.all_concepts, task.concept_of, update)
    if retained is not None:
        retained.measure(whole(projection.weight), update, solution, task.concept_of)


def _record(updates: list[LayerUpdate], update: LayerUpdate, applied: Sequence[Applied]) -> None:
    """Append an update that a weight now carries."""
    updates.append(update.after(*applied))


def _check_edit(
    task: _Task,
    guards: Guards,
    updates: Sequence[LayerUpdate],
    predictions: Predictions | None,
    distance: Sequence[float],
    report: EditReport,
) -> None:
    """Check the finished edit against its limits."""
    report.limits_passed += check_closed(guards, report.layers, task.all_concepts)
    report.limits_passed += check_distance(guards, report.layers, distance, task.config)
    report.divergence, exceeded = check_predictions(
        guards, predictions, task.architecture, updates, task.concept_of, task.all_concepts
    )
    report.limits_passed += exceeded


def _with_distance_of_base(task: _Task, distance: list[float]) -> list[float]:
    """Return the distances of all concepts; empty where those of the base edit are not known."""
    if task.base_edit is None:
        return distance
    return [*task.base_edit.report.distance, *distance] if task.base_edit.report.distance else []
