"""The impact of an edit on retained names: how far it moves the outputs at their keys, and through which concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept, check_names, folded
from rocr.config import EditConfig
from rocr.edit.controls import Control, choose_controls, kept_names
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
from rocr.io.json_values import flag_of, list_of, numbers_of, text_of, whole_number_of
from rocr.keys.plan import plan_names
from rocr.keys.read import States, read_layers
from rocr.keys.variants import variants_of
from rocr.model.architecture import Architecture, positions_of
from rocr.model.blocks import LayerBlocks
from rocr.progress import ProgressCallback
from rocr.solve.solve import Solution

MAX_REPORTED = 20
"""Largest number of entries in each list of a report."""
MAX_REDIRECTS = 200
"""Largest number of redirects that are measured when no retained names are given."""
CHUNK_ENTRIES = 1 << 22
"""Largest number of float32 values that one step of `part_moves` allocates per matrix."""


@dataclass(frozen=True)
class RetainImpact:
    """The impact of an edit, or of one concept's part of it, on one retained name.

    Attributes:
        name: The retained name.
        concept: Name of the concept whose part of the update is measured. None stands for the whole update.
        layer: The layer with the largest share.
        share: |Δ k| / |W k|, where Δ is the measured part of the update. Maximum over the keys k of the name and over
            the edited layers. Without a unit.
    """

    name: str
    concept: str | None
    layer: int
    share: float

    @property
    def neighbour(self) -> str:
        """The name of this attribute in rocr 0.1; same as `name`."""
        return self.name

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. The file format calls the name `neighbour`, as in rocr 0.1."""
        return {"neighbour": self.name, "concept": self.concept, "layer": self.layer, "share": self.share}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RetainImpact:
        """Return the inverse of `to_json`; raises as `EditReport.from_json`."""
        other = dict(values)
        found = cls(name=other.pop("neighbour"), **other)
        text_of(found.name, "neighbour")
        if found.concept is not None:
            text_of(found.concept, "concept")
        whole_number_of(found.layer, "layer")
        numbers_of([found.share], "share", 1)
        return found


