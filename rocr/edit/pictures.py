"""Draw what an edit file holds, as SVG: which concepts have nearly the same keys, and which layer moves what."""

from __future__ import annotations

import torch
from torch import Tensor

from rocr.edit.collisions import nearest_concepts
from rocr.edit.edit import Edit
from rocr.edit.measures import mean_by_concept
from rocr.errors import InputError
from rocr.io.svg import Drawing, shortened

SHOWN = 40
"""Largest number of concepts in a picture: those with the nearest keys."""
CELL = 18.0
NAMES = 190.0
MOST_CHARACTERS = 24
WIDE = 46.0
HEAD = 62.0


def edit_picture(edit: Edit) -> Drawing:
    """Return a drawing of an edit: the cosines of its concepts' keys as a sorted matrix, and its layers beside it.

    Keys are those of the first edited layer, compared under the metric; see `rocr.edit.collisions`. Concepts with near
    keys are next to each other. A cell of a layer is the share of the movement of a concept's outputs, over all edited
    layers, that is made in that layer.

    Raises:
        InputError: The edit has no updates, or was written without its systems.
    """
    if not edit.updates:
        raise InputError("The edit has no updates, so that there is nothing to draw.")
    chosen, cosines = nearest_concepts(edit.concept_of, edit.updates[0], SHOWN)
    order = chain(cosines)
    names = [edit.concepts[chosen[i]].name for i in order]
    cosines = cosines[order][:, order]
    shares = layer_shares(edit)[[chosen[i] for i in order]]
    matrix, layers = CELL * len(names), WIDE * len(edit.updates)
    size = (max(NAMES + matrix + 40 + layers + 10, 640.0), HEAD + matrix + 46)
    left_out = len(edit.concepts) - len(names)
    drawing = Drawing(*size, f"Keys and layers of an edit of {len(edit.concepts):,} concepts")
    more = f", the {len(names)} of {len(edit.concepts):,} concepts with the nearest keys" if left_out else ""
    drawing.text(
        0, 14, f"Cosines of keys in layer {edit.layers[0]} under the metric{more}; right: what each layer moves"
    )
    for row, name in enumerate(names):
        y = HEAD + CELL * row
        drawing.text(NAMES - 6, y + CELL - 5, f"{shortened(name, MOST_CHARACTERS)} {row + 1}", "end", "small")
        drawing.text(NAMES + CELL * (row + 0.5), HEAD - 5, str(row + 1), "middle", "small")
        for column, other in enumerate(names):
            value = float(cosines[row, column])
            _cell(drawing, NAMES + CELL * column, y, CELL, value, f"{name}, {other}: {value:.3f}")
        for column, layer in enumerate(edit.layers):
            value = float(shares[row, column])
            x = NAMES + matrix + 40 + WIDE * column
            _cell(drawing, x, y, WIDE, value, f"{name}, layer {layer}: {value:.0%}")
            drawing.text(x + WIDE / 2, y + CELL - 5, f"{value:.0%}", "middle", "small")
    _layers(drawing, edit, NAMES + matrix + 40, HEAD + matrix)
    return drawing


def chain(cosines: Tensor) -> list[int]:
    """Return an order of concepts in which near ones are neighbours: from the nearest pair, always the nearest next.

    Args:
        cosines: (n, n), symmetric up to rounding.
    """
    left = cosines.double().clone()
    left.fill_diagonal_(-2.0)
    order = [int(left.amax(dim=1).argmax())]
    left[:, order[0]] = -3.0
    while len(order) < len(left):
        order.append(int(left[order[-1]].argmax()))
        left[:, order[-1]] = -3.0
    return order


def layer_shares(edit: Edit) -> Tensor:
    """Return the share of the movement of each concept's outputs in each layer, (concepts, layers) float64.

    The movement in a layer is the mean length of Δk over the keys k of the concept.
    """
    moved = []
    for update in edit.updates:
        lengths = update.factors.moves(update.keys).double().norm(dim=1)
        moved.append(torch.tensor(mean_by_concept(lengths, edit.concept_of, torch.ones(len(lengths)))))
    lengths = torch.stack(moved, dim=1).double()
    return lengths / lengths.sum(dim=1, keepdim=True).clamp(min=1e-30)


def _layers(drawing: Drawing, edit: Edit, left: float, bottom: float) -> None:
    """Write the numbers of the layers, and how large each update is beside its weight."""
    sizes = {measured.layer: measured.relative_norm for measured in edit.report.layers}
    for column, layer in enumerate(edit.layers):
        x = left + WIDE * (column + 0.5)
        drawing.text(x, HEAD - 5, str(layer), "middle", "small")
        if layer in sizes:
            drawing.text(x, bottom + 16, f"{sizes[layer]:.1%}", "middle", "small")
    drawing.text(left, HEAD - 22, "layer", kind="small")
    drawing.text(left + WIDE * len(edit.layers), bottom + 34, "update / weight", "end", "small")


def _cell(drawing: Drawing, x: float, y: float, width: float, value: float, title: str) -> None:
    drawing.rect(x, y, width - 1, CELL - 1, "cold")
    drawing.rect(x, y, width - 1, CELL - 1, "hot", title, fill_opacity=min(max(value, 0.0), 1.0))
