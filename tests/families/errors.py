"""What the results say about an exception."""

from __future__ import annotations

import traceback
from pathlib import Path


def last_line(error: BaseException) -> str:
    """The type and the first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def where(error: BaseException) -> str:
    """The innermost frame of rocr in a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/rocr/" in frame.filename]
    return f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else "not in rocr"