@dataclass(frozen=True)
class RetainReport:
    """The impact of an edit on all retained names.

    Attributes:
        given: Whether the caller gave names, which precede the controls then. If not, the redirects of the concepts do.
        count: Number of names measured, each at all keys of its name in the unedited model.
        mean: Mean of `share` over the names, for the whole update.
        moved: The names with the largest shares for the whole update, at most 20, largest first.
        worst: The pairs of a name and a concept with the largest shares for the concept's part of the update, at most
            20, largest first. The parts of all concepts sum to the update.
        controls: The names that were chosen because an edit of the concepts is likely to harm them, see
            `rocr.edit.controls`.
    """

    given: bool
    count: int
    mean: float
    moved: list[RetainImpact] = field(default_factory=list)
    worst: list[RetainImpact] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values. An empty list of controls is left out."""
        lists = {name: [impact.to_json() for impact in getattr(self, name)] for name in ("moved", "worst")}
        values = asdict(self) | lists
        if not self.controls:
            del values["controls"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RetainReport:
        """Return the inverse of `to_json`; raises as `EditReport.from_json`."""
        lists = {
            name: [RetainImpact.from_json(impact) for impact in list_of(values[name], name)]
            for name in ("moved", "worst")
        }
        found = cls(**{**values, **lists})
        flag_of(found.given, "given")
        whole_number_of(found.count, "count")
        numbers_of([found.mean], "mean", 1)
        for name in list_of(found.controls, "controls"):
            text_of(name, "controls")
        return found


@dataclass
class RetainedNames:
    """Retained names with their keys, and the largest shares measured so far.

    Attributes:
        names: The retained names.
        given: Whether the caller gave them.
        name_of: For each key, the index of its name.
        states: For each edited layer, the states with (m, d_in) float32 keys in the unedited model.
        controls: Those of the names that are controls.
    """

    names: list[str]
    given: bool
    name_of: list[int]
    states: dict[int, States]
    controls: list[Control] = field(default_factory=list)
    _by_name: dict[int, tuple[float, int]] = field(default_factory=dict)
    _by_pair: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)

    def measure(self, blocks: LayerBlocks, update: LayerUpdate, solution: Solution, concept_of: Sequence[int]) -> None:
        """Measure the update of one layer before it is applied.

        Args:
            blocks: The blocks of the layer, without the update.
            update: The update.
            solution: The solution that gives the update.
            concept_of: For each key of the update, the index of its concept.
        """
        layer = update.layer
        states = self.states[layer]
        assert states.keys is not None, "keys were read"
        keys = states.keys.to(update.keys)
        outputs = blocks.outputs(keys, states.blocks).norm(dim=1).clamp(min=1e-30)
        keys = blocks.arranged(keys, states.blocks, update.blocks)
        whole = update.factors.moves(keys).norm(dim=1) / outputs
        for name, share in enumerate(self._largest_by_name(whole[None])[0].tolist()):
            self._by_name[name] = max(self._by_name.get(name, (-1.0, 0)), (share, layer))
        for concepts, moves in part_moves(
            solution.coefficients(update.keys, keys), len(keys), update.residuals, concept_of
        ):
            shares = self._largest_by_name(moves / outputs)
            values, places = shares.flatten().topk(min(MAX_REPORTED, shares.numel()))
            for share, place in zip(values.tolist(), places.tolist(), strict=True):
                pair = (place % len(self.names), concepts[place // len(self.names)])
                self._by_pair[pair] = max(self._by_pair.get(pair, (-1.0, 0)), (share, layer))
        largest = sorted(self._by_pair.items(), key=lambda item: -item[1][0])
        self._by_pair = dict(largest[:MAX_REPORTED])

    def most_moved(self, concepts: Sequence[str], count: int) -> list[tuple[str, str | None]]:
        """Return names with the largest shares so far, each with the concept that moves it: given ones, then controls.

        Of the controls, these are at first the most moved one of each concept, then the second, and so on. Names that
        begin with the same tokens often have the same share, and those of the package's list come first then.

        Args:
            concepts: Names of the concepts of the edit.
            count: Largest number of names.
        """
        concept_of = {control.name: control.concept for control in self.controls}
        for (name, concept), _ in sorted(self._by_pair.items(), key=lambda item: item[1][0]):
            concept_of[self.names[name]] = concepts[concept]
        shares = {name: self._by_name[i][0] for i, name in enumerate(self.names)}
        order = sorted(self.names[: -len(self.controls) or None], key=lambda name: -shares[name]) if self.given else []
        if len(order) < count:
            ranked = sorted(self.controls, key=lambda control: (-round(shares[control.name], 3), not control.listed))
            of_concept: dict[str, list[str]] = {}
            for control in ranked:
                of_concept.setdefault(control.concept, []).append(control.name)
            order += [name for names in zip_longest(*of_concept.values()) for name in names if name is not None]
        return [(name, concept_of.get(name)) for name in order[:count]]

    def report(self, concepts: Sequence[str]) -> RetainReport:
        """Return the report of the measured layers, for an edit of concepts with these names."""
        moved = [RetainImpact(self.names[name], None, layer, share) for name, (share, layer) in self._by_name.items()]
        worst = [
            RetainImpact(self.names[name], concepts[concept], layer, share)
            for (name, concept), (share, layer) in self._by_pair.items()
        ]
        mean = sum(impact.share for impact in moved) / len(moved)
        moved.sort(key=lambda impact: -impact.share)
        controls = [control.name for control in self.controls]
        return RetainReport(self.given, len(self.names), mean, moved[:MAX_REPORTED], worst, controls)

    def _largest_by_name(self, shares: Tensor) -> Tensor:
        """Return the largest share over the keys of each name: (rows, m) to (rows, names)."""
        index = torch.tensor(self.name_of, device=shares.device).expand(len(shares), -1)
        return shares.new_zeros(len(shares), len(self.names)).scatter_reduce(1, index, shares, "amax")


def read_retained_names(
    architecture: Architecture,
    tokenizer: Any,
    concepts: Sequence[Concept],
    names: Sequence[str] | None,
    config: EditConfig,
    progress: ProgressCallback,
    propose: bool = True,
) -> RetainedNames | None:
    """Read the keys of retained names in the unedited model.

    Args:
        architecture: The model.
        tokenizer: Its tokenizer.
        concepts: The concepts that are unlearned.
        names: The retained names. None stands for the redirects, at most 200 of them, and the controls. Names that are
            given are followed by the controls if the settings have a weight for them; no name, by none.
        config: The settings, with layers.
        progress: Called after every batch.
        propose: Whether the model proposes some of the controls, also if they are only measured.

    Returns:
        The names with their keys. None if there is no name to measure.

    Raises:
        InputError: `names` is no list of names, a name breaks the rules for a name of a concept, is itself unlearned,
            has no token that can be a key, or exceeds the positions of the model.
    """
    chosen = list(dict.fromkeys(concept.redirect for concept in concepts))[:MAX_REDIRECTS]
    controls: list[Control] = []
    if names is not None:
        chosen = _checked_names(names, concepts)
        if not chosen:
            return None
    if names is None or config.retain_weight > 0:
        layer = min(config.layer_numbers)
        propose = propose or config.retain_weight > 0
        kept = kept_names(names)
        controls = choose_controls(
            architecture,
            tokenizer,
            concepts,
            layer,
            propose=propose,
            progress=progress,
            chat=config.chat,
            variants=[] if config.variants == "none" else list(chain(*variants_of(concepts, config.seed, kept=kept))),
        )
        given = set(map(folded, chosen))
        controls = [control for control in controls if folded(control.name) not in given]
        chosen += [control.name for control in controls]
    # A control is read in the templates of its concept, where the two share their beginning.
    kind_of = {concept.name: concept.kind for concept in concepts}
    owners = {control.name: control.concept for control in controls}
    kinds = [kind_of[owners[name]] if name in owners else None for name in chosen]
    reading, name_of = plan_names(tokenizer, chosen, config, architecture.kind, kinds)
    reading.check_positions([chosen[name] for name in name_of], positions_of(architecture.model))
    layers = config.layer_numbers
    states = read_layers(architecture, reading, max(layers), layers, progress=progress, stage="retained names")
    return RetainedNames(chosen, names is not None, name_of, states, controls)


def _checked_names(names: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Return the names without duplicates; raise InputError unless all can be retained."""
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"The retained names must be a list of names, not {repr(names)[:100]}.")
    check_names("retained name", names)
    unlearned = {folded(name) for concept in concepts for name in concept.names}
    wrong = [name for name in names if folded(name) in unlearned]
    if wrong:
        shown = ", ".join(map(repr, wrong[:5]))
        raise InputError(
            f"{shown}: a name cannot be both unlearned and retained. Remove it from the concepts or from the retained "
            "names."
        )
    return list(dict.fromkeys(names))


def part_moves(
    coefficients: Callable[[Tensor], Tensor], count: int, residuals: Tensor, concept_of: Sequence[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Compute how far each concept's part of an update moves the outputs: |residualsᵀ a| over the concept's own rows.

    The squared length is aᵀ (R Rᵀ) a, where R are the few rows of one concept, so no output (d_out,) is formed.

    Args:
        coefficients: Maps row indices of keys to their coefficients a at m other keys, (rows, m).
        count: m.
        residuals: (n, d_out).
        concept_of: For each row, the index of its concept.

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
