"""How the text of statistics was read: what changes a key besides the model, its tokenizer and the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rocr.errors import InputError
from rocr.json_values import text_of, whole_number_of
from rocr.versions import versions

READ_BY = ("rocr", "torch", "transformers")
DTYPES = ("float32", "bfloat16", "float16")
MAX_VERSION = 500


@dataclass(frozen=True)
class Reading:
    """How a model read a text.

    Attributes:
        dtype: of the weights that made the keys, such as "bfloat16".
        length: tokens of a sequence at most. Documents are joined by the end-of-text token and cut there.
        skipped: tokens at the beginning of each sequence whose keys were left out.
        documents: texts that were read, or sequences that the model wrote itself.
        versions: of rocr, torch and transformers; several of one where statistics were merged.
    """

    dtype: str
    length: int
    skipped: int
    documents: int
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {repr(self.dtype)[:60]}")
        whole_number_of(self.length, "length", least=2)
        whole_number_of(self.skipped, "skipped")
        if self.skipped >= self.length:
            raise ValueError(f"of sequences of {self.length} tokens, {self.skipped} cannot be left out")
        whole_number_of(self.documents, "documents", least=1)
        if not isinstance(self.versions, dict) or set(self.versions) != set(READ_BY):
            raise ValueError(f"versions must be those of {', '.join(READ_BY)}, not {repr(self.versions)[:60]}")
        for name, version in self.versions.items():
            if len(text_of(version, f"the version of {name}")) > MAX_VERSION:
                raise ValueError(f"the version of {name} has {len(version):,} characters")

    def to_json(self) -> dict[str, Any]:
        """The reading as JSON values."""
        return asdict(self)

    def merge(self, other: Reading) -> Reading:
        """The reading of both texts.

        Raises:
            InputError: keys of the two are not of one kind; names what differs, on both sides.
        """
        differences = [
            f"{name} {getattr(self, name)} and {getattr(other, name)}"
            for name in ("dtype", "length", "skipped")
            if getattr(self, name) != getattr(other, name)
        ]
        if differences:
            raise InputError(
                f"Statistics of texts that were read differently cannot be merged: {'; '.join(differences)}. "
                "Collect one of them as the other."
            )
        both = {name: _both(self.versions[name], other.versions[name]) for name in READ_BY}
        return Reading(self.dtype, self.length, self.skipped, self.documents + other.documents, both)


def versions_now() -> dict[str, str]:
    """Versions of what computes keys."""
    found = versions()
    return {name: found.get(name, "unknown") for name in READ_BY}


def _both(mine: str, others: str) -> str:
    """Two lists of versions as one, without repetition."""
    return ", ".join(dict.fromkeys([*mine.split(", "), *others.split(", ")]))
