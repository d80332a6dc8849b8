"""Measurements of an edit of experts: to which of them concepts are routed, and how well statistics cover them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rocr.concepts import Concept
from rocr.io.json_values import list_of, numbers_of, text_of, whole_number_of
from rocr.keys.routed import Routing
from rocr.statistics.statistics import MixtureMoments

FEW_TOKENS = 256
"""The number of tokens in the statistics below which an expert counts as hardly covered: its second moment then has few
directions, so that an update of the expert is free to move other text."""
MAIN_SHARE = 0.05
"""The share of a concept's routing weight from which an expert counts for the concept."""


@dataclass(frozen=True)
class LayerRouting:
    """How the concepts of an edit are routed in one layer.

    Attributes:
        layer: The decoder layer.
        experts: Number of blocks of the layer, routed and shared.
        touched: Indices of the blocks that the edit changes.
        tokens: For each touched block, the number of tokens of the statistics that were routed to it.
        agreement: For each concept, the share of its routing weight that goes to experts to which every template routes
            the same token of its name. Shared experts do not count. 1 if no routed expert is called.
        uncovered: Names of the concepts of which more than 5% of the routing weight goes to experts with fewer than 256
            tokens in the statistics.
    """

    layer: int
    experts: int
    touched: list[int]
    tokens: list[int]
    agreement: list[float]
    uncovered: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], concepts: int) -> LayerRouting:
        """Return the inverse of `to_json`; raises as `EditReport.from_json`."""
        found = cls(**values)
        whole_number_of(found.layer, "layer")
        whole_number_of(found.experts, "experts")
        for name in ("touched", "tokens"):
            for value in list_of(getattr(found, name), name):
                whole_number_of(value, name)
        numbers_of(found.agreement, "agreement", concepts)
        for name in list_of(found.uncovered, "uncovered"):
            text_of(name, "uncovered")
        return found

    def of_concepts(self, concepts: Sequence[Concept], indices: Sequence[int], blocks: Sequence[int]) -> LayerRouting:
        """Return the routing of some of the concepts, for an edit of these blocks.

        Args:
            concepts: The remaining concepts.
            indices: Their indices in this report.
            blocks: The blocks that the edit changes.
        """
        tokens = dict(zip(self.touched, self.tokens, strict=True))
        names = {concept.name for concept in concepts}
        return replace(
            self,
            touched=list(blocks),
            tokens=[tokens.get(block, 0) for block in blocks],
            agreement=[self.agreement[i] for i in indices],
            uncovered=[name for name in self.uncovered if name in names],
        )

    def joined(self, other: LayerRouting, blocks: Sequence[int]) -> LayerRouting:
        """Return the routing of the concepts of both reports, for an edit of these blocks."""
        tokens = dict(zip([*self.touched, *other.touched], [*self.tokens, *other.tokens], strict=True))
        return replace(
            self,
            touched=list(blocks),
            tokens=[tokens.get(block, 0) for block in blocks],
            agreement=[*self.agreement, *other.agreement],
            uncovered=[*self.uncovered, *other.uncovered],
        )


def measure_routing(
    layer: int,
    routing: Routing,
    concept_of: Sequence[int],
    concepts: Sequence[Concept],
    moments: MixtureMoments,
    tokens: int,
) -> LayerRouting:
    """Measure the routing of some concepts in one layer.

    Args:
        layer: The decoder layer.
        routing: To which blocks the tokens of each key are routed.
        concept_of: For each key, the index of its concept.
        concepts: The concepts.
        moments: The second moments of the layer.
        tokens: Number of tokens of the statistics.
    """
    chosen = torch.tensor(routing.blocks, dtype=torch.int64)
    seen = moments.routed[chosen]
    # A shared expert is called for every token.
    weights = routing.weights * (seen < tokens)
    is_agreed = routing.tokens == routing.of[:, None]
    index = torch.tensor(concept_of)
    zeros = torch.zeros(len(concepts))
    total = zeros.index_add(0, index, weights.sum(dim=1))
    agreed = zeros.index_add(0, index, (weights * is_agreed).sum(dim=1))
    few = zeros.index_add(0, index, (weights * (seen < FEW_TOKENS)).sum(dim=1))
    share = torch.where(total > 0, agreed / total.clamp(min=1e-30), 1.0)
    uncovered = [concept.name for concept, part, of in zip(concepts, few, total, strict=True) if part > MAIN_SHARE * of]
    return LayerRouting(
        layer, len(moments.moments), list(routing.blocks), seen.tolist(), [float(value) for value in share], uncovered
    )
