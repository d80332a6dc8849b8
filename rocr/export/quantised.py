"""Write the edited weights of a quantised model: unquantised (`plain`), or in their own scheme again (`keep`).

`keep` loses a part of the update, since an update is often smaller than the steps of the scheme. What arrives at the
concepts' keys is measured, and an output in which too little arrives is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from rocr.model.quantised.checkpoint import Quantisation
from rocr.model.quantised.place import QuantisedPlace
from rocr.model.stored_names import StoredNames
from rocr.model.stored_weights import Place, find_quantised

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
        module: Name of the module in the files; of a mixture of experts, that of the first edited expert.
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
class WrittenBlock:
    """An edited block, ready to be written.

    Attributes:
        place: Where the files hold it.
        values: The edited values as the model holds them, in a plain dtype: those of the output as loaders dequantise
            them.
        parts: The parts to write by role with `keep`, in the form of `QuantisedPlace.parts`; None with `plain`, and
            for a block that was not quantised.
    """

    place: QuantisedPlace | Place
    values: Tensor
    parts: dict[str, Tensor] | None


@dataclass(frozen=True)
class WrittenQuantised:
    """An edited weight of a quantised model, ready to be written.

    Attributes:
        blocks: Its blocks. Some of a mixture may be stored unquantised.
        applied: The record of the change of the values.
        report: The entry of the report.
    """

    blocks: list[WrittenBlock]
    applied: Applied
    report: Requantised

    @property
    def quantised(self) -> list[tuple[QuantisedPlace, WrittenBlock]]:
        """The blocks that are quantised in the files, with their places."""
        return [(block.place, block) for block in self.blocks if isinstance(block.place, QuantisedPlace)]

    @property
    def is_plain(self) -> bool:
        """Whether the quantised blocks are written unquantised."""
        return self.report.output == PLAIN


def edit_quantised(
    quantisation: Quantisation,
    weight: Weight,
    places: Sequence[QuantisedPlace | Place],
    update: LayerUpdate,
    output: str,
) -> WrittenQuantised:
    """Add an update to the float32 values of a quantised weight, and quantise or round the result.

    Args:
        quantisation: The quantisation of the model.
        weight: The weight in the model, with the edit applied.
        places: For each of its blocks, where the files hold it. One at least is quantised.
        update: The update.
        output: "plain" or "keep".

    Raises:
        InputError: The files do not hold the weight that was edited.
        GuardError: An edited value is not finite.
    """
    parts = [place.parts() if isinstance(place, QuantisedPlace) else None for place in places]
    before = [_read(place, own) for place, own in zip(places, parts, strict=True)]
    first = next(place for place in places if isinstance(place, QuantisedPlace)).weight
    assert update.applied is not None, "the model has the edit applied"
    if tensor_digest(*(values.to(weight.dtype) for values in before)) != update.applied.before:
        raise InputError(
            f"{first.module} in {first.files.folder} does not hold {weight.name} as it was before the edit. Use the "
            "files that the model was loaded from."
        )
    wanted = _with_update(weight, before, update)
    columns = _Columns.of(weight, update)
    dtypes = [place.dtype if isinstance(place, Place) else quantisation.dtype for place in places]
    if output == KEEP:
        if update.factors.support is not None:
            raise InputError(
                f"The edit keeps the zeros of {weight.name}, and {first.scheme.label} cannot be written with them: a "
                "weight that is quantised again is corrected in all of its elements. Write it unquantised "
                "(--quantised plain), or make the edit without the zeros (keep_zeros=False, --fill-zeros)."
            )
        blocks = _requantised(places, wanted, parts, dtypes, columns)
    else:
        rows = zip(places, wanted, dtypes, strict=True)
        blocks = [WrittenBlock(place, values.to(dtype), None) for place, values, dtype in rows]
    after = [_as_loaded(block) for block in blocks]
    moved = float(columns.outputs([new - old for new, old in zip(wanted, before, strict=True)]).norm())
    lost = [new - aim for new, aim in zip(after, wanted, strict=True)]
    size = sum(float(values.double().norm() ** 2) for values in before) ** 0.5
    report = Requantised(
        update.layer,
        first.module,
        first.scheme.label,
        output,
        1 - float(columns.outputs(lost).norm()) / moved if moved else 0.0,
        sum(float(values.double().norm() ** 2) for values in lost) ** 0.5 / max(size, 1e-30),
    )
    firsts = [values.to(dtype) for values, dtype in zip(before, dtypes, strict=True)]
    lasts = [block.values for block in blocks]
    undo = [bits(old).bitwise_xor(bits(new)) for old, new in zip(firsts, lasts, strict=True)]
    flat = torch.cat([part.reshape(-1) for part in undo]) if weight.is_mixture else undo[0]
    record = Applied(str(quantisation.dtype), tensor_digest(*firsts), tensor_digest(*lasts), flat)
    return WrittenQuantised(blocks, record, report)


def check_plain(names: StoredNames, blocks: Iterable[Block]) -> None:
    """Raise InputError if a loader would not accept edited weights that are stored unquantised."""
    for block in blocks:
        place = find_quantised(names, block) if block.expert is not None else None
        if place is not None and not place.weight.scheme.can_dequantise:
            raise InputError(
                f"{block.label} is stored as {place.weight.module} in {place.weight.scheme.label}, and transformers "
                "does not load a mixture in this scheme in which the experts of some layers are unquantised. Write it "
                "in its scheme (--quantised keep) or as an adapter (--quantised adapter)."
            )


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


def with_values(weight: Weight, values: Sequence[Tensor]) -> Weight:
    """Return a weight with other values, which are changed in place; the given one is not changed."""
    blocks = []
    for block, stored in zip(weight.blocks, values, strict=True):
        module = nn.Module()
        module.weight = nn.Parameter(stored, requires_grad=False)
        blocks.append(replace(block, module=module, attribute="weight", expert=None))
    return replace(weight, blocks=tuple(blocks))


def _read(place: QuantisedPlace | Place, parts: Mapping[str, Tensor] | None) -> Tensor:
    """Return the values of a block as the model holds them, float32."""
    return place.read(parts) if isinstance(place, QuantisedPlace) else place.read().float()


def _as_loaded(block: WrittenBlock) -> Tensor:
    """Return the values of a written block, float32: with `keep`, without rounding to a plain dtype."""
    if isinstance(block.place, QuantisedPlace) and block.parts is not None:
        return block.place.read(block.parts)
    return block.values.float()


def _with_update(weight: Weight, values: Sequence[Tensor], update: LayerUpdate) -> list[Tensor]:
    """Return float32 values of the blocks with an update added."""
    changed = [block.clone() for block in values]
    apply_updates([with_values(weight, changed)], [update.factors])
    return changed


@dataclass(frozen=True)
class _Columns:
    """The keys of an update, and the directions in which a missing output is added, by block.

    Attributes:
        keys: For each block (n, d_in) float64.
        rights: For each block the rows (r, d_in) float64 of the directions.
        inverse: (n, r) float64: the product with missing outputs (d_out, n) gives their coefficients.
        transposed: For each block whether its values are (d_in, d_out).
    """

    keys: list[Tensor]
    rights: list[Tensor]
    inverse: Tensor
    transposed: list[bool]

    @classmethod
    def of(cls, weight: Weight, update: LayerUpdate) -> _Columns:
        """Return the columns of an update of a weight.

        The directions are `update.right`, which ordinary keys share least, so that the change with given outputs at
        the keys is the smallest one in the metric.
        """
        keys = update.keys.cpu().double()
        right = keys if update.factors.matrix is not None else update.factors.right.cpu().double()
        right = right if right.shape == keys.shape else keys
        places = update.columns if update.parts else [slice(None)]
        return cls(
            [keys[:, place] for place in places],
            [right[:, place] for place in places],
            torch.linalg.pinv(right @ keys.T, rtol=1e-3),
            [block.transposed for block in weight.blocks],
        )

    def outputs(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum of the outputs (d_out, n) of blocks at the keys, float64."""
        rows = zip(values, self.keys, self.transposed, strict=True)
        parts = [(block.T if flipped else block).double() @ keys.T for block, keys, flipped in rows]
        return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]

    def corrected(self, values: Sequence[Tensor], missing: Tensor) -> list[Tensor]:
        """Return the values of blocks with the smallest change that adds outputs (d_out, n) at the keys."""
        found, coefficients = [], missing @ self.inverse
        for block, right, flipped in zip(values, self.rights, self.transposed, strict=True):
            change = (coefficients @ right).float()
            found.append(block + (change.T if flipped else change))
        return found


