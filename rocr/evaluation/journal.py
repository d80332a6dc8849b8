"""A file of the scores so far, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rocr.errors import InputError, RocrError
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json

MAX_FILE_BYTES = 1024 * 2**20


class Journal:
    """Scores by item, one JSON object a line after a first line that says what they are scores of."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Open a journal, or begin one.

        Args:
            path: the file.
            identity: what model was asked what.

        Raises:
            InputError: the file is not a journal, or one of another evaluation.
            RocrError: it cannot be written.
        """
        self.done: dict[int, Any] = {}
        self._path = Path(path)
        self._file: IO[str] | None = None
        head = json.dumps(dict(identity), sort_keys=True)
        try:
            whole = self._read(head) if self._path.exists() else 0
            self._file = self._path.open("a", encoding="utf-8", newline="\n")
            if whole:
                self._file.truncate(whole)  # a line that a killed process left half-written
            else:
                self._file.write(head + "\n")
        except OSError as error:
            raise RocrError(f"The journal {path} cannot be written: {error.strerror or error}.") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, item: int, scores: Any) -> None:
        """Note the scores of an item; they are on disk when the call returns, unless the machine loses power."""
        assert self._file is not None, "a journal is open from its making on"
        self.done[item] = scores
        self._file.write(json.dumps([item, scores]) + "\n")
        self._file.flush()

    def _read(self, head: str) -> int:
        """Take over what is there; returns the length in bytes of its whole lines."""
        data = read_bounded(self._path, MAX_FILE_BYTES)
        whole = data.rfind(b"\n") + 1
        first, *rest = data[:whole].decode("utf-8", "replace").split("\n") if whole else ("",)
        if data and first != head:
            raise InputError(
                f"The journal {self._path} is of another evaluation (other model, probes or settings); "
                "remove it, or name another file."
            )
        for number, line in enumerate(filter(None, rest), start=2):
            try:
                item, scores = parse_json(line)
                self.done[int(item)] = scores
            except (ValueError, TypeError, OverflowError):
                raise InputError(f"{self._path}:{number}: is not a line of a journal; remove the file.") from None
        return whole
