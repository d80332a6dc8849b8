"""Bottom-rank reversal: remove the largest components of each edited weight, among which an edit can lie.

The attack needs neither the original weights nor a prompt (arXiv 2505.20819).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, scores_of
from rocr.evaluation.attacks.restoring import put, restored
from rocr.model.block import Block
from rocr.ops.arithmetic import plain_arithmetic


@plain_arithmetic()
def largest_directions(weight: Tensor, count: int) -> Tensor:
    """Return the singular vectors of the largest singular values of a weight, on its shorter side, in float64.

    Args:
        weight: (d_out, d_in).
        count: Number of components; at most all are returned.

    Returns:
        (min(d_out, d_in), count), the largest component first.
    """
    values = weight.double()
    gram = values @ values.T if len(values) <= values.shape[1] else values.T @ values
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[:, :count]


def without_directions(weight: Tensor, directions: Tensor) -> Tensor:
    """Return a weight (d_out, d_in) without the components of the given singular vectors, in float64."""
    values = weight.double()
    if len(values) <= values.shape[1]:
        return values - directions @ (directions.T @ values)
    return values - (values @ directions) @ directions.T


@contextmanager
def without_components(blocks: Sequence[Block], count: int) -> Iterator[None]:
    """Remove the `count` largest components of the singular value decomposition of each weight inside the context.

    Raises:
        InputError: `count` is not at least 1.
    """
    if count < 1:
        raise InputError(f"The number of components must be at least 1, not {count}.")
    with restored([block.stored for block in blocks]), plain_arithmetic():
        weights = [block.weight for block in blocks]
        put(weights, [without_directions(w, largest_directions(w, count)).to(w.dtype) for w in weights])
        yield


def bottom_rank(target: Target) -> Iterator[Outcome]:
    """Ask after the removal of each number of components, and the same of the unedited model."""
    before, after = scores_of(target.before), scores_of(target.after)
    for count in target.limits.components:
        with without_components(target.blocks, count):
            found = target.ask(target.forget)
        with target.without_edit(), without_components(target.blocks, count):
            control = scores_of(target.ask(target.forget))
        name = f"{count} components" if count > 1 else "1 component"
        questions = len(target.forget)
        yield Outcome(
            "bottom-rank", name, before, after, scores_of(found), control, questions=questions, evaluation=found
        )


BOTTOM_RANK = Attack(
    "removes the largest components of the singular value decomposition of each edited weight",
    "one decomposition for each edited weight; no prompt, no training, no original weights",
    "the same on the unedited model",
    bottom_rank,
)
