"""Weights of the rows of a system, by which chosen keys close a share of their residual at least."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from rocr.solve.metric import FactoredMetric
from rocr.solve.mixture import WeighedKeys

AnyMetric = TypeVar("AnyMetric", bound="FactoredMetric | WeighedKeys")


MAX_WEIGHT = 20.0
"""Largest weight of a row. A key with hardly a part in the free directions would need a large update to be closed."""


def weigh_rows(
    keys: Tensor, residuals: Tensor, metric: AnyMetric, ridge: float, least_closed: Tensor
) -> tuple[Tensor, Tensor, AnyMetric]:
    """Multiply rows of a system by the roots of their weights, so that each key alone closes a share of its residual.

    A key k that is alone closes kᵀMk / (kᵀMk + λ) of its residual, and kᵀMk / (kᵀMk + λ/w) with the weight w. The
    weight for a share of at least c is w = λ/kᵀMk · c/(1 − c), within 1 and `MAX_WEIGHT`. It depends on no other key,
    so that an edit of fewer or more concepts has the same rows.

    Args:
        keys: K (n, d_in) float32.
        residuals: R (n, d_out) float32.
        metric: M, or the product of the keys with M for a mixture of experts.
        ridge: λ > 0, in units of a squared key.
        least_closed: (n,) the shares c, 0 <= c < 1. Rows of 0 stay as they are.

    Returns:
        The keys, the residuals and the metric. A product of the first n rows is multiplied like the keys.
    """
    chosen = least_closed.nonzero().flatten().to(keys.device)
    if not len(chosen):
        return keys, residuals, metric
    shares = least_closed.to(keys.device)[chosen]
    lengths = _squared_lengths(keys, chosen, metric).clamp(min=torch.finfo(torch.float32).tiny)
    needed = ridge / lengths * shares / (1 - shares)
    roots = torch.ones(len(keys), dtype=keys.dtype, device=keys.device)
    roots[chosen] = needed.clamp(1.0, MAX_WEIGHT).sqrt().to(roots)
    if isinstance(metric, WeighedKeys):
        product = metric.product.clone()
        product[: len(keys)] *= roots[:, None]
        metric = replace(metric, product=product)
    return keys * roots[:, None], residuals * roots[:, None].to(residuals), metric


def _squared_lengths(keys: Tensor, rows: Tensor, metric: FactoredMetric | WeighedKeys) -> Tensor:
    """Return kᵀMk for some rows of the keys, float32 or float64."""
    if isinstance(metric, WeighedKeys):
        return (keys[rows] * metric.product[rows]).sum(dim=1)
    return metric.root(keys[rows]).square().sum(dim=1)