def _requantised(
    places: Sequence[QuantisedPlace | Place],
    wanted: Sequence[Tensor],
    parts: Sequence[Mapping[str, Tensor] | None],
    dtypes: Sequence[torch.dtype],
    columns: _Columns,
) -> list[WrittenBlock]:
    """Quantise values so that the outputs at the keys are those of the values, as nearly as the scheme allows.

    A value that changes by less than half a step is rounded back. So the values are quantised several times; each time,
    the movement that is missing at the keys is added to them. The best result is returned.
    """
    goal = columns.outputs(wanted)
    best: list[WrittenBlock] = []
    least, values = torch.inf, list(wanted)
    for _ in range(ROUNDS):
        rows = zip(places, values, parts, dtypes, strict=True)
        written = [_quantised_block(*row) for row in rows]
        missing = goal - columns.outputs([_as_loaded(block) for block in written])
        if not best or float(missing.norm()) < least:
            best, least = written, float(missing.norm())
        values = columns.corrected(values, missing)
    return best


def _quantised_block(
    place: QuantisedPlace | Place, values: Tensor, parts: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> WrittenBlock:
    """Return a block with its values quantised again, or rounded if it was not quantised."""
    if isinstance(place, Place) or parts is None:
        return WrittenBlock(place, values.to(dtype), None)
    written = place.write(values, parts)
    return WrittenBlock(place, place.read(written).to(dtype), written)
