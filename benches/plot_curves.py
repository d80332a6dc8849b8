"""Draw rows of other benches as SVG: the price curve of settings, and the capacity curve of a growing list.

price: what is lost about others against what is gone, a line for each kind of setting in the order of its values. ROWS
is a file of search_defaults.py whose candidates differ in one setting, such as ridge=0.1 and ridge=1.
capacity: what is lost about others against the number of people that are unlearned. ROWS is the file of
growing_lists.py.

    python benches/plot_curves.py capacity benches/results/growing_lists.json capacity.svg
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_rows import FORMS, read_rows, relative_decrease

from rocr.evaluation.plots import curve_plot
from rocr.io.output import new_file
from rocr.io.svg import Drawing

PEOPLE_PER_ROUND = 10
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def price_curve(rows: Sequence[dict[str, Any]]) -> Drawing:
    """Return the mean share lost about others against the mean share gone, by candidate, over the forms.

    Candidates whose names are equal but for their numbers are one line, in the order of these numbers.
    """
    lines: dict[str, list[tuple[list[float], str, tuple[float, float]]]] = {}
    for name in dict.fromkeys(row["candidate"] for row in rows):
        mine = [row for row in rows if row["candidate"] == name]
        if not all(f"retain {form}" in row for row in mine for form in FORMS):
            continue
        gone, lost = (
            sum(relative_decrease([row[f"{split} {form}"] for row in mine]) for form in FORMS) / len(FORMS)
            for split in ("forget", "retain")
        )
        numbers = _NUMBER.findall(name)
        line = lines.setdefault(_NUMBER.sub("…", name), [])
        line.append(([float(number) for number in numbers], ", ".join(numbers), (gone, lost)))
    ordered = {name: sorted(points) for name, points in lines.items()}
    return curve_plot(
        "Price: lost about others against gone",
        {name: [point for _, _, point in points] for name, points in ordered.items()},
        "share gone of what the model knew about the concepts",
        "share lost about others",
        labels={name: [label for _, label, _ in points] for name, points in ordered.items()},
    )


def capacity_curve(document: dict[str, Any]) -> Drawing:
    """Return the share lost about others against the number of people, a line for each way of editing."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        lines.setdefault(row["way"], []).append((PEOPLE_PER_ROUND * row["rounds"], row["others"]))
    return curve_plot(
        "Capacity: lost about others by list length", lines, "people unlearned", "share lost about others"
    )


def main() -> None:
    """Read the rows and write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curve", choices=["price", "capacity"])
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.curve == "price":
        drawing = price_curve(read_rows(arguments.rows))
    else:
        drawing = capacity_curve(json.loads(arguments.rows.read_text(encoding="utf-8")))
    with new_file(arguments.out) as partial:
        partial.write_text(drawing.svg(standalone=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
