"""Tables of reports, for a person."""

from __future__ import annotations

from typing import Any

from rocr.cli.console import Console

SHOWN_ROWS = 20


def show_report(report: dict[str, Any], console: Console, place: str | None) -> None:
    """Show what came of an edit: concepts, answers, layers, seconds, and where it lies."""
    _show_concepts(report, console)
    for on_list, title in (
        (True, "Answers about concepts on the list"),
        (False, "Answers about names not on the list"),
    ):
        rows = [
            (answer["name"], answer["before"], answer["after"])
            for answer in report["answers"]
            if answer["on_list"] == on_list
        ]
        if rows:
            console.table(title, ("name", "before", "after"), rows)
    _show_layers(report, console)
    seconds = console.seconds
    console.table("Seconds", tuple(seconds), [tuple(f"{value:.1f}" for value in seconds.values())])
    details = ", ".join(f"{stage} {value:.2f}" for stage, value in report["seconds"]["edit"].items())
    console.say(f"The edit itself: {sum(report['seconds']['edit'].values()):.2f} s ({details}).")
    if place is not None:
        console.say(f"The result is in {place}.")


def _show_concepts(report: dict[str, Any], console: Console) -> None:
    concepts = report["concepts"]
    rows = [
        (concept["name"], concept["redirect"], _percent(concept["closed"]), _percent(concept["distance"]))
        for concept in concepts[:SHOWN_ROWS]
    ]
    console.table("Concepts", ("concept", "redirect", "residual closed", "distance left"), rows)
    if len(concepts) > SHOWN_ROWS:
        console.say(f"and {len(concepts) - SHOWN_ROWS} more, in report.json.")


def _show_layers(report: dict[str, Any], console: Console) -> None:
    rows = [
        (str(layer["layer"]), str(layer["keys"]), layer["metric"], _percent(layer["relative_norm"]))
        for layer in report["layers"]
    ]
    text = report["statistics"]
    console.table("Layers", ("layer", "keys", "metric", "update / weight"), rows)
    console.say(f"Ordinary text: {text.get('tokens', 0):,} tokens ({text.get('text', 'unknown')}).")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"
