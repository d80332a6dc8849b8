"""Examine families, each in a forked process with a limit of CPU seconds, several at once.

    python -m tests.families.sweep --only causal/llama variants     # prints results and writes nothing

`tests/families/table.py` writes the results of all families and the page of the documentation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.families.tiny_models import Family, all_families, tiny_tokenizer

CPU_SECONDS = 120
WAIT = 20
"""A process ends after so many times its CPU seconds, if it waits for something or the machine is busy."""
STATUSES = ("ok", "wrong", "refused", "traceback", "unbuilt")
Found = dict[str, Any]


def chosen(only: Sequence[str]) -> list[Family]:
    """Return all families, or those of some groups, names or keys."""
    return [family for family in all_families() if not only or {family.group, family.name, family.key} & set(only)]


def sweep(
    families: Sequence[Family],
    processes: int | None = None,
    seconds: int = CPU_SECONDS,
    report: Callable[[Found], None] = lambda found: None,
) -> dict[str, Found]:
    """Return the result of each family by its key, as JSON values.

    Args:
        families: The families.
        processes: How many run at once. None is the number of cores that this process may use.
        seconds: CPU seconds of each process.
        report: Called with each result.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    tiny_tokenizer()
    count = processes or len(os.sched_getaffinity(0))
    results: dict[str, Found] = {}
    waiting, running = list(reversed(families)), {}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            while waiting or running:
                while waiting and len(running) < count:
                    family = waiting.pop()
                    process = _start(family, folder, len(waiting), seconds)
                    running[process.sentinel] = (family, process, folder / str(len(waiting)))
                for sentinel in connection.wait(list(running)):
                    family, process, place = running.pop(sentinel)
                    results[family.key] = _result(family, process, place, seconds)
                    report(results[family.key])
    finally:
        for _, process, _ in running.values():
            process.kill()
        torch.set_num_threads(threads)
    return {family.key: results[family.key] for family in families}


def _start(family: Family, folder: Path, number: int, seconds: int) -> BaseProcess:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_examine_into, args=(family, folder / str(number), seconds))
    process.start()
    return process


def _examine_into(family: Family, place: Path, seconds: int) -> None:
    """Write the result of a family to `place`, in a process of its own."""
    from tests.families.checks import examine

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WAIT * seconds)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        found = examine(family, place.with_suffix(".built").touch).to_json()
    except BaseException as error:
        found = _unfinished(family, place, f"{type(error).__name__}: {traceback.format_exc(limit=-1)[-300:]}")
    place.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
    place.with_suffix(".part").rename(place)


def _result(family: Family, process: BaseProcess, place: Path, seconds: int) -> Found:
    """Return what a process wrote, or how it ended."""
    process.join()
    if place.exists():
        found: Found = json.loads(place.read_text(encoding="utf-8"))
        return found
    code = process.exitcode or 0
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return _unfinished(family, place, f"the process ended with {ended} (limit: {seconds} CPU seconds)")


def _unfinished(family: Family, place: Path, message: str) -> Found:
    """The result of a process that failed: "unbuilt" only before there was a model."""
    from tests.families.checks import Result

    status = "traceback" if place.with_suffix(".built").exists() else "unbuilt"
    return Result(family.key, family.class_name, status, message=message).to_json()


def counts(results: dict[str, Found]) -> dict[str, Counter[str]]:
    """Return the number of results of each status by group."""
    found: dict[str, Counter[str]] = {}
    for key, result in results.items():
        found.setdefault(key.partition("/")[0], Counter())[result["status"]] += 1
    return found


def show(found: Found) -> None:
    """Print one result on a line."""
    said = found["message"] or ", ".join(f"{name} {value}" for name, value in found["measures"].items())
    print(f"{found['key']:36} {found['status']:9} {said[:200]}", flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="groups, model types, variants or keys")
    parser.add_argument("--processes", type=int, help="how many run at once; by default one for each core")
    arguments = parser.parse_args()
    for group, found in counts(sweep(chosen(arguments.only), arguments.processes, report=show)).items():
        print(group, dict(found))  # noqa: T201


if __name__ == "__main__":
    main()
