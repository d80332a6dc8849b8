"""The inputs of an edit, and what is read from the model for it: targets, keys and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.edit.measures import mean_by_concept
from rocr.edit.record import EditRecord
from rocr.edit.routing import LayerRouting, measure_routing
from rocr.edit.short_names import short_name_keys
from rocr.edit.support import find_support
from rocr.errors import InputError
from rocr.keys.plan import KeyPlan, Reading
from rocr.keys.predicted import distance_share, rest_probabilities
from rocr.keys.read import States, read_layers, read_states
from rocr.model.architecture import Architecture
from rocr.model.blocks import LayerBlocks, layer_blocks
from rocr.model.gains import divide_by_gains
from rocr.progress import ProgressCallback
from rocr.solve.metric import ProjectedMetric, WhitenedMetric, build_metric
from rocr.solve.mixture import WeighedKeys, weigh_keys
from rocr.solve.solve import check_finite
from rocr.solve.support import density
from rocr.statistics.statistics import Statistics


@dataclass(frozen=True)
class Task:
    """The inputs of an edit, checked and complete.

    Attributes:
        architecture: The decoder layers and down-projections of the model.
        concepts: The new concepts.
        config: The settings, with a value for each.
        by_count: Names of the settings whose value was chosen by the number of concepts.
        plan: Which tokens of which prompts are read.
        base_edit: An edit whose concepts stay redirected, or None.
    """

    architecture: Architecture
    concepts: list[Concept]
    config: EditConfig
    by_count: list[str]
    plan: KeyPlan
    base_edit: EditRecord | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to edit, ascending."""
        return self.config.layer_numbers

    @property
    def all_concepts(self) -> list[Concept]:
        """The concepts of the base edit, then the new ones."""
        return [*self.base_edit.concepts, *self.concepts] if self.base_edit else self.concepts

    @property
    def concept_of(self) -> list[int]:
        """For each key, those of the base edit first, the index of its concept in `all_concepts`."""
        if self.base_edit is None:
            return self.plan.concept_of
        offset = len(self.base_edit.concepts)
        return [*self.base_edit.concept_of, *(offset + concept for concept in self.plan.concept_of)]

    @property
    def least_closed(self) -> Tensor:
        """(n,) the share that each key closes at least. Rows of the base edit have their weights already: 0."""
        base = 0 if self.base_edit is None else len(self.base_edit.concept_of)
        return torch.tensor([0.0] * base + [self.config.least_closed * last for last in self.plan.is_last])

    def weights(self, like: Tensor) -> Tensor:
        """Return (n,) the weights of the new keys, in the dtype and on the device of a tensor."""
        return torch.tensor(self.plan.weights).to(like)

    def routing(self, layer: int, states: States, touched: Sequence[int], statistics: Statistics) -> list[LayerRouting]:
        """Return how the concepts are routed in a layer, those of the base edit first; empty for a dense layer."""
        if states.routing is None:
            return []
        moments = statistics.mixtures[layer]
        found = measure_routing(layer, states.routing, self.plan.concept_of, self.concepts, moments, statistics.tokens)
        base = [] if self.base_edit is None else self.base_edit.report.routing
        return [each.joined(found, touched) for each in base if each.layer == layer] or [found]

    def check_finite(self, what: str, layer: int, values: Tensor) -> None:
        """Raise GuardError, naming the concepts, unless values (n, features) of the new keys are finite."""
        check_finite(what, layer, values, self.plan.concept_of, self.concepts)


def with_token_schedule(config: EditConfig, architecture: Architecture) -> EditConfig:
    """Return the settings with the token schedule "predicted" in place of None, if the model predicts text.

    Raises:
        InputError: The schedule is "predicted", but the model predicts no text or is loaded only in part.
    """
    if architecture.predicts_text:
        return replace(config, token_schedule=config.token_schedule or "predicted")
    if config.token_schedule == "predicted":
        raise InputError(
            'The token schedule "predicted" needs the predictions of the model, but it predicts no text or is loaded '
            'only in part: use "full" or "ramp" (token_schedule, --token-schedule).'
        )
    return config


