"""Check an output folder of rocr against its own records, and say what they cannot tell."""

from __future__ import annotations

import os
from pathlib import Path

from rocr.export.verify_edit import edit_checks
from rocr.export.verify_files import Check, file_checks, open_output
from rocr.progress import Progress, ProgressCallback, silent


def verify_output(
    folder: str | os.PathLike[str],
    edit: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = silent,
) -> list[Check]:
    """Check what `rocr unlearn`, `apply` or `revert` wrote.

    Args:
        folder: the output, or the adapter inside one.
        edit: an edit file elsewhere, which a reverted output needs for its weights; None: the output's own.
        progress: told how many files are done.

    Raises:
        InputError: the folder is no output of rocr, or there is no such edit file.
    """
    output, checks = open_output(Path(folder), None if edit is None else Path(edit))
    for i, found in enumerate(file_checks(output)):
        checks.append(found)
        progress(Progress("files", i + 1, len(output.recorded), "files"))
    return checks + edit_checks(output)
