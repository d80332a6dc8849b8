"""The metric of a mixture of experts, read as one wide weight: block-diagonal, with one block for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.config import EditConfig
from rocr.errors import GuardError
from rocr.solve.metric import build_metric


@dataclass(frozen=True)
class WeighedKeys:
    """Wide keys K under the block-diagonal metric M of a mixture.

    Attributes:
        product: K M, (n, sum of d_in over the touched blocks) float32.
        ordinary: Mean squared length of ordinary keys under the metric, tr(C M), summed over all blocks.
        touched: Number of blocks that K covers.
        count: Number of blocks of the layer.
        description: Description of the metric of a block.
    """

    product: Tensor
    ordinary: float
    touched: int
    count: int
    description: str

    def describe(self) -> str:
        """Return the method and the number of experts."""
        return f"{self.description}, {self.touched} of {self.count} experts"


def weigh_keys(
    keys: Tensor,
    columns: Mapping[int, slice],
    moments: Sequence[Tensor],
    config: EditConfig,
    template_keys: Mapping[int, Tensor],
    density: float = 1.0,
) -> WeighedKeys:
    """Multiply wide keys by the metric of a mixture. One block's metric is in memory at a time.

    The second moment of the wide key is taken as block-diagonal: the blocks C_e are the experts' own second moments,
    all divided by the same number of tokens, and the mean of its diagonal is that over all blocks.

    Args:
        keys: K (n, sum of d_in over the touched blocks) float32.
        columns: For each touched block, its columns in K.
        moments: For each block of the layer C_e, (d_in, d_in).
        config: The settings; see `build_metric`.
        template_keys: For some blocks, (h, d_in) gated keys of the templates' own tokens.
        density: As for `build_metric`, of the weights of all touched blocks.

    Raises:
        GuardError: See `build_metric`; or no direction of a touched block is free.
    """
    traces = sum(float(moment.diagonal().double().sum()) for moment in moments)
    scale = traces / sum(len(moment) for moment in moments)
    if not scale > 0:
        raise GuardError("The second moments of all experts are zero: collect the statistics again, on ordinary text.")
    product, ordinary, description = torch.empty_like(keys), 0.0, ""
    for block, moment in enumerate(moments):
        place = columns.get(block)
        # The trace of a block that no key is routed to is needed for a relative ridge only.
        if place is None and not (config.relative_ridge and moment.any()):
            continue
        metric = build_metric(moment.to(keys.device), config, template_keys.get(block), scale, density)
        ordinary += metric.ordinary
        if place is not None:
            product[:, place] = metric.apply(keys[:, place]).float()
            description = metric.describe()
    if not product.any():
        raise GuardError(
            f"No direction of the {len(columns)} experts that the concepts are routed to is free under the metric "
            f"({config.method}), so the edit would be zero. Raise the threshold."
        )
    return WeighedKeys(product, ordinary, len(columns), len(moments), description)
