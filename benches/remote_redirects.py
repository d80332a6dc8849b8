"""Ask an unedited model about redirects in place of subjects: what an edit leaves at best, and what "auto" chooses.

    python benches/remote_redirects.py MODEL --kind person --subjects 8 --out redirects.json

The subjects are those of the package's probes of whom the model knows at least three facts (at least 0.5 in multiple
choice), in their order. The candidates of `--redirect auto` were searched on the first eight people, whom `--skip 8`
leaves out, and on all things but the five of variants.py, which `--names` can choose. Each question is asked with each
candidate's name in place of the subject's. The share that is left of what the model knew above chance is the sum over
the questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import commit, cpu_name
from namesakes import FORMS, known

import rocr
from rocr.edit.automatic_redirects import CANDIDATES, INVENTED, with_redirects
from rocr.evaluation import Probe, evaluate, load_probes
from rocr.evaluation.redirects import replace_subject
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.load import find_model, load_model

LEAST_FACTS, FACTS = 3, 5
LAST_LAYER = 4
PROBES = Path(rocr.__file__).parent / "data" / "probes.jsonl"


def known_facts(model: Any, tokenizer: Any, kind: str) -> dict[str, list[Probe]]:
    """Return the probes of each subject of a kind that the model knows and that name the subject."""
    probes = [p for p in load_probes(PROBES) if p.form == "qa" and (p.kind == "thing") == (kind == "thing")]
    kept: dict[str, list[Probe]] = {}
    for probe in known(model, tokenizer, probes, most=len(probes)):
        if probe.subject in probe.query:
            kept.setdefault(probe.subject, []).append(replace(probe, wordings={}))
    return {subject: facts[:FACTS] for subject, facts in kept.items() if len(facts) >= LEAST_FACTS}


def above_chance(
    model: Any, tokenizer: Any, probes: Sequence[Probe], subjects: Sequence[str]
) -> dict[str, list[float]]:
    """Return for each subject the sums of its probes' scores above chance in `FORMS`."""
    found = {subject: [0.0] * len(FORMS) for subject in subjects}
    for item in evaluate(model, tokenizer, probes, FORMS).items:
        found[subjects[item.probe]][FORMS.index(item.form)] += item.score - (item.chance or 0.0)
    return found


def table(results: dict[str, Any]) -> str:
    """Return the shares that are left with each candidate for all subjects, and with the choice of "auto" for each."""
    before, after, chosen = results["before"], results["after"], results["chosen"]
    rows = {name: [own[subject] for subject in before] for name, own in after.items()}
    rows['chosen by "auto"'] = [after[chosen[subject]][subject] for subject in before]
    lines = ["| redirect | QA, left | FB, left | MCP, left |", "|---|---:|---:|---:|"]
    for name, scores in rows.items():
        sums = [
            [sum(each[form] for each in group) for form in range(len(FORMS))] for group in (scores, before.values())
        ]
        lines.append(
            f"| {name} | " + " | ".join(f"{left / first:.1%}" for left, first in zip(*sums, strict=True)) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Ask about the subjects and about each candidate, write a JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--kind", choices=("person", "thing"), default="person")
    parser.add_argument("--skip", type=int, default=0, help="number of subjects that are left out")
    parser.add_argument("--subjects", type=int, default=8, help="largest number of subjects")
    parser.add_argument("--names", nargs="+", help="the subjects, in place of all")
    parser.add_argument("--more", nargs="+", default=[], help="names beside the candidates of --redirect auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    loaded = load_model(find_model(arguments.model), torch.bfloat16)
    model, tokenizer = loaded.model, loaded.tokenizer
    facts = known_facts(model, tokenizer, arguments.kind)
    subjects = [name for name in facts if name in (arguments.names or facts)][arguments.skip :][: arguments.subjects]
    probes = [probe for subject in subjects for probe in facts[subject]]
    names = [probe.subject for probe in probes]
    concepts = [rocr.Concept(subject, "auto", kind=arguments.kind) for subject in subjects]
    architecture = with_kind(find_architecture(model), LAST_LAYER)
    # One at a time, since a candidate that shares a word with any concept of a list is left out.
    chosen = {concept.name: with_redirects(architecture, tokenizer, [concept])[0].redirect for concept in concepts}
    results: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "torch": torch.__version__, "commit": commit()},
        "chosen": chosen,
        "before": above_chance(model, tokenizer, probes, names),
        "after": {},
    }
    for redirect in dict.fromkeys((*CANDIDATES[arguments.kind], INVENTED[arguments.kind], *arguments.more)):
        swapped = [replace_subject(probe, redirect) for probe in probes]
        results["after"][redirect] = above_chance(model, tokenizer, swapped, names)
    arguments.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(chosen)
    print(table(results))


if __name__ == "__main__":
    main()
