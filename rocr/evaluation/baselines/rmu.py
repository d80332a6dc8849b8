"""RMU, representation misdirection for unlearning (Li et al., arXiv 2403.03218, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rocr.evaluation.baselines.layer_outputs import states_after
from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.baselines.training import Schedule, float32_weights, in_turn, optimise, restored, trainable
from rocr.model.architecture import find_architecture
from rocr.model.blocks import find_blocks

STEERING = 6.5
RETAIN_WEIGHT = 1200.0
LAYER, OF_DEPTH = 7, 32
TRAINED_LAYERS = 3
SCHEDULE = Schedule(5e-5, batch=4, epochs=1, weight_decay=0.01, clip=None, steps=150)


def steered_layer(depth: int) -> int:
    """Return the layer whose states are steered: 7 of 32, scaled to the depth of the model."""
    return max(min(TRAINED_LAYERS - 1, depth - 1), round(LAYER * depth / OF_DEPTH))


@contextmanager
def _unlearned(case: Case) -> Iterator[Unlearned]:
    """Train three down-projections so that states at texts about the target become one random vector.

    With h_t the state of token t after layer l, of d features, h⁰_t that of the unedited model and u a random unit
    vector:

        loss = mean_t |h_t − c u|²/d          on a question about the target with its answer
             + 1200 mean_t |h_t − h⁰_t|²/d    on one about another subject

    Source:
        arXiv 2403.03218, section 4: u is uniform on [0, 1) in each feature, then normalised; c = 6.5, the retain weight
        of 1200, layer l = 7 with the down-projections of layers 5 to 7, AdamW with a rate of 5e-5 and torch's weight
        decay of 0.01, and 150 batches of 4 are the authors' values for Zephyr-7B, of 32 layers
        (centerforaisafety/wmdp).

    What is chosen here: the layer is scaled to the depth of the model. The forget and retain texts are the questions
    with their answers, in place of corpora. Weights are trained in float32 and rounded to the dtype of the model after
    each step.
    """
    architecture = find_architecture(case.model)
    layer = steered_layer(architecture.depth)
    forget, retain = [[*e.prompt, *e.answer] for e in case.forget()], [[*e.prompt, *e.answer] for e in case.retain()]
    schedule = SCHEDULE.of(case)
    generator = torch.Generator().manual_seed(schedule.seed)
    layers = range(max(0, layer - TRAINED_LAYERS + 1), layer + 1)
    weights = [weight for blocks in find_blocks(architecture, layers).values() for weight in blocks.parameters]
    with restored(weights):
        with trainable(case.model):
            with torch.no_grad():
                kept = [states_after(architecture, layer, tokens).float() for tokens in retain]
            direction = torch.rand(kept[0].shape[-1], generator=generator).to(kept[0].device)
            control = STEERING * direction / direction.norm()
            others = in_turn(len(retain), schedule.seed)

            def terms(index: int) -> Iterator[Tensor]:
                yield mean_square(states_after(architecture, layer, forget[index]), control)
                other = next(others)
                yield RETAIN_WEIGHT * mean_square(states_after(architecture, layer, retain[other]), kept[other])

            with float32_weights(weights) as (copies, write):
                optimise(copies, len(forget), terms, schedule, case.progress, write)
        yield Unlearned(case.model)


def mean_square(states: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over tokens and features of the squared difference of states (tokens, d) from wanted ones."""
    return (states.float() - wanted).square().mean()


RMU = Method("RMU", _unlearned, trains_on_others=True, sequential=True)
