"""Tables of a report."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from rocr.cli.console import Console
from rocr.cli.verdicts import PARTIAL, PARTIAL_TO, STRONG, STRONG_TO, verdict, weak_sentences

SHOWN_ROWS = 20
SHOWN_PAIRS = 5
FLUENT = 0.95
"""Answers that keep this share of their n-gram entropy are as fluent as before."""


def show_report(report: dict[str, Any], console: Console, place: str | None) -> None:
    """Show a report: concepts, answers, layers, seconds, what to try where the edit is weak, and the folder."""
    _show_concepts(report, console)
    _show_collisions(report["collisions"], console)
    _show_retained(report["neighbours"], console, len(report.get("harmed", [])) if report["answers"] else None)
    show_harmed(report.get("harmed", []), console)
    for on_list, title in (
        (True, "Answers about concepts on the list"),
        (False, "Answers about names not on the list"),
    ):
        answers = [answer for answer in report["answers"] if answer["on_list"] == on_list]
        if answers:
            rows = [(answer["question"], answer["before"], answer["after"]) for answer in answers]
            console.table(title, ("question", "before", "after"), rows)
    show_fluency(report.get("fluency"), console)
    _show_layers(report, console)
    _show_routing(report.get("routing", []), console)
    seconds = console.seconds
    console.table("Seconds", tuple(seconds), [tuple(f"{value:.1f}" for value in seconds.values())])
    details = ", ".join(f"{stage} {value:.2f}" for stage, value in report["seconds"]["edit"].items())
    console.say(f"The edit itself: {sum(report['seconds']['edit'].values()):.2f} s ({details}).")
    for sentence in weak_sentences(report["concepts"], report["answers"], report["config"]["ridge"]):
        console.warn(sentence)
    if place is not None:
        console.say(f"The result is in {place}.")


def show_fluency(found: dict[str, float] | None, console: Console) -> None:
    """Say whether the answers about concepts repeat themselves more than before; nothing without answers."""
    if found is None or not found["before"]:
        return
    kept = found["after"] / found["before"]
    verdict = "still read as before" if kept >= FLUENT else "repeat themselves more: try another redirect"
    console.say(
        f"The answers about concepts {verdict} (n-gram entropy {found['before']:.2f} bits before, "
        f"{found['after']:.2f} after)."
    )


def number_of_concepts(concepts: Sized) -> str:
    """Such as "1 concept" or "1,000 concepts"."""
    return f"{len(concepts):,} concept{'' if len(concepts) == 1 else 's'}"


def _show_concepts(report: dict[str, Any], console: Console) -> None:
    concepts = report["concepts"]
    rows = [
        (
            concept["name"],
            concept["redirect"],
            _percent(concept["closed"]),
            _percent(concept["distance"]),
            verdict(concept["distance"]),
        )
        for concept in concepts[:SHOWN_ROWS]
    ]
    console.table("Concepts", ("concept", "redirect", "residual closed", "distance left", "redirection"), rows)
    if len(concepts) > SHOWN_ROWS:
        console.say(f"and {len(concepts) - SHOWN_ROWS} more, in report.json.")
    if any(concept["distance"] is not None for concept in concepts):
        console.say(
            "Distance left: from the state at the name to that at the redirect, as a share of the distance before. Up "
            f"to {STRONG_TO:.0%} is called {STRONG}, up to {PARTIAL_TO:.0%} {PARTIAL}."
        )


def _show_collisions(found: dict[str, Any] | None, console: Console) -> None:
    if found is None or not (found["collinear"] or found["inside"]):
        return
    nested = {frozenset((pair["first"], pair["second"])) for pair in found["nested"]}
    pairs: dict[frozenset[str], dict[str, Any]] = {}
    for pair in (*found["nested"][:SHOWN_PAIRS], *found["worst"][:SHOWN_PAIRS]):
        pairs.setdefault(frozenset((pair["first"], pair["second"])), pair)
    rows = [
        (
            pair["first"],
            pair["second"],
            f"{pair['cosine']:.3f}",
            _percent(pair["conflict"]),
            "yes" if names in nested else "",
        )
        for names, pair in sorted(pairs.items(), key=lambda item: -(item[1]["cosine"] + item[1]["conflict"]))
    ]
    console.table("Concepts that conflict", ("concept", "and", "cosine of keys", "conflict", "inside it"), rows)
    console.say(
        f"Pairs with nearly the same key: {found['collinear']:,}, of these with different redirects: "
        f"{found['conflicting']:,}; with one name inside another: {found['inside']:,}. The worst are in report.json."
    )


def _show_retained(found: dict[str, Any] | None, console: Console, harmed: int | None) -> None:
    if found is None:
        return
    kind = "retained names" if found["given"] else "redirects and namesakes" if "controls" in found else "redirects"
    rows = [
        (impact["neighbour"], impact["concept"], str(impact["layer"]), _percent(impact["share"]))
        for impact in found["worst"][:SHOWN_PAIRS]
    ]
    console.table(
        f"Concepts that move {kind} most", ("name", "moved by", "layer", "share of its output, at most"), rows
    )
    worst = found["moved"][0]
    console.say(
        f"At {found['count']:,} {kind} the outputs of the edited layers move by {_percent(found['mean'])} of their "
        f"length on average, most at {worst['neighbour']} ({_percent(worst['share'])})."
        + (
            f" Answers often stay as they were: {harmed or 'none'} of those asked about are harmed."
            if harmed is not None
            else ""
        )
    )


def show_harmed(harms: list[dict[str, Any]], console: Console) -> None:
    """Name what an edit harms, each with numbers, and what may spare it; nothing if there is none."""
    for harm in harms:
        console.warn(
            f"harmed: {harm['name']} (answer's probability per token {harm['before']:.2f} to {harm['after']:.2f}"
            + (f", by {harm['concept']})." if harm["concept"] is not None else ").")
        )
    if harms:
        console.say(
            "Names on no list are harmed: another redirect or --key-tokens last may spare them. "
            "--control measures names of your choice."
        )


def _show_layers(report: dict[str, Any], console: Console) -> None:
    rows = [
        (str(layer["layer"]), str(layer["keys"]), layer["metric"], _percent(layer["relative_norm"]))
        for layer in report["layers"]
    ]
    text = report["statistics"]
    console.table("Layers", ("layer", "keys", "metric", "update / weight"), rows)
    console.say(f"Ordinary text: {text.get('tokens', 0):,} tokens ({text.get('text', 'unknown')}).")


def _show_routing(layers: list[dict[str, Any]], console: Console) -> None:
    if not layers:
        return
    rows = [
        (
            str(layer["layer"]),
            f"{len(layer['touched'])} of {layer['experts']}",
            f"{min(layer['tokens']):,}",
            _percent(min(layer["agreement"])),
            _percent(sum(layer["agreement"]) / len(layer["agreement"])),
        )
        for layer in layers
    ]
    columns = ("layer", "experts edited", "fewest tokens of one", "least agreement of templates", "mean agreement")
    console.table("Experts", columns, rows)
    names = list(dict.fromkeys(name for layer in layers for name in layer["uncovered"]))
    if names:
        from rocr.edit.routing import FEW_TOKENS

        more = f" and {len(names) - SHOWN_PAIRS} more" if len(names) > SHOWN_PAIRS else ""
        console.warn(
            f"{', '.join(names[:SHOWN_PAIRS])}{more}: routed to experts with fewer than {FEW_TOKENS} tokens in the "
            "statistics, whose other text is hardly protected. Collect statistics from more text (--tokens, --text)."
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"
