"""Read a GGUF file quickly, and nothing that lies beside it.

transformers opens a GGUF file with the reader of the package gguf once each for the configuration, the tokenizer and
the weights. That reader makes several numpy views of every entry of a vocabulary: with 262,144 tokens, each with a
score and a type, the three passes take more than a minute. Here an array is cut into its entries with struct, the
file is read once, and the map of tensor names, which transformers builds anew for every module, is built once.
"""

from __future__ import annotations

import functools
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rocr.errors import InputError

FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""How struct calls the numbers in an array, by the number of their type in a GGUF file."""


def check_gguf_support() -> None:
    """Make sure that transformers can read GGUF files.

    Raises:
        InputError: a package is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(f"Reading a .gguf file needs {' and '.join(missing)}: pip install 'rocr[gguf]'.")


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """Yield a link to a file, in a folder that holds nothing else.

    transformers reads configurations, adapters, templates and code that lie beside a file, and prefers a file of the
    same name in the current folder.
    """
    with tempfile.TemporaryDirectory(prefix="rocr-") as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.resolve())
        yield link


@contextmanager
def quick_reading() -> Iterator[None]:
    """Within the context, the package gguf reads a file once, and makes no view of every entry of an array."""
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    patched: Any = gguf
    patched.GGUFReader = functools.cache(_quick_reader(reader))
    patched.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        patched.GGUFReader, patched.get_tensor_name_map = reader, name_map


def _quick_reader(reader: type[Any]) -> type[Any]:
    """The reader of the package gguf, with arrays of texts and numbers read in one go."""
    from gguf import GGUFValueType

    class QuickReader(reader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            start, data = int(orig_offs), memoryview(self.data)
            if int(raw_type) == GGUFValueType.ARRAY and self.byte_order == "I" and sys.byteorder == "little":
                kind, count = struct.unpack_from("<IQ", data, start)
                if count and (kind in FORMATS or kind == GGUFValueType.STRING):
                    end, entries = _read_array(data, start, kind, count)
                    types = [GGUFValueType.ARRAY, GGUFValueType(kind)]
                    return end - start, entries, list(range(count)), types
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found

    return QuickReader


def _read_array(data: memoryview, start: int, kind: int, count: int) -> tuple[int, list[Any]]:
    """The end of an array, and its entries: bytes of texts, or tuples of one number.

    Raises:
        ValueError: it goes beyond the file.
    """
    place = start + struct.calcsize("<IQ")
    beyond = ValueError(f"the array of {count:,} entries at byte {start:,} goes beyond the file")
    if kind in FORMATS:
        end = place + count * struct.calcsize(FORMATS[kind])
        if end > len(data):
            raise beyond
        return end, list(struct.iter_unpack(FORMATS[kind], data[place:end]))
    entries = []
    for _ in range(count):
        if len(data) - place < 8:
            raise beyond
        length = int.from_bytes(data[place : place + 8], "little")
        place += 8
        if length > len(data) - place:
            raise beyond
        entries.append(bytes(data[place : place + length]))
        place += length
    return place, entries
