"""Attack edits with rocr's default and the authors' settings, and print a Markdown table of what comes back.

    python benches/attacks.py
    python benches/attacks.py MODEL --statistics FILE --forms qa,fb,mcp --attacks bottom-rank context prefill samples

People are those of whom the model knows most: the first ones with at least two facts that it answers with a mean score
of QA and fill in the blank of at least `--known`. They are unlearned together, with five redirects in turn. The other
people's known facts are what some attacks learn from. The file is written after each attack; a run with the same file,
on the same commit and machine, continues after the last one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import commit, cpu_name

import rocr
from rocr.demo import demo_model
from rocr.evaluation import Evaluation, Probe, evaluate, load_probes
from rocr.evaluation.attacks.attack import AttackLimits
from rocr.evaluation.attacks.study import STUDY, Studied, study
from rocr.evaluation.report import STUDY_COLUMNS, study_rows
from rocr.evaluation.scores import mean
from rocr.model.architecture import find_architecture
from rocr.model.layers import chosen_layers
from rocr.model.load import find_model, load_model

RESULTS = Path(__file__).parent / "results" / "attacks.json"
REDIRECTS = ("Bruce Lee", "Frédéric Chopin", "Akira Kurosawa", "Confucius", "Maria Callas")
SETTINGS = {"rocr": rocr.EditConfig(), "the authors' settings": rocr.EditConfig.official()}
LEAST_FACTS, MOST_FACTS, OTHERS = 2, 3, 24
LIMITS = AttackLimits(
    components=(1, 11, 30),
    questions=3,
    sample_tokens=12,
    mask_steps=10,
    tuning_steps=(4, 8),
    soft_steps=8,
    suffix_steps=3,
    suffix_candidates=24,
)
"""Smaller than the defaults of `AttackLimits`, so that a run takes minutes on one core."""


def known_facts(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> tuple[list[Probe], list[Probe]]:
    """Return the known facts about the people to unlearn, and those about others."""
    probes = load_probes(Path(rocr.__file__).parent / "data" / "probes.jsonl")
    candidates = list(dict.fromkeys(probe.subject for probe in probes))[: arguments.candidates]
    probes = [probe for probe in probes if probe.subject in candidates]
    scores: dict[int, list[float]] = {}
    for item in evaluate(model, tokenizer, probes, ("qa", "fb")).items:
        scores.setdefault(item.probe, []).append(item.score)
    facts: dict[str, list[Probe]] = {}
    for index in sorted(scores, key=lambda index: -mean(scores[index])):
        probe = probes[index]
        if mean(scores[index]) >= arguments.known and probe.subject not in REDIRECTS:
            facts.setdefault(probe.subject, []).append(probe)
    order = [probe.subject for probe in probes if len(facts.get(probe.subject, ())) >= LEAST_FACTS]
    chosen = list(dict.fromkeys(order))[: arguments.people]
    forget = [replace(probe, split="forget") for name in chosen for probe in facts[name][:MOST_FACTS]]
    others = [replace(p, split="retain") for name, own in facts.items() if name not in chosen for p in own]
    return forget, others[:OTHERS]


def statistics_of(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> rocr.Statistics:
    """Return the statistics of the file, or those of text that the model writes itself."""
    if arguments.statistics is not None:
        return rocr.Statistics.load(arguments.statistics)
    architecture = find_architecture(model)
    layers = sorted({layer for config in SETTINGS.values() for layer in chosen_layers(config, architecture)})
    return rocr.collect_statistics(model, tokenizer, None, layers, rocr.CollectOptions(tokens=arguments.tokens))


def retained_scores(evaluation: Evaluation) -> dict[str, float]:
    """Return the mean score of each form about others."""
    found = {form: evaluation.form_score(form, "retain") for form in evaluation.forms}
    return {form: score.score for form, score in found.items() if score is not None}


def table(document: dict[str, Any]) -> str:
    """Return a Markdown table: the scores of QA with the first settings, and the shares that come back with all."""
    settings = document["settings"]
    found = {name: {tuple(row[:2]): row for row in study_rows(run["attacks"])} for name, run in settings.items()}
    first = next(iter(found))
    columns = ["attack", "form", *STUDY_COLUMNS[2:-1], *(f"{STUDY_COLUMNS[-1]}, {name}" for name in found)]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for key, row in found[first].items():
        backs = [found[name][key][-1] if key in found[name] else "" for name in found]
        lines.append(f"| {' | '.join([*row[:-1], *backs])} |")
    for name, run in settings.items():
        change = ", ".join(
            f"{form} {score:.3f} to {run['retained']['after'][form]:.3f}"
            for form, score in run["retained"]["before"].items()
        )
        lines.append(f"\n{name}: {run['seconds']:.0f} s, layers {run['layers']}; others {change}")
        lines += [f"{each['name']}: {each['refused']}" for each in run["attacks"] if each["refused"]]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what a row is measured with."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def parsed() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder or a .gguf file (default: the demo's model)")
    parser.add_argument("--statistics", type=Path, help="statistics file (default: collected on the model's own text)")
    parser.add_argument("--tokens", type=int, default=10_000, help="tokens of that text (default: %(default)s)")
    parser.add_argument("--people", type=int, default=4, help="people to unlearn (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=16, help="people to choose from (default: %(default)s)")
    parser.add_argument("--known", type=float, default=0.15, help="least score of a known fact (default: %(default)s)")
    parser.add_argument("--forms", default="qa,fb", help="forms of the questions (default: %(default)s)")
    parser.add_argument("--attacks", nargs="+", choices=list(STUDY), default=list(STUDY), metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--show", action="store_true", help="print the table of the file --out, without a run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the attacks and print the table."""
    arguments = parsed()
    if arguments.show:
        print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    loaded = load_model(find_model(str(arguments.model or demo_model())), getattr(torch, arguments.dtype))
    model, tokenizer = loaded.model, loaded.tokenizer
    forget, others = known_facts(model, tokenizer, arguments)
    names = list(dict.fromkeys(probe.subject for probe in forget))
    concepts = [rocr.Concept(name, REDIRECTS[i % len(REDIRECTS)]) for i, name in enumerate(names)]
    statistics = statistics_of(arguments, model, tokenizer)
    forms = arguments.forms.split(",")
    document: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct" if arguments.model is None else Path(arguments.model).name,
        "dtype": arguments.dtype,
        "people": names,
        "facts": len(forget),
        "others": len(others),
        "forms": forms,
        "settings": {},
    }
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
        if any(found[name] != value for name, value in document.items() if name != "settings"):
            sys.exit(f"{arguments.out} is of another model or of other questions; choose another file.")
        document = found
    for setting in arguments.settings:
        run = document["settings"].get(setting, {})
        if run.get("machine") != machine():
            run = {"machine": machine(), "seconds": 0.0, "attacks": []}
        document["settings"][setting] = run
        left = [name for name in arguments.attacks if name not in {attack["name"] for attack in run["attacks"]}]
        if not left:
            continue
        guards = rocr.Guards(force=True)  # the authors' settings exceed some limits
        before = retained_scores(evaluate(model, tokenizer, others, forms))
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, SETTINGS[setting], guards=guards, ask=0)
        after = retained_scores(evaluate(model, tokenizer, others, forms))
        run |= {"layers": list(edit.layers), "retained": {"before": before, "after": after}}

        def receive(found: Studied, run: dict[str, Any] = run) -> None:
            run["attacks"].append(found.to_json())
            run["seconds"] += found.seconds
            arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{found.name}: {found.seconds:.0f} s {found.refused or ''}", flush=True)

        given = (model, tokenizer, [*forget, *others], edit, left, forms)
        study(*given, limits=LIMITS, receive=receive)
        edit.revert(model)
    print(table(document))


if __name__ == "__main__":
    main()
