"""`rocr plan`: what `rocr unlearn` would do with the same arguments, and what is recommended."""

from __future__ import annotations

from typing import Any

from rocr.cli.console import Console
from rocr.cli.parsing import CONTEXT, Arguments, Command
from rocr.cli.unlearn import unlearn
from rocr.concepts import AUTO

OF_RUNS = {"json", "debug", "dry_run", "overwrite", "keep_statistics"}
"""Parameters of `rocr unlearn` that a plan has no use for; each command gets --json and --debug of its own."""


def _plan(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Plan an edit: check all inputs, and show what it needs and what is recommended.

    Nothing is loaded or written. MODEL, CONCEPTS and options are those of `rocr unlearn`; concepts without a redirect
    are planned with --redirect auto.
    """
    arguments.dry_run, arguments.overwrite, arguments.keep_statistics = True, False, None
    arguments.missing_redirect = arguments.redirect is None
    arguments.redirect = arguments.redirect or AUTO
    assert unlearn.callback is not None
    document: dict[str, Any] = unlearn.callback(arguments, console)
    return document


plan = Command(
    "plan",
    params=[parameter for parameter in unlearn.params if parameter.name not in OF_RUNS],
    callback=_plan,
    help=_plan.__doc__,
    context_settings=CONTEXT,
)
