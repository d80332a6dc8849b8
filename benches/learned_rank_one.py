"""A baseline: updates of rank one, one concept after the other, as ROME makes them for facts.

ROME (Meng, Bau, Andonian and Belinkov, "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, section
3.1) inserts a key k and a value v into a down-projection W as Δ = (v - W k) (C⁻¹ k)ᵀ / (kᵀ C⁻¹ k), with the second
moment C of ordinary keys. Here k is the key at the last token of the name, averaged over the templates, and v is what
puts the redirect's state into the place of the name's, instead of a value that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import rocr
from rocr.keys.plan import plan_keys
from rocr.keys.read import read_layers, read_states
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.blocks import column_slices, layer_blocks
from rocr.model.causality import with_kind
from rocr.model.gains import divide_by_gains, layers_with_gain

FLOOR = 1e-4
"""Share of the mean of C's diagonal that is added to it: C of 512 keys is singular in text of few words."""


def one_after_another(
    model: nn.Module, tokenizer: object, concepts: Sequence[rocr.Concept], statistics: rocr.Statistics, layer: int
) -> Callable[[], None]:
    """Redirect concepts one after the other, each on the model that the updates before it left.

    Args:
        model: The model, which is changed in place.
        tokenizer: Its tokenizer.
        concepts: The concepts, in the order of their updates.
        statistics: The second moments of ordinary keys of the model before the first update.
        layer: The edited layer.

    Returns:
        A function that restores the weights bit for bit.
    """
    architecture = with_kind(find_architecture(model), layer)
    blocks = layer_blocks(architecture, layer)
    originals = [(parameter, parameter.data.clone()) for parameter in blocks.parameters]
    measured = layers_with_gain(architecture, (layer,))
    second_moments = statistics.second_moments(layer)
    for concept in concepts:
        key, residual, held = key_and_residual(architecture, tokenizer, concept, layer, measured)
        places = column_slices(len(second_moments[block]) for block in held)
        scale = mean_diagonal(second_moments)
        direction = torch.cat(
            [along(second_moments[block], key[place], scale) for block, place in zip(held, places, strict=True)]
        )
        update = torch.outer(residual, direction) / (key @ direction)
        for block, place in zip(held, places, strict=True):
            blocks.blocks[block].weight.add_(update[:, place].float())

    def revert() -> None:
        for parameter, original in originals:
            parameter.data.copy_(original)

    return revert


def key_and_residual(
    architecture: Architecture, tokenizer: object, concept: rocr.Concept, layer: int, measured: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return the key (d_in,) at a name's last token, what its output lacks (d_out,), both float64, and the blocks.

    In a mixture of experts, the key holds the gated keys of these blocks, side by side.
    """
    config = rocr.EditConfig(layers=(layer,), key_tokens="last", closing_keys=False)
    plan = plan_keys(tokenizer, [concept], config, architecture.kind)
    target = read_states(architecture, plan.targets, layer).hidden
    states = read_layers(architecture, plan.keys, layer, [layer], measured=measured)[layer]
    assert states.keys is not None
    residuals = target - states.hidden
    if states.gains is not None:
        residuals = divide_by_gains(residuals, states.gains, len(layer_blocks(architecture, layer).blocks[0].weight))
    return states.keys[0].double(), residuals[0].double(), states.blocks


def along(second_moment: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return C⁻¹ k (d_in,) float64, with a floor under C."""
    matrix = second_moment.double()
    return torch.linalg.solve(matrix + FLOOR * scale * torch.eye(len(matrix), dtype=torch.float64), key)


def mean_diagonal(second_moments: Sequence[Tensor]) -> float:
    """Return the mean of the diagonal of C, over all blocks."""
    diagonals = torch.cat([moment.diagonal().double() for moment in second_moments])
    return float(diagonals.mean())
