"""Read a GGUF file fast, and no other file beside it.

transformers opens a GGUF file with the reader of the package gguf three times: for the configuration, the tokenizer
and the weights. That reader makes several numpy views of every entry of a vocabulary: with 262,144 tokens, each with a
score and a type, this takes more than a minute. Here arrays are split into their entries with struct, the file is read
once, and the map of tensor names, which transformers builds again for every module, is built once.
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
"""The struct formats of the numbers in an array, by the number of their type in a GGUF file."""
EXPERT_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Sizes in the metadata of a GGUF file that transformers 5 does not read, and their names in configurations. It takes
the defaults of the configuration's class in place of them, which fit one model of a family."""


def check_gguf_support() -> None:
    """Raise InputError unless the packages that transformers reads GGUF files with are installed.

    Raises:
        InputError: A package is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(f"Reading a .gguf file needs {' and '.join(missing)}: pip install 'rocr[gguf]'.")


@contextmanager
def isolated_link(path: Path) -> Iterator[Path]:
    """Yield a link to a file in a temporary folder that holds nothing else.

    transformers reads configurations, adapters, templates and code beside a file, and prefers a file of the same name
    in the current folder.
    """
    with tempfile.TemporaryDirectory(prefix="rocr-") as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.resolve())
        yield link


@contextmanager
def fast_reader() -> Iterator[None]:
    """Make the package gguf read a file once, without a view of every entry of an array, inside the context."""
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    if not isinstance(reader, type):  # inside another context
        yield
        return
    patched: Any = gguf
    patched.GGUFReader = functools.cache(_fast_reader_class(reader))
    patched.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        patched.GGUFReader, patched.get_tensor_name_map = reader, name_map


def add_expert_sizes(config: Any, path: str) -> None:
    """Give a configuration the sizes of experts that the metadata of its GGUF file has; see `EXPERT_SIZES`.

    Args:
        config: The configuration that transformers read from the file.
        path: The file.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    for key, name in EXPERT_SIZES.items():
        field = reader.get_field(f"{architecture}.{key}")
        if field is not None and hasattr(config, name):
            setattr(config, name, int(field.parts[-1][0]))


def _fast_reader_class(reader: type[Any]) -> type[Any]:
    """Return a subclass of the reader of the package gguf that splits arrays of texts and numbers with struct."""
    from gguf import GGUFValueType

    class FastReader(reader):  # type: ignore[misc]
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

    return FastReader


def _read_array(data: memoryview, start: int, kind: int, count: int) -> tuple[int, list[Any]]:
    """Return the end of an array and its entries: the bytes of texts, or tuples of one number.

    Raises:
        ValueError: The array extends beyond the end of the file.
    """
    place = start + struct.calcsize("<IQ")
    beyond = ValueError(f"the array of {count:,} entries at byte {start:,} extends beyond the end of the file")
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
