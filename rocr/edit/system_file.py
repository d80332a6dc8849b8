"""The part of an edit file that holds the systems from which updates can be solved again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rocr.io.json_values import flag_of, numbers_of, text_of
from rocr.solve.metric import ProjectedMetric, WhitenedMetric
from rocr.solve.solve import RetainedRows, System


def pack_system(system: System) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a system as JSON values, and its tensors by name."""
    entry: dict[str, Any] = {"ridge": system.ridge}
    tensors: dict[str, Tensor] = {}
    if system.retained is not None:
        tensors["retained"] = system.retained.keys
        if system.retained.product is not None:
            tensors["retained_product"] = system.retained.product
    metric = system.metric
    if isinstance(metric, WhitenedMetric):
        entry |= {"metric": "whitened", "gamma": metric.gamma, "ordinary": metric.ordinary}
        return entry, tensors | {"metric": metric.factor}
    if isinstance(metric, ProjectedMetric):
        entry |= {"metric": "projected", "protected": metric.protected, "ordinary": metric.ordinary}
        return entry, tensors | {"metric": metric.basis}
    assert system.product is not None, "a system has a product or a metric"
    return entry, tensors | {"product": system.product}


def unpack_system(entry: dict[str, Any], tensors: dict[str, Tensor], n: int, d_in: int, retained: int = 0) -> System:
    """Return the inverse of `pack_system`, for a layer with n keys of size d_in and a number of retained rows.

    Raises:
        KeyError, TypeError, ValueError: The values or tensors are not those of such a system.
    """
    (ridge,) = numbers_of([entry["ridge"]], "ridge", 1)
    if not 0 < ridge < math.inf:
        raise ValueError(f"the ridge is {ridge}, not a positive finite number")
    rows = None
    if retained:
        products = None if "metric" in entry else _checked(tensors["retained_product"], (retained, d_in))
        rows = RetainedRows(_checked(tensors["retained"], (retained, d_in)), products)
    if "metric" not in entry:
        return System(ridge, product=_checked(tensors["product"], (n, d_in)), retained=rows)
    (ordinary,) = numbers_of([entry["ordinary"]], "ordinary", 1)
    if text_of(entry["metric"], "metric") == "whitened":
        (gamma,) = numbers_of([entry["gamma"]], "gamma", 1)
        whitened = WhitenedMetric(_checked(tensors["metric"], (d_in, d_in)), gamma, ordinary)
        return System(ridge, metric=whitened, retained=rows)
    if entry["metric"] != "projected":
        raise ValueError(f"the metric is {entry['metric'][:60]!r}, not 'whitened' or 'projected'")
    basis = _checked(tensors["metric"], (d_in, tensors["metric"].shape[-1]))
    projected = ProjectedMetric(basis, flag_of(entry["protected"], "protected"), ordinary)
    return System(ridge, metric=projected, retained=rows)


def _checked(values: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(values.shape) != shape or values.dtype != torch.float32 or not torch.isfinite(values).all():
        raise ValueError(f"a system has {values.dtype} of shape {tuple(values.shape)}, not finite float32 of {shape}")
    return values
