"""Measure what spellings as keys change: how much is gone when a name is misspelt or abbreviated, and at what price.

    python benches/variants.py MODEL --statistics FILE --out variants.jsonl

Five people of the package's probes are unlearned together; of each of them at most four facts that the model knows (at
least 0.5 in multiple choice) are asked, and of ten others two. Each setting is a row, written when it is ready; a run
with the same file continues after its last row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from namesakes import REDIRECTS, known

import rocr
from rocr.evaluation import Evaluation, Probe, evaluate, load_probes
from rocr.model.load import find_model, load_model

PROBES = Path(rocr.__file__).parent / "data" / "probes.jsonl"
FORMS = ("qa", "fb", "mcp", "misspelt", "abbreviated", "lower", "surname")
PEOPLE = ("Stephen King", "Marie Curie", "Leonardo da Vinci", "Walt Disney", "Neil Armstrong")
OTHERS = (
    "Albert Einstein", "Pablo Picasso", "Steve Jobs", "Isaac Newton", "William Shakespeare", "Nelson Mandela",
    "Charles Darwin", "Ludwig van Beethoven", "Bill Gates", "Abraham Lincoln",
)  # fmt: skip
SETTINGS = {"default": rocr.EditConfig(), "spelling": rocr.EditConfig(variants="spelling")}


def sums(evaluation: Evaluation, probes: Sequence[Probe]) -> dict[str, float]:
    """Return the sum of the scores above chance by split and form."""
    found: dict[str, float] = {}
    for item in evaluation.items:
        key = f"{probes[item.probe].split} {item.form}"
        found[key] = found.get(key, 0.0) + item.score - (item.chance or 0.0)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the shares gone about the people and lost about others."""
    lines = ["| setting | about | " + " | ".join(FORMS) + " |", "|---|---|" + "---:|" * len(FORMS)]
    for row in rows:
        for split, word in (("forget", "gone"), ("retain", "others lost")):
            shares = (1 - row["after"][f"{split} {form}"] / row["before"][f"{split} {form}"] for form in FORMS)
            lines.append(f"| {row['setting']} | {word} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the settings and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--statistics", type=Path, required=True, help="of the model, as rocr stats writes them")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, required=True, help="file to which the rows are added")
    arguments = parser.parse_args()
    loaded = load_model(find_model(arguments.model), torch.bfloat16)
    model, tokenizer = loaded.model, loaded.tokenizer
    statistics = rocr.Statistics.load(arguments.statistics)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    todo = [setting for setting in arguments.settings if setting not in [row["setting"] for row in rows]]
    if todo:
        plain = [p for p in load_probes(PROBES) if p.subject in (*PEOPLE, *OTHERS) and p.form == "qa"]
        facts = known(model, tokenizer, plain)
        asked = [replace(p, split="forget") for p in facts if p.subject in PEOPLE]
        for name in OTHERS:
            asked += [replace(p, split="retain") for p in facts if p.subject == name][:2]
        before = sums(evaluate(model, tokenizer, asked, FORMS), asked)
    concepts = [rocr.Concept(name, REDIRECTS[i], (), "person") for i, name in enumerate(PEOPLE)]
    for setting in todo:
        guards = rocr.Guards(force=True)
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, SETTINGS[setting], guards=guards)
        after = sums(evaluate(model, tokenizer, asked, FORMS), asked)
        edit.revert(model)
        rows.append({"setting": setting, "people": list(PEOPLE), "before": before, "after": after})
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
