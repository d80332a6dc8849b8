"""Examine all model families, and write the results and the page of the documentation.

python -m tests.families.table                    # everything; tens of minutes on two cores
python -m tests.families.table --only causal      # examine some again; the results of others are kept
python -m tests.families.table --render           # write the page from the results
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.families.sweep import STATUSES, Found, chosen, counts, show, sweep
from tests.families.tiny_models import GROUPS, VARIANTS

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "families.md"
KEPT = ("class_name", "status", "kind", "part", "message")
"""What the results file keeps: nothing that depends on the machine."""
TITLES = {
    "causal": "Causal language models",
    "image-text": "Image-text models",
    "seq2seq": "Sequence-to-sequence models",
    VARIANTS: "Other forms of a family",
}
SAID = {
    "ok": "edited",
    "wrong": "**wrong**",
    "refused": "refused",
    "traceback": "**error**",
    "unbuilt": "not built",
}
OPENING = """# Model families

A tiny random model of each class below is edited, and the edit is checked: only the edited blocks change,
states move towards the redirect, a nearly complete edit of one layer moves its output to its target, prompts give the
same keys alone and in batches, the edit reverts and loads bit for bit, and peft's model with the exported adapter
equals the edited one where peft can load it. "Edited" means that all checks pass. A family that cannot
be edited is refused with the sentence shown.

`python -m tests.families.table` writes this page, after a sweep of the causal, image-text and sequence-to-sequence
classes of the installed transformers and of further forms of some families. Classes without a row were not examined.
Random weights show that the algebra is right for a family, not how much a trained model forgets.
"""


def load() -> dict[str, Found]:
    """Return the results of the last sweep by key."""
    if not RESULTS.exists():
        return {}
    found: dict[str, Found] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def keep(results: Mapping[str, Found]) -> None:
    """Write results, one family on a line."""
    rows = [f"{json.dumps(key)}: {json.dumps({n: found[n] for n in KEPT})}" for key, found in results.items()]
    RESULTS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def page(results: Mapping[str, Found]) -> str:
    """Return the page of the documentation."""
    parts = [OPENING, _totals(results)]
    for group in (*GROUPS, VARIANTS):
        of_group = {key: found for key, found in results.items() if key.partition("/")[0] == group}
        if of_group:
            parts.append(f"## {TITLES[group]}\n\n" + _rows(of_group))
    return "\n".join(parts)


def _totals(results: Mapping[str, Found]) -> str:
    found = counts(dict(results))
    head = " | ".join(("", *(SAID[status] for status in STATUSES), "all")).strip()
    lines = [f"| {head} |", "|" + "---|" * (len(STATUSES) + 2)]
    lines += [_total(TITLES[group], found[group]) for group in (*GROUPS, VARIANTS) if group in found]
    return "\n".join(lines) + "\n"


def _total(title: str, found: Counter[str]) -> str:
    numbers = [found[status] for status in STATUSES]
    return f"| {' | '.join((title, *map(str, (*numbers, sum(numbers)))))} |"


def _rows(results: Mapping[str, Found]) -> str:
    lines = ["| family | class | kind | result |", "|---|---|---|---|"]
    for key, found in results.items():
        family = key.partition("/")[2]
        lines.append(f"| `{family}` | `{found['class_name']}` | {found['kind']} | {_result(found)} |")
    return "\n".join(lines) + "\n"


def _result(found: Mapping[str, Any]) -> str:
    said = SAID[found["status"]]
    if found["status"] == "refused" and found["part"]:
        said = f"edited in layers {found['part']} only"
    message = re.sub(r"\s+", " ", found["message"])
    # Code spans would be broken by these characters, which tables and Markdown read.
    message = re.sub(r"([|*_<\[\]`])", r"\\\1", message)
    return said if found["status"] == "ok" else f"{said}: {message}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="groups, model types, variants or keys")
    parser.add_argument("--processes", type=int, help="how many run at once; by default one for each core")
    parser.add_argument("--render", action="store_true", help="examine nothing")
    arguments = parser.parse_args()
    results = load()
    if not arguments.render:
        results |= sweep(chosen(arguments.only), arguments.processes, report=show)
    order = [family.key for family in chosen([]) if family.key in results]
    keep({key: results[key] for key in order})
    PAGE.write_text(page({key: results[key] for key in order}), encoding="utf-8")


if __name__ == "__main__":
    main()
