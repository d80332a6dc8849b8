"""Train tiny models of many kinds on made-up facts, unlearn some people, and measure what is forgotten and kept.

    python benches/learned_families.py --jobs 2 --out benches/results/learned_families.json --docs docs/evaluation.md
    python benches/learned_families.py --kinds Llama GPT-2
    python benches/learned_families.py --table benches/results/learned_families.json

Each kind is trained on one thread and kept in a cache, by a digest of its settings and of the versions of torch and
transformers. The rows of a kind are written when it is ready, in the place of older ones; a kind that rocr refuses gets
the sentence that refuses it. --docs puts the table of the file in the place of the table of a page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from learned_edits import METHODS, Row, Subject, decrease, measure
from learned_kinds import KINDS
from learned_training import cache_folder, learn
from machine import commit, cpu_name

from rocr.errors import InputError

KNOWN = 0.9
"""Least share of right answers to held-out questions before an edit: an edit of a model that knows less says little."""


COLUMNS = ("kind", "knows", "method", "1, gone", "1, lost", "10, gone", "10, lost", "10, lost, shared name")
COLUMNS += ("40, gone", "40, lost")


def run_kind(name: str, cache: Path | None) -> dict[str, Any]:
    """Return what is measured on a kind as JSON values, for example with the seconds and the rows."""
    start = time.perf_counter()

    def log(line: str) -> None:
        print(f"{name}, {time.perf_counter() - start:.0f} s: {line}", flush=True)

    kind = KINDS[name]
    learned = learn(kind, cache, log=log)
    parameters = sum(p.numel() for p in learned.model.parameters())
    found = {"commit": commit(), "parameters": parameters, "seconds": round(learned.seconds), "layers": kind.layers}
    found["depth"] = learned.model.config.num_hidden_layers
    begun = time.process_time()
    try:
        subject = Subject.of(learned, kind)
        found["known"] = float(subject.before.float().mean())
        log(f"knows {found['known']:.3f}")
        if found["known"] < KNOWN:
            return found | {"refused": f"not edited: it knows {found['known']:.1%} of the facts, below {KNOWN:.0%}"}
        found["rows"] = [asdict(row) for row in measure(subject, log)]
        return found | {"measured_in": round(time.process_time() - begun)}
    except InputError as error:
        return found | {"refused": str(error)}


def table(kinds: dict[str, Any]) -> str:
    """Return a Markdown table: for each kind and method, the shares gone and lost for each number of people."""
    lines = [_header(), "|---|---:|---|" + "---:|" * 7]
    for name, found in kinds.items():
        if "refused" in found:
            lines.append(f"| {name} | | {found['refused']} | | | | | | | |")
            continue
        rows = [Row(**row) for row in found["rows"]]
        by = {(row.method, row.people): row for row in rows}
        limit = rows[0]
        for method in METHODS:
            cells = []
            for people in (1, 10, 40):
                row = by[method, people]
                cells += [_percent(row.forget), _percent(row.others)] + (
                    [_percent(row.sharing)] if people == 10 else []
                )
            opening = f"| {name} | {found['known']:.1%} " if method == "rocr" else "| | "
            lines.append(f"{opening}| {method} | " + " | ".join(cells) + " |")
        lines.append(f"| | | {limit.method}, no edit | | | | | | {_percent(limit.forget)} | |")
    return "\n".join(lines)


def _percent(pair: tuple[float, float]) -> str:
    # Adding 0 turns -0.0 into 0.0.
    return f"{round(100 * decrease(*pair), 1) + 0:.1f}%"


def _header() -> str:
    return f"| {' | '.join(COLUMNS)} |"


def with_table(page: str, kinds: dict[str, Any]) -> str:
    """Return a page with the table of `kinds` in the place of its own.

    Raises:
        ValueError: The page has no such table.
    """
    before, header, after = page.partition(_header())
    if not header:
        raise ValueError(f"There is no table with the header {_header()} in the page.")
    return before + table(kinds) + "\n\n" + after.partition("\n\n")[2]


def main() -> None:
    """Measure some kinds, or print the table of a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of trained models")
    parser.add_argument("--out", type=Path, help="JSON file to which the rows are added")
    parser.add_argument("--docs", type=Path, help="page whose table becomes that of --out")
    parser.add_argument("--jobs", type=int, default=1, help="number of kinds at the same time, one thread each")
    parser.add_argument("--table", type=Path, help="print the table of this file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.docs and not arguments.out:
        parser.error("--docs needs --out, whose table it writes")
    if arguments.table:
        print(table(kinds_of(arguments.table)))
        return
    kinds: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(run_kind, name, arguments.cache): name for name in arguments.kinds}
        for done in as_completed(running):
            kinds[running[done]] = done.result()
            if arguments.out:
                write(arguments.out, {running[done]: done.result()})
    print(table(kinds))
    if arguments.docs:
        page = with_table(arguments.docs.read_text(encoding="utf-8"), kinds_of(arguments.out))
        arguments.docs.write_text(page, encoding="utf-8")


def kinds_of(path: Path) -> dict[str, Any]:
    """Return the results in a file, by kind; none if there is no file."""
    kinds: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["kinds"] if path.exists() else {}
    return kinds


def write(path: Path, kinds: dict[str, Any]) -> None:
    """Add the results of some kinds to a file."""
    machine = {"cpu": cpu_name(), "threads": 1, "torch": torch.__version__, "transformers": transformers.__version__}
    merged = kinds_of(path) | kinds
    ordered = {name: merged[name] for name in KINDS if name in merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "kinds": ordered}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
