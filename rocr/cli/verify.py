"""`rocr verify`: does an output folder hold what its own records say?"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from rocr.cli.console import Console
from rocr.errors import VerificationError


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = subparsers.add_parser("verify", parents=[common], help="check an output folder against its own records")
    parser.add_argument("folder", metavar="DIR", help="what unlearn, apply or revert wrote, or the adapter in it")
    parser.add_argument("--edit", metavar="EDIT", help="the edit file of a reverted output (default: DIR's own)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check everything, show all of it, and fail where something does not match."""
    from rocr.export.manifest import FAILED, PASSED, UNCHECKED
    from rocr.export.verify import verify_output

    with console.stage("verify") as progress:
        checks = verify_output(arguments.folder, arguments.edit, progress)
    console.table(
        arguments.folder,
        ("of", "what", "result", "found"),
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
        f"{arguments.folder} matches its records: {counts[PASSED]} checks passed, {counts[UNCHECKED]} impossible."
    )
    return summary
