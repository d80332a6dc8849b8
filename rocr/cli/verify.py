"""`rocr verify`: check an output folder against its own records."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command, option
from rocr.cli.values import DIR, FILE
from rocr.errors import VerificationError


@command("verify")
@argument("folder", "A folder written by unlearn, apply or revert, or the adapter in it.", type=DIR, metavar="DIR")
@option("--edit", "The edit file of a reverted output (default: the one in DIR).", type=FILE)
def verify(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Check an output folder against its own records.

    All checks are run and shown; the exit code is 3 if one fails.
    """
    from rocr.export.manifest import FAILED, PASSED, UNCHECKED
    from rocr.export.verify import verify_output

    with console.stage("verify") as progress:
        checks = verify_output(arguments.folder, arguments.edit, progress)
    console.table(
        arguments.folder,
        ("subject", "check", "result", "found"),
        [(check.subject, check.what, check.state, check.detail) for check in checks],
    )
    counts = Counter(check.state for check in checks)
    summary = {
        "folder": arguments.folder,
        "counts": {state: counts[state] for state in (PASSED, FAILED, UNCHECKED)},
        "checks": [asdict(check) for check in checks],
    }
    failed = [f"{check.subject} ({check.what}: {check.detail})" for check in checks if check.state == FAILED]
    if failed:
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise VerificationError(
            f"{arguments.folder} does not match its records in {len(failed)} of {len(checks)} checks: "
            f"{'; '.join(failed[:5])}{more}.",
            summary,
        )
    console.say(
        f"{arguments.folder} matches its records: {counts[PASSED]} checks passed, {counts[UNCHECKED]} not possible."
    )
    return summary