def with_variants(config: EditConfig, architecture: Architecture) -> EditConfig:
    """Return the settings with the variants "none" in place of None for a text encoder.

    There the states of a misspelt prompt hardly follow its own keys, and those of other prompts move more: from 2 to 5%
    in a CLIP text model (`tests/unit/test_encoder_embeddings.py`).
    """
    return config if architecture.kind.writes_text else replace(config, variants=config.variants or "none")


@dataclass(frozen=True)
class Reader:
    """Reads states and keys from the model with its current weights.

    Attributes:
        task: The inputs of the edit.
        progress: Called after every batch.
        measured: Layers where the gain between the down-projection and the residual stream is measured.
    """

    task: Task
    progress: ProgressCallback
    measured: tuple[int, ...]

    def targets(self) -> Tensor:
        """Return (n, d_out): the target states, at the output of the last edited layer at the redirects."""
        targets = self._states(self.task.plan.targets, "targets")
        self.task.check_finite("target states", max(self.task.layers), targets)
        return targets

    def template_keys(self) -> dict[int, States]:
        """Return the states of the templates' own tokens, with keys, by layer; empty if their weight is 0."""
        task = self.task
        reading = task.plan.template_keys
        if reading is None:
            return {}
        last, stage = max(task.layers), "template keys"
        return read_layers(task.architecture, reading, last, task.layers, progress=self.progress, stage=stage)

    def keys(self, layers: Sequence[int]) -> dict[int, States]:
        """Return the keys of some layers and the states at the output of the last edited layer, from one pass."""
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

    def distance_shares(self, tokenizer: Any) -> list[float]:
        """Return for each key the share of the distance to its target that it is moved."""
        task = self.task
        if task.config.token_schedule != "predicted":
            return task.plan.distance_shares
        probabilities = rest_probabilities(
            task.architecture, task.plan.keys, task.plan.concept_of, progress=self.progress
        )
        shares = [distance_share(probability) for probability in probabilities]
        short = short_name_keys(
            task.architecture,
            tokenizer,
            task.plan.keys,
            task.plan.concept_of,
            task.concepts,
            [share < 1.0 for share in shares],
            self.progress,
        )
        return [1.0 if is_short else share for is_short, share in zip(short, shares, strict=True)]

    def states_after_edit(self) -> Tensor:
        """Return (n, d_out): the current states, at the output of the last edited layer."""
        hidden = self._states(self.task.plan.current or self.task.plan.keys, "check")
        self.task.check_finite("states after the edit", max(self.task.layers), hidden)
        return hidden

    def _states(self, reading: Reading, stage: str) -> Tensor:
        last = max(self.task.layers)
        return read_states(self.task.architecture, reading, last, progress=self.progress, stage=stage).hidden


@dataclass(frozen=True)
class Goals:
    """The states that the edit aims at, at the output of the last edited layer.

    Attributes:
        start: (n, d_out) float32, the states before the edit.
        states: (n, d_out) float32, the goals.
    """

    start: Tensor
    states: Tensor

    @classmethod
    def of(cls, targets: Tensor, hidden: Tensor, shares: Sequence[float], task: Task) -> Goals:
        """Return the goals between states (n, d_out) and targets (n, d_out), by strength and shares of the distance."""
        share = task.config.strength * torch.tensor(shares).to(targets)[:, None]
        return cls(hidden, hidden + share * (targets - hidden))

    def distance(self, hidden: Tensor, task: Task) -> list[float]:
        """Return the distance of states (n, d_out) to the goals by new concept, as a share of the first distance.

        Keys of the concept's own names count by their first distance, those of variants do not.
        """
        first = (self.states - self.start).norm(dim=1)
        shares = (self.states - hidden).norm(dim=1) / first.clamp(min=1e-12)
        own = torch.tensor(task.plan.is_variant).logical_not().to(first)
        return mean_by_concept(shares, task.plan.concept_of, first * own)

    def moved(self, hidden: Tensor, task: Task) -> list[float]:
        """Return how far states (n, d_out) moved towards the goals by new concept, as a share of the whole way.

        It is the projection of the moves of all keys side by side, as `LayerMeasures.closed` is that of the updates.
        """
        way = self.states - self.start
        squares = way.square().sum(dim=1)
        shares = ((hidden - self.start) * way).sum(dim=1) / squares.clamp(min=1e-24)
        return mean_by_concept(shares, task.plan.concept_of, squares * task.weights(squares))


