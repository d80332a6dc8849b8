"""Unlearn many concepts at once, in closed form (ROCR: Ye, Zhang and Wu, arXiv 2506.07795).

For each edited layer with weight W (d_out, d_in); rows are samples:

    keys       K (n, d_in)     inputs of the down-projection at the tokens of the concepts' names
    residuals  R (n, d_out)    differences between the target outputs and the outputs at the keys
    metric     M (d_in, d_in)  computed from the second moment of ordinary keys, which it protects
    update     Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M, added to W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from rocr.argument_checks import check_kind, check_list, check_reader
from rocr.concepts import Concept, check_concepts, check_length
from rocr.config import EditConfig
from rocr.deprecation import renamed_arguments
from rocr.edit.aliases import propose_aliases
from rocr.edit.apply import apply_updates, replace_updates, revert_updates
from rocr.edit.automatic_redirects import with_redirects
from rocr.edit.collisions import find_collisions
from rocr.edit.compose import check_base_edit, check_rendered, inexact_layers
from rocr.edit.controls import kept_names
from rocr.edit.drift import check_drift, read_final_states
from rocr.edit.edit import Edit
from rocr.edit.guards import (
    Guards,
    Predictions,
    check_closed,
    check_distance,
    check_harm,
    check_layer,
    check_predictions,
    naming_closest_concepts,
    naming_largest_concepts,
    predict,
)
from rocr.edit.harm import HARMED, MAX_ASKED, OwnAnswers, read_own_answers
from rocr.edit.measures import EditReport, measure_layer
from rocr.edit.retain_impact import RetainedNames, read_retained_names
from rocr.edit.retained_keys import RetainedKeys, rows_apart
from rocr.edit.task import Goals, Reader, Task, keys_and_residuals, with_token_schedule, with_variants
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import edited_weights
from rocr.io.dtypes import dtype_name
from rocr.io.signals import end_interrupted_contexts
from rocr.keys.plan import plan_keys
from rocr.keys.variants import same_variants_beside
from rocr.model.architecture import find_architecture, positions_of
from rocr.model.blocks import LayerBlocks, layer_blocks
from rocr.model.causality import with_kind
from rocr.model.chat import with_date
from rocr.model.fingerprint import Fingerprint, down_projection_digests, fingerprint
from rocr.model.gains import layers_with_gain
from rocr.model.layers import check_moments, resolve_layers
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, Stopwatch, silent
from rocr.solve.row_weights import weigh_rows
from rocr.solve.solve import Solution, solve_layer
from rocr.solve.support import described
from rocr.statistics.collect import CollectOptions, collect_statistics
from rocr.statistics.provenance import TEXT_ENCODER, computed_with
from rocr.statistics.statistics import Statistics

CONCEPTS = "a list of rocr.Concept"
STATISTICS = "a rocr.Statistics, such as rocr.Statistics.load(path) returns"


@renamed_arguments(kept="base_edit", neighbours="retain")
def unlearn(
    model: nn.Module,
    tokenizer: Any,
    concepts: Sequence[Concept],
    statistics: Statistics | None = None,
    config: EditConfig | None = None,
    progress: ProgressCallback = silent,
    guards: Guards | None = None,
    base_edit: Edit | None = None,
    retain: Sequence[str] | None = None,
    ask: int = MAX_ASKED,
) -> Edit:
    """Redirect concepts in a model, in place: on reading a concept, the model then perceives its redirect.

    For each edited layer, the update of the weight W (d_out, d_in) is Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M, for keys K
    (n, d_in), residuals R (n, d_out) and a metric M (d_in, d_in) that protects ordinary keys. The update is computed
    in float32 and its system is solved in float64; it is added in float32 and rounded once to the dtype of W.

    After any exception, the model has its original weights, bit for bit.

    Args:
        model: A causal language model of transformers with dense MLPs or experts, or a text encoder, or an
            encoder-decoder, whose encoder is then edited; with float32, bfloat16 or float16 weights.
        tokenizer: The tokenizer of the model.
        concepts: The concepts, each with its redirect; at most 10,000 unless `guards.concepts` is larger.
        statistics: Second moments of ordinary keys at the edited layers, collected on the same model. None collects
            them from text that the model writes itself, which an encoder cannot do.
        config: The settings. None is that of `base_edit`, or `EditConfig()`.
        progress: Called after each step of a stage.
        guards: Safety limits of the edit. None is `Guards()`.
        base_edit: An edit whose concepts stay redirected, from the keys and residuals that it stores. The model must
            have its weights from before that edit; `Edit.add` restores them first.
        retain: Names that should stay as they are: the update keeps the outputs at their keys, by
            `EditConfig.retain_weight`, and its effect on them is measured. In a language model, names that the edit is
            likely to harm (`rocr.edit.controls`) are retained too. None measures the redirects beside these; an empty
            list retains and measures nothing.
        ask: Of these names, the redirects excepted, the largest number that the model is asked about before and after
            the edit: those that it moves most (`rocr.edit.harm`). 0 asks nothing.

    Returns:
        The edit, which is applied to the model. `Edit.revert` restores the original weights.

    Raises:
        InputError: The concepts, the settings, the statistics or the model are not valid, or do not fit together.
        GuardError: Keys, states or weights are not finite, or the edit exceeds a limit. The message names the
            concepts that caused it.

    Source:
        Ye, Zhang and Wu, "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795, section 4.
    """
    check_reader(model, tokenizer, progress)
    _check_kinds(concepts, statistics, config, guards, base_edit)
    check_list("retain", retain, str, "a list of retained names", optional=True)
    check_kind("ask", ask, int, "a whole number")
    updates: list[LayerUpdate] = []  # the updates that are applied
    guards = guards or Guards()
    plain = plain_arithmetic()
    try:
        with plain:
            task = _plan(model, tokenizer, concepts, config, guards, base_edit, retain, progress)
            statistics = statistics or _collect(model, tokenizer, task.config, progress)
            origin = _check_statistics(task, tokenizer, statistics)
            report = _begin_report(task, statistics)
            timed = Stopwatch(report.seconds)
            architecture, layers = task.architecture, task.layers
            all_concepts, concept_of = task.all_concepts, task.concept_of

            with timed("targets"):
                reader = Reader(task, progress, layers_with_gain(architecture, layers))
                targets = reader.targets()
            with timed("keys"):
                template_keys = reader.template_keys()
                readings = reader.keys(layers if task.config.measure == "once" else layers[:1])
                goals = Goals.of(targets, readings[layers[0]].hidden, reader.distance_shares(tokenizer), task)
            with timed("controls"):
                retained = read_retained_names(
                    architecture, tokenizer, all_concepts, retain, task.config, progress, propose=ask > 0
                )
                retained_keys = RetainedKeys.of(task, retained)
            own_answers: OwnAnswers | None = None
            with timed("check"):
                predictions = predict(architecture, tokenizer)
                final_states = read_final_states(architecture, tokenizer)

            for i, layer in enumerate(layers):
                with timed("keys"):
                    states = readings[layer] if layer in readings else reader.keys([layer])[layer]
                    system = keys_and_residuals(task, layer, states, goals, layers_left=len(layers) - i)
                    blocks, keys, residuals = system.blocks, system.keys, system.residuals
                    report.routing += task.routing(layer, states, system.touched, statistics)
                    kept = retained_keys.rows(task, layer, system)
                    if i == 0:
                        used = None if kept is None else rows_apart(kept, keys)
                with timed("metric"):
                    moments = statistics.second_moments(layer)
                    metric = system.metric(moments, task.config, template_keys.get(layer), kept)
                    ridge = task.config.ridge * (metric.ordinary if task.config.relative_ridge else 1.0)
                    keys, residuals, metric = weigh_rows(keys, residuals, metric, ridge, task.least_closed)
                with timed("solve"), naming_closest_concepts(keys, concept_of, all_concepts):
                    solution = solve_layer(keys, residuals, metric, ridge, kept, used, system.support)
                    update = LayerUpdate.solved(blocks, system.touched, keys, residuals, solution)
                with timed("compare"):
                    _compare(task, blocks, update, solution, retained, report)
                if i == 0 and retained is not None and ask > 0:
                    with timed("controls"):  # the model is still unedited
                        own_answers = _ask_about_most_moved(task, tokenizer, retained, ask, progress)
                with timed("apply"), naming_largest_concepts(update, concept_of, all_concepts):
                    weight_norm = blocks.norm(system.touched)
                    weights = edited_weights(architecture, [update])
                    apply_updates(weights, [update.factors], partial(_record, updates, update))
                with timed("measure"):
                    description = described(metric.describe(), system.support)
                    measures = measure_layer(updates[-1], weight_norm, concept_of, description, solution)
                    report.layers.append(measures)
                report.limits_passed += check_layer(guards, measures, updates[-1], concept_of, all_concepts)
                progress(Progress("edit", i + 1, len(layers), "layers"))

            with timed("measure"):
                hidden = reader.states_after_edit()
                distance = goals.distance(hidden, task)
            with timed("check"):
                _check_edit(task, guards, updates, predictions, goals.moved(hidden, task), report)
                report.drift, exceeded = check_drift(
                    guards, final_states, architecture, updates, concept_of, all_concepts
                )
                report.limits_passed += exceeded
            with timed("controls"):
                harms = [] if own_answers is None else own_answers.harms(architecture)
                report.limits_passed += check_harm(guards, harms)
                report.harmed = [harm for harm in harms if harm.kept < HARMED]
            report.distance = _with_distance_of_base(task, distance)
            if retained is not None:
                report.retained = retained.report([concept.name for concept in all_concepts])
            settings = computed_with(model) | ({} if architecture.kind.writes_text else {TEXT_ENCODER: True})
            edit = Edit(all_concepts, task.config, origin, updates, concept_of, report, settings, task.plan.rendered)
            model_type = architecture.model_type if report.routing else None
            return replace(edit, model_type=model_type, retained=tuple(retained_keys.labels))
    except BaseException as error:
        # Not in a context manager, since an interruption at its own exit would skip it.
        plain.restore()
        end_interrupted_contexts(error)
        if updates:
            revert_updates(task.architecture, updates)
        raise


def add_concepts(
    edit: Edit,
    concepts: Sequence[Concept],
    model: nn.Module,
    tokenizer: Any,
    statistics: Statistics,
    progress: ProgressCallback = silent,
    guards: Guards | None = None,
    retain: Sequence[str] | None = None,
    ask: int = MAX_ASKED,
) -> Edit:
    """Add concepts to an applied edit and apply the result in its place; `Edit.add` as a function.

    Args:
        edit: The edit, which is applied to the model.
        concepts: The concepts to add.
        model: The model.
        tokenizer: The tokenizer of the model.
        statistics: The statistics that the edit was made with.
        progress: Called after each step of a stage.
        guards: Safety limits of the new edit. None is `Guards()`.
        retain: As for `unlearn`.
        ask: As for `unlearn`.

    Returns:
        The edit of all concepts, which is applied to the model.

    Raises:
        InputError: The model does not have the edit, or an argument is not valid or does not fit the edit.
        GuardError: The new edit exceeds a limit. The model then has the first edit again.
    """
    check_reader(model, tokenizer, progress)
    check_kind("edit", edit, Edit, "a rocr.Edit")
    check_kind("statistics", statistics, Statistics, STATISTICS)
    _check_kinds(concepts, statistics, None, guards, None)
    # Files without a date were made with the default date.
    edit = replace(edit, config=replace(edit.config, chat=with_date(edit.config.chat, tokenizer)))
    weights = edited_weights(find_architecture(model), edit.updates)
    return replace_updates(
        weights,
        [update.applied for update in edit.updates],
        lambda: unlearn(model, tokenizer, concepts, statistics, edit.config, progress, guards, edit, retain, ask),
    )


def _check_kinds(concepts: object, statistics: object, config: object, guards: object, base_edit: object) -> None:
    """Raise InputError if an argument is of another type than `unlearn` takes."""
    check_list("concepts", concepts, object, CONCEPTS, advice="Read a file of concepts with rocr.load_concepts(path).")
    check_kind("statistics", statistics, Statistics, STATISTICS, optional=True)
    check_kind("config", config, EditConfig, "a rocr.EditConfig", optional=True)
    check_kind("guards", guards, Guards, "a rocr.Guards", optional=True)
    check_kind("base_edit", base_edit, Edit, "a rocr.Edit, such as rocr.Edit.load(path) returns", optional=True)


def _plan(
    model: nn.Module,
    tokenizer: Any,
    concepts: Sequence[Concept],
    config: EditConfig | None,
    guards: Guards,
    base_edit: Edit | None,
    retain: Sequence[str] | None,
    progress: ProgressCallback,
) -> Task:
    """Complete the settings and choose the tokens that become keys, with all checks before a prompt is read.

    The model is run on a few tokens, which show the blocks of mixtures and whether it reads from left to right, and on
    questions about concepts whose redirect is "auto".
    """
    concepts = list(concepts)
    everything = [*base_edit.concepts, *concepts] if base_edit else concepts
    check_length(len(everything), guards.concepts)
    check_concepts(everything)
    config = config or (base_edit.config if base_edit else EditConfig())
    architecture = find_architecture(model)
    config = resolve_layers(config, architecture)
    architecture = with_kind(architecture, max(config.layer_numbers))
    config = with_variants(with_token_schedule(config, architecture), architecture)
    by_count = base_edit.report.by_count if base_edit else config.unset_by_count()
    config = config.for_concepts(len(concepts))
    config = replace(config, chat=with_date(config.chat, tokenizer))
    concepts = with_redirects(architecture, tokenizer, concepts, progress)
    if config.variants == "all":
        concepts = propose_aliases(model, tokenizer, concepts, progress=progress, chat=config.chat).concepts
    base = base_edit.concepts if base_edit else ()
    kept, positions = kept_names(retain), positions_of(model)
    plan = plan_keys(tokenizer, concepts, config, architecture.kind, base=base, kept=kept, positions=positions)
    if base_edit is not None:
        check_rendered(base_edit.rendered, plan.rendered, "the tokenizer now")
    plan.check_positions(concepts, positions)
    plan.check_tokens_differ(concepts)
    return Task(architecture, concepts, config, by_count, plan, base_edit)


def _collect(model: nn.Module, tokenizer: Any, config: EditConfig, progress: ProgressCallback) -> Statistics:
    """Collect statistics from text that the model writes itself."""
    # Not distributed: the other processes of a group need not be editing.
    options = CollectOptions(seed=config.seed, distributed=False, chat=config.chat)
    return collect_statistics(model, tokenizer, None, config.layer_numbers, options, progress)


def _check_statistics(task: Task, tokenizer: Any, statistics: Statistics) -> Fingerprint:
    """Raise InputError unless statistics and base edit belong to the model; return the model's fingerprint."""
    architecture, last = task.architecture, max(task.layers)
    origin = fingerprint(architecture, tokenizer, statistics.fingerprint.layer, like=statistics.fingerprint)
    read_up_to = min(statistics.fingerprint.layer, architecture.depth - 1)
    dtype = dtype_name(layer_blocks(architecture, read_up_to).dtype)
    settings = computed_with(architecture.model)
    statistics.check_model(origin, dtype, settings, down_projection_digests(architecture, last))
    if task.base_edit is not None:
        check_base_edit(task.base_edit, task.config, architecture, origin, statistics)
    check_moments(architecture, {layer: statistics.second_moments(layer) for layer in task.layers})
    return origin


