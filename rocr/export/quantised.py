"""Write the edited weights of a quantised model: unquantised (`plain`), or in their own scheme again (`keep`).

`keep` loses a part of the update, since an update is often smaller than the steps of the scheme. What arrives at the
concepts' keys is measured, and an output in which too little arrives is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rocr.edit.apply import apply_updates, bits
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight
from rocr.errors import GuardError, InputError
from rocr.model.block import Block
from rocr.model.fingerprint import tensor_digest
from rocr.model.quantised.checkpoint import Quantisation, QuantisedWeight

PLAIN, KEEP, ADAPTER = "plain", "keep", "adapter"
OUTPUTS = (PLAIN, KEEP, ADAPTER)
MIN_SURVIVING = 0.5
"""Smallest share of the update that must survive at the concepts' keys with `keep`."""
ROUNDS = 12
"""Rounds in which `keep` adds what is missing at the keys to the values before they are rounded again."""


@dataclass(frozen=True)
class Requantised:
    """An edited weight of a quantised model in the output.

    Attributes:
        layer: Index of the decoder layer.
        module: Name of the module in the files.
        scheme: The scheme of the weight before the edit.
        output: "plain" or "keep".
        surviving: 1 − ‖E Kᵀ‖ / ‖Δ Kᵀ‖ for the update Δ, the concepts' keys K and the error E that the dtype or scheme
            of the output adds to the weight. 1 loses nothing; at 0 or below, the error is as large as the update.
        error: ‖E‖ / ‖W‖ for the weight W before the edit.
    """

    layer: int
    module: str
    scheme: str
    output: str
    surviving: float
    error: float


@dataclass(frozen=True)
class WrittenQuantised:
    """An edited weight of a quantised model, ready to be written.

    Attributes:
        weight: The weight in the files.
        values: The edited values in a plain dtype: those of the output as loaders dequantise them.
        parts: The parts to write by role with `keep`; None with `plain`.
        applied: The record of the change of the values.
        report: The entry of the report.
    """

    weight: QuantisedWeight
    values: Tensor
    parts: dict[str, Tensor] | None
    applied: Applied
    report: Requantised


def edit_quantised(
    quantisation: Quantisation, weight: QuantisedWeight, projection: Block, update: LayerUpdate, output: str
) -> WrittenQuantised:
    """Add an update to the float32 values of a quantised weight, and quantise or round the result.

    Args:
        quantisation: The quantisation of the model.
        weight: The weight in the files.
        projection: The weight in the model, with the edit applied.
        update: The update.
        output: "plain" or "keep".

    Raises:
        InputError: The files do not hold the weight that was edited.
        GuardError: An edited value is not finite.
    """
    dtype, loaded = quantisation.dtype, projection.parameter.data
    parts = weight.parts()
    before = weight.read(tuple(loaded.shape), parts)
    assert update.applied is not None, "the model has the edit applied"
    if tensor_digest(before.to(loaded.dtype)) != update.applied.before:
        raise InputError(
            f"{weight.module} in {weight.files.folder} does not hold {projection.parameter_name} as it was before the "
            "edit. Use the files that the model was loaded from."
        )
    wanted = _with_update(projection, before, update)
    written = _requantised(weight, wanted, before, parts, update) if output == KEEP else None
    after = wanted.to(dtype) if written is None else weight.read(tuple(loaded.shape), written)
    keys = update.keys.cpu().float()
    change, lost = wanted - before, after.float() - wanted
    moved = float((change @ keys.T).norm())
    report = Requantised(
        update.layer,
        weight.module,
        weight.scheme.label,
        output,
        1 - float((lost @ keys.T).norm()) / moved if moved else 0.0,
        float(lost.norm() / before.norm().clamp(min=1e-30)),
    )
    first, last = before.to(dtype), after.to(dtype)
    record = Applied(str(dtype), tensor_digest(first), tensor_digest(last), bits(first).bitwise_xor(bits(last)))
    return WrittenQuantised(weight, last, written, record, report)


def check_surviving(entries: Sequence[Requantised], force: bool) -> list[str]:
    """Check that enough of the update survives in the output.

    Returns:
        One sentence for each layer below the limit; empty unless `force`.

    Raises:
        GuardError: Less than `MIN_SURVIVING` of an update survives.
    """
    below = [entry for entry in entries if not entry.surviving >= MIN_SURVIVING]
    sentences = [
        f"Of the update of layer {entry.layer}, {max(0.0, entry.surviving):.0%} survives at the concepts' keys in "
        f"{entry.scheme}, below the limit of {MIN_SURVIVING:.0%}."
        for entry in below
    ]
    if sentences and not force:
        raise GuardError(
            " ".join(sentences) + " Nothing was written. Store the edited weights unquantised (--quantised plain) or "
            "as an adapter (--quantised adapter), or pass --force to exceed the limit."
        )
    return sentences


def report_of(entries: Sequence[Requantised]) -> dict[str, Any]:
    """Return the fields of the output's report about quantised weights; empty if there are none."""
    if not entries:
        return {}
    return {
        "quantised": {
            "scheme": entries[0].scheme,
            "output": entries[0].output,
            "layers": [asdict(entry) for entry in entries],
        }
    }


def _with_update(projection: Block, values: Tensor, update: LayerUpdate) -> Tensor:
    """Return float32 values with an update added."""
    module = nn.Module()
    module.weight = nn.Parameter(values.clone(), requires_grad=False)
    apply_updates([Weight((replace(projection, module=module),))], [update.factors])
    return module.weight.data


def _requantised(
    weight: QuantisedWeight, wanted: Tensor, before: Tensor, parts: Mapping[str, Tensor], update: LayerUpdate
) -> dict[str, Tensor]:
    """Quantise values so that the outputs at the keys are those of the values, as nearly as the scheme allows.

    A value that changes by less than half a step is rounded back. So the values are quantised several times; each time,
    the movement that is missing at the keys is added to them along `update.right`, the directions that ordinary keys
    share least. The best result is returned.
    """
    keys = update.keys.cpu().double()
    correction = _correction(update, keys)
    goal = wanted.double() @ keys.T
    best, least, values = dict(parts), torch.inf, wanted
    for _ in range(ROUNDS):
        written = {**parts, **weight.scheme.write(values, parts)}
        missing = goal - weight.read(tuple(before.shape), written).double() @ keys.T
        if float(missing.norm()) < least:
            best, least = written, float(missing.norm())
        values = values + correction(missing)
    return best


def _correction(update: LayerUpdate, keys: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that gives the smallest change (d_out, d_in) with some outputs (d_out, n) at the keys."""
    right = update.factors.right.cpu().double()
    if update.factors.matrix is not None or right.shape != keys.shape:
        right = keys
    inverse: Tensor = torch.linalg.pinv(right @ keys.T, rtol=1e-3)

    def correct(outputs: Tensor) -> Tensor:
        return (outputs @ inverse @ right).float()

    return correct