@dataclass(frozen=True)
class LayerSystem:
    """The keys and residuals of a layer, those of the base edit first.

    Attributes:
        blocks: The blocks of the layer.
        touched: Indices of the blocks that the keys cover.
        keys: (n, sum of d_in over the touched blocks).
        residuals: (n, d_out).
        support: (d_out, columns of the keys) bool, where the weight is not zero, if the edit keeps its zeros.
    """

    blocks: LayerBlocks
    touched: tuple[int, ...]
    keys: Tensor
    residuals: Tensor
    support: Tensor | None

    def metric(
        self, moments: Sequence[Tensor], config: EditConfig, templates: States | None, retained: Tensor | None = None
    ) -> WhitenedMetric | ProjectedMetric | WeighedKeys:
        """Return the metric of a dense layer, or the keys of a mixture under its metric.

        Args:
            moments: The second moment of each block.
            config: The settings.
            templates: The keys of the templates' own tokens.
            retained: The keys of retained names, which follow the others in the product of a mixture.
        """
        if not self.blocks.is_mixture:
            (moment,) = moments
            held = None if templates is None else templates.keys
            return build_metric(moment.to(self.keys.device), config, held, density=density(self.support))
        columns = dict(zip(self.touched, self.blocks.columns(self.touched), strict=True))
        template_keys: dict[int, Tensor] = {}
        if templates is not None and templates.keys is not None:
            places = zip(templates.blocks, self.blocks.columns(templates.blocks), strict=True)
            template_keys = {block: templates.keys[:, place] for block, place in places}
        keys = self.keys if retained is None else torch.cat([self.keys, retained])
        return weigh_keys(keys, columns, moments, config, template_keys, density(self.support))


def keys_and_residuals(task: Task, layer: int, states: States, goals: Goals, layers_left: int) -> LayerSystem:
    """Return the keys and residuals of a layer.

    The residual is an equal share of the remaining distance: 1 / (all layers) if the states were read before the
    first edit, otherwise 1 / (layers that are not edited yet).
    """
    assert states.keys is not None
    blocks = layer_blocks(task.architecture, layer)
    share = 1 / (len(task.layers) if task.config.measure == "once" else layers_left)
    keys, residuals = states.keys, ((goals.states - states.hidden) * share).to(blocks.device)
    if states.gains is not None:
        residuals = divide_by_gains(residuals, states.gains.to(blocks.device), len(blocks.blocks[0].weight))
    task.check_finite("keys", layer, keys)
    task.check_finite("residuals", layer, residuals)
    if any(weight != 1 for weight in task.plan.weights):
        roots = task.weights(residuals).sqrt()[:, None]
        keys, residuals = keys * roots, residuals * roots
    touched = states.blocks
    if not touched:
        raise InputError(
            f"No expert of {blocks.name} is called at the tokens of the concepts, so an edit of layer {layer} has no "
            "effect. Edit other layers (layers, --layers)."
        )
    if task.base_edit is None:
        return LayerSystem(blocks, touched, keys, residuals, find_support(task.config, blocks, touched))
    base = next(update for update in task.base_edit.updates if update.layer == layer)
    union = tuple(sorted({*base.blocks, *touched}))
    held = blocks.arranged(base.keys.to(keys), base.blocks, union)
    keys = torch.cat([held, blocks.arranged(keys, touched, union)])
    residuals = torch.cat([base.residuals.to(residuals), residuals])
    return LayerSystem(blocks, union, keys, residuals, find_support(task.config, blocks, union))
