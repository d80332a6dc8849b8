"""Unlearning, stage by stage: ROCR (Ye, Zhang and Wu, arXiv 2506.07795) for many concepts at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocr.concepts import Concept, check_concepts, check_length
from rocr.config import EditConfig
from rocr.edit.apply import Applied, LayerUpdate, apply_updates, take_back
from rocr.edit.collisions import find_collisions
from rocr.edit.compose import check_kept, check_rendered, inexact_layers
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
from rocr.keys.plan import KeyPlan, plan_keys
from rocr.keys.read import States, read_layers, read_states
from rocr.model.architecture import Architecture, DownProjection, find_architecture, positions_of
from rocr.model.causality import check_causal
from rocr.model.fingerprint import down_projection_digests, dtype_name, fingerprint
from rocr.model.layers import check_moments, resolve_layers
from rocr.model.passage import before_passage, measured_layers
from rocr.model.tensor_parallel import whole
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent
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
    kept: Edit | None = None,
    neighbours: Sequence[str] | None = None,
) -> Edit:
    """Redirect concepts in a model, in place, so that on reading one it perceives the redirect instead.

    Args:
        model: a causal language model of transformers, with dense MLPs.
        tokenizer: its tokenizer.
        concepts: what to redirect to what.
        statistics: of ordinary keys at the edited layers; None: collected on text that the model writes itself.
        config: the settings; None: `EditConfig()`.
        progress: told how far each stage is.
        guards: the limits that the edit must stay within; None: `Guards()`.
        kept: an edit whose concepts stay redirected, from the keys and residuals that it holds; the model must be
            without it. `Edit.add` is the way to this.
        neighbours: names that should stay, to measure what the edit does to them; None: the redirects.

    Returns:
        The edit, already applied. On any exception the model has its first weights again, bit for bit.

    Raises:
        InputError: concepts, settings, statistics or model that do not fit together.
        GuardError: keys, states or weights that are not finite, or a limit that was passed; names the concepts.
    """
    made: list[LayerUpdate] = []
    try:
        with plain_arithmetic():
            return _unlearn(model, tokenizer, concepts, statistics, config, progress, guards, kept, neighbours, made)
    except BaseException:
        # Here and not in a context: an interruption at a context's own exit would miss it.
        if made:
            take_back(find_architecture(model), made)
        raise


def _unlearn(
    model: nn.Module,
    tokenizer: Any,
    concepts: Sequence[Concept],
    statistics: Statistics | None,
    config: EditConfig | None,
    progress: ProgressCallback,
    guards: Guards | None,
    kept: Edit | None,
    neighbours: Sequence[str] | None,
    made: list[LayerUpdate],
) -> Edit:
    """The stages of `unlearn`; `made` gets every update that a weight carries."""
    concepts = list(concepts)
    everything = [*kept.concepts, *concepts] if kept else concepts
    check_length(len(everything), (guards or Guards()).concepts)
    check_concepts(everything)
    config = config or (kept.config if kept else EditConfig())
    by_count = kept.report.by_count if kept else config.left_to_the_count()
    config = resolve_layers(config.for_concepts(len(concepts)), model)
    config = replace(config, chat=config.chat.settled(tokenizer))
    layers = config.layers or ()
    last = max(layers)
    architecture = find_architecture(model)
    plan = plan_keys(tokenizer, concepts, config)
    if kept is not None:
        check_rendered(kept.rendered, plan.rendered, "the tokenizer now")
    plan.check_positions(concepts, positions_of(model))
    plan.check_ways(concepts)
    if statistics is None:
        # By each process itself, since only one of a group may be editing.
        statistics = collect_statistics(
            model,
            tokenizer,
            None,
            layers,
            CollectOptions(seed=config.seed, distributed=False, chat=config.chat),
            progress,
        )
    mark = fingerprint(architecture, tokenizer, statistics.fingerprint.layer, like=statistics.fingerprint)
    read_up_to = min(statistics.fingerprint.layer, architecture.depth - 1)
    settings = computed_with(model)
    dtype = dtype_name(architecture.down_projection(read_up_to).weight)
    statistics.check_model(mark, dtype, settings, down_projection_digests(architecture, last))
    check_causal(architecture, last)
    run = _Run(architecture, concepts, config, plan, progress, guards or Guards(), made, kept)
    run.report.by_count = by_count
    if kept is not None:
        check_kept(kept, config, architecture, mark, statistics)
        run.report.inexact = inexact_layers(config, by_count, len(run.all_concepts), layers)
    moments = {layer: statistics.second_moment(layer) for layer in layers}
    check_moments(architecture, moments)

    with run.timed("targets"):
        run.measured = measured_layers(architecture, layers)
        targets = read_states(architecture, run.plan.targets, last, progress=progress, stage="targets").hidden
    check_finite("target states", last, targets, run.plan.concept_of, concepts)
    if plan.held is not None:
        with run.timed("keys"):
            run.held = read_layers(architecture, plan.held, last, layers, progress=progress, stage="held keys")
    run.neighbours = read_neighbours(architecture, tokenizer, run.all_concepts, neighbours, config, progress)
    run.report.statistics = statistics.summary()
    with run.timed("check"):
        predictions = predict(architecture, tokenizer)
    if config.measure == "once":
        run.read_all(layers, last)
    for i, layer in enumerate(layers):
        share = 1 / (len(layers) if config.measure == "once" else len(layers) - i)
        run.edit_layer(layer, last, targets, share, moments[layer])
        progress(Progress("edit", i + 1, len(layers), "layers"))
    run.report.distance = run.distance(last)
    if run.neighbours is not None:
        run.report.neighbours = run.neighbours.report([concept.name for concept in run.all_concepts])
    with run.timed("check"):
        run.check_whole(predictions)
    return Edit(run.all_concepts, config, mark, run.updates, run.all_concept_of, run.report, settings, plan.rendered)


@dataclass
class _Run:
    """An edit in the making."""

    architecture: Architecture
    concepts: list[Concept]
    config: EditConfig
    plan: KeyPlan
    progress: ProgressCallback
    guards: Guards
    updates: list[LayerUpdate]
    kept: Edit | None = None
    measured: tuple[int, ...] = ()
    held: dict[int, States] = field(default_factory=dict)
    readings: dict[int, States] = field(default_factory=dict)
    report: EditReport = field(default_factory=EditReport)
    goals: Tensor | None = None
    first_distance: Tensor | None = None
    neighbours: Neighbours | None = None

    @property
    def all_concepts(self) -> list[Concept]:
        """The kept concepts, then the new ones."""
        return [*self.kept.concepts, *self.concepts] if self.kept else self.concepts

    @property
    def all_concept_of(self) -> list[int]:
        """For each key, kept or new, the index of its concept among all."""
        if self.kept is None:
            return self.plan.concept_of
        return [*self.kept.concept_of, *(len(self.kept.concepts) + concept for concept in self.plan.concept_of)]

    def edit_layer(self, layer: int, last: int, targets: Tensor, share: float, moment: Tensor) -> None:
        """Measure keys and residuals at a layer, solve its update and apply it."""
        projection = self.architecture.down_projection(layer)
        with self.timed("keys"):
            keys, residuals = self.measure(layer, last, targets, share)
        keys, residuals = self.with_kept(layer, keys, residuals)
        with self.timed("metric"):
            held = self.held[layer].keys if self.held else None
            metric = build_metric(moment.to(keys.device), self.config, held)
        with self.timed("solve"), with_closest(keys, self.all_concept_of, self.all_concepts):
            ridge = self.config.ridge * (metric.ordinary if self.config.relative_ridge else 1.0)
            solution = solve_layer(keys, residuals, metric, ridge)
        update = LayerUpdate(
            layer,
            projection.parameter_name,
            solution.factors,
            keys,
            residuals,
            projection.transposed,
            system=solution.system,
        )
        with self.timed("compare"):
            self.compare(projection, update, solution)
        self.apply(projection, update, metric.describe(), solution)

    def compare(self, projection: DownProjection, update: LayerUpdate, solution: Solution) -> None:
        """Measure, before an update is applied, what its concepts do to each other and to their neighbours."""
        if not self.updates:
            self.report.collisions = find_collisions(self.all_concepts, self.all_concept_of, update)
        if self.neighbours is not None:
            self.neighbours.measure(whole(projection.weight), update, solution, self.all_concept_of)

    def apply(self, projection: DownProjection, update: LayerUpdate, metric: str, solution: Solution) -> None:
        """Apply an update, measure it and hold it to its limits."""
        weight_norm = float(whole(projection.weight).float().norm())
        with self.timed("apply"), with_culprits(update, self.all_concept_of, self.all_concepts):
            apply_updates([projection], [update.factors], partial(self.keep, update))
        with self.timed("measure"):
            self.report.layers.append(
                measure_layer(self.updates[-1], weight_norm, self.all_concept_of, metric, solution)
            )
        self.report.limits_passed += check_layer(
            self.guards, self.report.layers[-1], self.updates[-1], self.all_concept_of, self.all_concepts
        )

    def keep(self, update: LayerUpdate, applied: Sequence[Applied]) -> None:
        """Take the record of what an update did to its weight."""
        self.updates.append(replace(update, applied=applied[0], base=applied[0].before))

    def measure(self, layer: int, last: int, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Keys (n, d_in) and residuals (n, d_out) of the new concepts at a layer, on the device of its weight."""
        states = (self.readings or self.read([layer], last))[layer]
        assert states.keys is not None
        device = self.architecture.down_projection(layer).weight.device
        if self.goals is None:
            way = self.config.strength * torch.tensor(self.plan.reach).to(targets)[:, None]
            self.goals = states.hidden + way * (targets - states.hidden)
            self.first_distance = (self.goals - states.hidden).norm(dim=1)
        difference = self.goals - states.hidden
        residuals = (difference * share).to(device)
        if states.gains is not None:
            residuals = before_passage(states.gains.to(device), residuals)
        for what, values in (("keys", states.keys), ("residuals", residuals)):
            check_finite(what, layer, values, self.plan.concept_of, self.concepts)
        return states.keys, residuals

    def with_kept(self, layer: int, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and residuals with those of the kept edit before them."""
        if self.kept is None:
            return keys, residuals
        update = next(update for update in self.kept.updates if update.layer == layer)
        return torch.cat([update.keys.to(keys), keys]), torch.cat([update.residuals.to(residuals), residuals])

    def read_all(self, layers: Sequence[int], last: int) -> None:
        """Measure keys and states at all layers of the model as it is."""
        with self.timed("keys"):
            self.readings = self.read(layers, last)

    def check_whole(self, before: Predictions | None) -> None:
        """Hold the finished edit to its limits."""
        self.report.limits_passed += check_closed(self.guards, self.report.layers, self.all_concepts)
        self.report.limits_passed += check_distance(
            self.guards, self.report.layers, self.report.distance[-len(self.concepts) :], self.config
        )
        divergence, passed = check_predictions(
            self.guards, before, self.architecture, self.updates, self.all_concept_of, self.all_concepts
        )
        self.report.divergence = divergence
        self.report.limits_passed += passed

    def read(self, layers: Sequence[int], last: int) -> dict[int, States]:
        """Keys at some layers and the current states at the last edited one, from one pass."""
        plan, stage = self.plan, f"keys of layer {', '.join(map(str, layers))}"
        states = read_layers(
            self.architecture, plan.keys, last, layers, progress=self.progress, stage=stage, measured=self.measured
        )
        if plan.current is None:
            return states
        hidden = read_states(self.architecture, plan.current, last, progress=self.progress, stage=stage).hidden
        return {layer: replace(found, hidden=hidden) for layer, found in states.items()}

    def distance(self, last: int) -> list[float]:
        """For each concept the distance to where it was sent after the edit, as a share of that before."""
        reading = self.plan.current or self.plan.keys
        with self.timed("measure"):
            hidden = read_states(self.architecture, reading, last, progress=self.progress, stage="check").hidden
        check_finite("states after the edit", last, hidden, self.plan.concept_of, self.concepts)
        assert self.goals is not None and self.first_distance is not None
        shares = (self.goals - hidden).norm(dim=1) / self.first_distance.clamp(min=1e-12)
        found = mean_by_concept(shares, self.plan.concept_of, self.first_distance)
        if self.kept is None:
            return found
        return [*self.kept.report.distance, *found] if self.kept.report.distance else []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the context to a stage's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.report.seconds
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
