"""Bootstrap intervals over subjects (Efron, Annals of Statistics 7, 1979): how sure a mean of scores is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

LEVEL = 0.95
DRAWS = 2000
MOST_EXACT = 5
"""Up to so many subjects all samples are enumerated (5⁵ = 3,125), and nothing is random."""
MOST_UNDEFINED = 0.05
"""Share of samples without a value from which there is no interval."""
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
        low: Its lower end.
        high: Its upper end.
        subjects: Number of subjects that were drawn from.
    """

    low: float
    high: float
    subjects: int


def interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[Tensor], Tensor],
    seed: int = 0,
    level: float = LEVEL,
    draws: int = DRAWS,
    most_exact: int = MOST_EXACT,
) -> Interval | None:
    """Return the bootstrap interval of a statistic of means over subjects.

    Subjects, the rows, are drawn with replacement. The questions of one subject are asked about one thing that is
    forgotten or not, so that they are not drawn one by one.

    Args:
        rows: Values of each subject, (subjects, values), such as scores before and after.
        statistic: Function from means over the drawn subjects, (samples, values) float64, to (samples,); NaN where it
            is not defined.
        seed: Seed of the samples.
        level: Share of the samples inside the interval.
        draws: Number of samples, unless all are enumerated.
        most_exact: Largest number of subjects for which all samples are enumerated.

    Returns:
        The interval, rounded outwards to samples that occur. None for fewer than two subjects, or if the statistic is
        not defined in more than 5% of the samples.
    """
    if len(rows) < 2:
        return None
    values = torch.tensor([list(row) for row in rows], dtype=torch.float64)
    found = statistic(_means(values, seed, draws, most_exact)).double()
    defined = found[~found.isnan()]
    if len(defined) < (1 - MOST_UNDEFINED) * len(found):
        return None
    tail = (1 - level) / 2
    ordered = defined.sort().values
    last = len(ordered) - 1
    low, high = ordered[math.floor(tail * last)], ordered[math.ceil((1 - tail) * last)]
    return Interval(float(low), float(high), len(rows))


def _means(values: Tensor, seed: int, draws: int, most_exact: int) -> Tensor:
    """Return the means (samples, values) over the subjects of each sample."""
    count = len(values)
    if count <= most_exact:
        return values[torch.tensor(list(product(range(count), repeat=count)))].mean(dim=1)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, CHUNK_ENTRIES // values.numel())
    means = []
    for start in range(0, draws, step):
        chosen = torch.randint(count, (min(step, draws - start), count), generator=generator)
        means.append(values[chosen].mean(dim=1))
    return torch.cat(means)
