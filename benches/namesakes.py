"""Measure what people lose of what a model knows when others with the same first or last name are unlearned.

    python benches/namesakes.py MODEL --statistics FILE --out namesakes.jsonl

The probes are the package's pairs (`rocr/data/namesakes.jsonl`) and, about the unlearned people themselves, its default
probes. Pairs whose namesake the model knows (a fact with at least 0.5 in multiple choice) are unlearned in lists of
five, as short lists are the default's hard case, with each redirect in turn; of each person at most four known facts
are asked in QA, fill in the blank and multiple choice. Namesakes that the edit retains as controls are also counted
separately from the others. Each list of each setting is a row, written when it is ready; a
run with the same file continues after its last row. Without the statistics, they are collected on --text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rocr
from rocr.evaluation import EvaluateOptions, Evaluation, Probe, evaluate, load_probes
from rocr.model.load import find_model, load_model
from rocr.statistics.corpus import read_texts

FORMS = ("qa", "fb", "mcp")
KNOWN, FACTS, LIST = 0.5, 4, 5
REDIRECTS = ("Bruce Lee", "Frédéric Chopin", "Akira Kurosawa", "Confucius", "Maria Callas")
SETTINGS = {
    "default": rocr.EditConfig(),
    "no variants": rocr.EditConfig(variants="none"),
    "unweighted": rocr.EditConfig(least_closed=0.0),
    "smaller ridge": rocr.EditConfig(ridge=0.1, least_closed=0.0),
    "not retained": rocr.EditConfig(retain_weight=0.0),
    "full, not retained": rocr.EditConfig(token_schedule="full", retain_weight=0.0),
    "full": rocr.EditConfig(token_schedule="full"),
    "last tokens": rocr.EditConfig(key_tokens="last", retain_weight=0.0),
}


def known(model: Any, tokenizer: Any, probes: Sequence[Probe], most: int = FACTS) -> list[Probe]:
    """Return of each subject at most `most` probes that the model answers in multiple choice."""
    found = evaluate(model, tokenizer, probes, ("mcp",), options=EvaluateOptions(seed=0)).known_probes(KNOWN)
    kept: dict[str, list[Probe]] = {}
    for index in sorted(found):
        kept.setdefault(probes[index].subject, []).append(probes[index])
    return [probe for facts in kept.values() for probe in facts[:most]]


def sums(evaluation: Evaluation, probes: Sequence[Probe], retained: set[str]) -> dict[str, float]:
    """Return the sum of the scores above chance by form, of the people, all namesakes and those not in `retained`."""
    found = {f"{who} {form}": 0.0 for who in ("forget", "retain", "others") for form in FORMS}
    for item in evaluation.items:
        probe = probes[item.probe]
        chance = 1 / (1 + len(probe.distractors)) if item.form == "mcp" else 0.0
        found[f"{probe.split} {item.form}"] += item.score - chance
        if probe.split == "retain" and probe.subject not in retained:
            found[f"others {item.form}"] += item.score - chance
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the shares gone about the people and lost about their namesakes."""
    cells = [f"{what} {form}" for what in ("forget", "retain", "others") for form in FORMS]
    words = ("gone", "namesakes lost", "lost of those not retained")
    titles = [f"{form.upper()}, {word}" for word in words for form in FORMS]
    lines = [f"| setting | people | {' | '.join(titles)} |", "|---|---:|" + "---:|" * len(cells)]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        before, after = ({cell: sum(row[when][cell] for row in own) for cell in cells} for when in ("before", "after"))
        shares = " | ".join(f"{1 - after[cell] / before[cell]:.1%}" if before[cell] else "" for cell in cells)
        lines.append(f"| {setting} | {sum(len(row['people']) for row in own)} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the settings and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--statistics", type=Path, required=True, help="file to read, or to write if it does not exist")
    parser.add_argument("--text", type=Path, help="text to collect statistics on")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--lists", type=int, help="number of lists (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="file to which the rows are added")
    arguments = parser.parse_args()
    loaded = load_model(find_model(arguments.model), torch.bfloat16)
    model, tokenizer = loaded.model, loaded.tokenizer
    if not arguments.statistics.exists():
        texts = list(read_texts([arguments.text]))
        options = rocr.CollectOptions(tokens=arguments.tokens)
        rocr.collect_statistics(model, tokenizer, texts[: len(texts) // 2], options=options).save(arguments.statistics)
    statistics = rocr.Statistics.load(arguments.statistics)

    data = Path(rocr.__file__).parent / "data"
    namesakes = known(model, tokenizer, load_probes(data / "namesakes.jsonl"))
    people = list(dict.fromkeys(str(probe.namesake_of) for probe in namesakes))
    about = known(model, tokenizer, [p for p in load_probes(data / "probes.jsonl") if p.subject in people])
    lists = [people[start : start + LIST] for start in range(0, len(people), LIST)][: arguments.lists]
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for names in lists:
        asked = [replace(p, split="forget") for p in about if p.subject in names]
        asked += [replace(p, split="retain") for p in namesakes if p.namesake_of in names and p.subject not in names]
        todo = [s for s in arguments.settings if (s, names) not in [(row["setting"], row["people"]) for row in rows]]
        first = evaluate(model, tokenizer, asked, FORMS) if todo else None
        concepts = [rocr.Concept(name, REDIRECTS[i % len(REDIRECTS)]) for i, name in enumerate(names)]
        for setting in todo:
            edit = rocr.unlearn(
                model, tokenizer, concepts, statistics, SETTINGS[setting], guards=rocr.Guards(force=True)
            )
            second = evaluate(model, tokenizer, asked, FORMS)
            edit.revert(model)
            retained = {label.name for label in edit.retained}
            assert first is not None
            before, after = (sums(each, asked, retained) for each in (first, second))
            rows.append({"setting": setting, "people": names, "before": before, "after": after})
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
