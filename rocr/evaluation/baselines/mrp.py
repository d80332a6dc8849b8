"""MRP, metamorphosis representation projection (Wu et al., arXiv 2508.15449)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rocr.evaluation.baselines.layer_outputs import answer_nll, changed_states, states_after
from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.baselines.training import Schedule, in_turn, optimise, trainable
from rocr.evaluation.lora_training import Example
from rocr.model.architecture import Architecture, find_architecture

DIMENSIONS, LAYERS = 2, 2
RETAIN_WEIGHT = 1.2
SCHEDULE = Schedule(2e-4, batch=5, epochs=2, optimizer="sgd", clip=None)
SPANNED = 1e-5
"""Singular values below this share of the largest are not counted to the span of states."""


@contextmanager
def _unlearned(case: Case) -> Iterator[Unlearned]:
    """Train directions of two layers, which are projected out of the states of every token.

    With h the states after a layer as a row, W (2, d) what is trained and W_old the rows of the targets before:

        h ← h − h Qᵀ Q,  Q the orthonormal rows that span W_old and W (by QR)
        loss = log-likelihood of the answers about the target + 1.2 × negative log-likelihood of those about others

    both as means over tokens. W starts as the two top right singular vectors, uncentred, of the states at questions
    about others, after the span of the states at questions about the target is removed from them.

    Source:
        arXiv 2508.15449; two dimensions, two layers, gradient descent with a rate of 2e-4, 2 epochs, batches of 5 and
        the weight 1.2 are those of the authors' code (ChengcanWu/MRP). That code reads the states that W starts from
        one layer before the one that it changes; here both are after the same layer.

    What is chosen here: the authors draw the layers at random; here they are drawn by the seed, from all but the last
    quarter. They train on 5,000 texts, 1,000 steps an epoch; with a few questions, two epochs hardly move W from its
    start. The span of the target's states is that of the directions with singular values above 1e-5 of the largest; if
    nothing of the others' states is left outside of it, W starts from random directions.
    """
    architecture = find_architecture(case.model)
    schedule = SCHEDULE.of(case)
    layers, before = case.earlier or (_drawn_layers(architecture.depth, case.seed), None)
    forget, retain = case.forget(), case.retain()
    with trainable(case.model), torch.no_grad():
        starts = [_start(architecture, layer, forget, retain, schedule.seed) for layer in layers]
    rows = [nn.Parameter(start) for start in starts]
    older = before or [start.new_zeros(0, start.shape[1]) for start in starts]
    with ExitStack() as stack:
        for layer, old, new in zip(layers, older, rows, strict=True):
            stack.enter_context(changed_states(architecture, layer, partial(project_out, old=old, new=new)))
        with trainable(case.model):
            others = in_turn(len(retain), schedule.seed)

            def terms(index: int) -> Iterator[Tensor]:
                yield -answer_nll(case.model, forget[index])
                yield RETAIN_WEIGHT * answer_nll(case.model, retain[next(others)])

            optimise(rows, len(forget), terms, schedule, case.progress)
        joined = [torch.cat([old, new.detach()]) for old, new in zip(older, rows, strict=True)]
        yield Unlearned(case.model, (layers, joined))


def _drawn_layers(depth: int, seed: int) -> list[int]:
    """Return the layers whose states are projected, drawn by the seed."""
    usable = max(1, depth - max(1, depth // 4))
    order = torch.randperm(usable, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
    return sorted(order[:LAYERS])


def project_out(states: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return states (..., d) without their parts along the rows of old (m, d) and new (n, d), in their dtype."""
    basis: Tensor = torch.linalg.qr(torch.cat([old, new]).T)[0]
    flat = states.float()
    projected: Tensor = flat - (flat @ basis) @ basis.T
    return projected.to(states.dtype)


def _start(
    architecture: Architecture, layer: int, forget: Sequence[Example], retain: Sequence[Example], seed: int
) -> Tensor:
    """Return the rows (2, d) that training starts from."""

    def states(examples: Sequence[Example]) -> Tensor:
        return torch.cat([states_after(architecture, layer, [*e.prompt, *e.answer]).float() for e in examples])

    return outside_directions(states(forget), states(retain), seed)


def outside_directions(forget: Tensor, retain: Tensor, seed: int, count: int = DIMENSIONS) -> Tensor:
    """Return the top right singular vectors (count, d) of retain states, after the span of forget states is removed.

    Args:
        forget: (n, d) states at questions about the target.
        retain: (m, d) states at questions about others.
        seed: Seed of the directions if nothing is left.
        count: Number of directions.
    """
    _, sizes, directions = torch.linalg.svd(forget, full_matrices=False)
    span = directions[sizes > SPANNED * sizes[0]]
    left = retain - (retain @ span.T) @ span
    if left.norm() <= SPANNED * retain.norm():
        left = torch.randn(count, retain.shape[1], generator=torch.Generator().manual_seed(seed)).to(retain)
    found: Tensor = torch.linalg.svd(left, full_matrices=False)[2][:count]
    return found


MRP = Method("MRP", _unlearned, trains_on_others=True, sequential=True)