def _begin_report(task: Task, statistics: Statistics) -> EditReport:
    """Return a report with the fields that are known before the measurements."""
    report = EditReport(by_count=task.by_count, statistics=statistics.summary())
    if task.base_edit is not None:
        differ = not same_variants_beside(task.base_edit.concepts, task.concepts, task.config)
        report.inexact = inexact_layers(task.config, task.by_count, len(task.all_concepts), task.layers, differ)
    return report


def _compare(
    task: Task,
    blocks: LayerBlocks,
    update: LayerUpdate,
    solution: Solution,
    retained: RetainedNames | None,
    report: EditReport,
) -> None:
    """Measure the effect of an update on its own concepts and on retained names, before it is applied."""
    if report.collisions is None:
        report.collisions = find_collisions(task.all_concepts, task.concept_of, update)
    if retained is not None:
        retained.measure(blocks, update, solution, task.concept_of)


def _ask_about_most_moved(
    task: Task, tokenizer: Any, retained: RetainedNames, count: int, progress: ProgressCallback
) -> OwnAnswers | None:
    """Ask the model about the names that the update of the first layer, not yet applied, moves most."""
    names = retained.most_moved([concept.name for concept in task.all_concepts], count)
    kinds = {control.name: control.kind for control in retained.controls}
    things = [kinds.get(name) not in (None, "person") for name, _ in names]
    return read_own_answers(task.architecture, tokenizer, names, things, task.config.chat, progress)


def _record(updates: list[LayerUpdate], update: LayerUpdate, applied: Sequence[Applied]) -> None:
    """Append an update that was applied."""
    updates.append(update.after(*applied))


def _check_edit(
    task: Task,
    guards: Guards,
    updates: Sequence[LayerUpdate],
    predictions: Predictions | None,
    moved: Sequence[float],
    report: EditReport,
) -> None:
    """Raise GuardError if the finished edit exceeds a limit; with `guards.force`, record the limit in the report."""
    report.limits_passed += check_closed(guards, report.layers, task.all_concepts)
    report.limits_passed += check_distance(guards, report.layers, moved, task.config)
    report.divergence, exceeded = check_predictions(
        guards, predictions, task.architecture, updates, task.concept_of, task.all_concepts
    )
    report.limits_passed += exceeded


def _with_distance_of_base(task: Task, distance: list[float]) -> list[float]:
    """Return the distances of all concepts; empty if those of the base edit are unknown."""
    if task.base_edit is None:
        return distance
    return [*task.base_edit.report.distance, *distance] if task.base_edit.report.distance else []
