"""Compare settings by how much they forget and what they damage, on people that a model knows, to choose defaults.

    python benches/search_defaults.py MODEL --probes people.jsonl --text wikitext2_test_raw.txt --out search.jsonl

The first half of the text is for statistics, the second half for perplexity. People of whom the model knows at least
three facts are taken in the order of the probes: the first ones to search on, the others to test on (`--test`). Each
person is unlearned alone and evaluated together with a retain set of people that are neither searched nor tested on.
`--together 10,50,100` unlearns as many people at once, with the names of `--names` after the known people. The
candidate "about NAME, no edit" asks the unedited model the questions with the redirect's name in place of the
person's: it shows what an edit would leave if the model read exactly this name. Each row is written when it is ready,
and a run with the same file continues after its last row.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from search_rows import FORMS, read_rows, table
from torch import nn

import rocr
from rocr.evaluation import (
    EvaluateOptions,
    Evaluation,
    Probe,
    choose_redirects,
    compare_evaluations,
    evaluate,
    load_probes,
)
from rocr.evaluation.measures import TextSample, perplexity
from rocr.evaluation.redirects import replace_subject
from rocr.model.architecture import find_architecture
from rocr.model.layers import chosen_layers
from rocr.model.load import find_model, load_model
from rocr.statistics.corpus import read_texts

KNOWN = 0.5
LEAST_FACTS = 3
REDIRECT = "Bruce Lee"
REDIRECTS = (
    REDIRECT,
    *("Frédéric Chopin", "Lionel Messi", "Charlie Parker", "Akira Kurosawa", "Confucius", "Harry Houdini"),
    *("Diego Maradona", "Edmund Hillary", "Maria Callas"),
)
"""Redirects of people that are unlearned together, so that not all of them become the same person."""
CHOICES = (
    *REDIRECTS,
    *("Bob Marley", "Jackie Chan", "Mother Teresa", "Attila the Hun", "Sitting Bull", "Louis Armstrong"),
)
"""Redirects to choose from for each person; the last six have little in common with the people to search on."""
RETAINED, RETAINED_TOGETHER = 8, 16
"""Number of people of the retain set if people are unlearned alone, and if they are unlearned together."""


@dataclass(frozen=True)
class Candidate:
    """Settings to try.

    Attributes:
        name: Name of the candidate.
        config: Settings of the edit; None asks the unedited model about the redirect.
        redirects: Redirects that the people get in turn.
        chosen: Whether the redirect of each person is chosen from `redirects` by `choose_redirects`.
    """

    name: str
    config: rocr.EditConfig | None
    redirects: tuple[str, ...] = (REDIRECT,)
    chosen: bool = False


@dataclass
class Bench:
    """A model with its statistics, text, probes and people, and its scores before any edit."""

    model: nn.Module
    tokenizer: Any
    statistics: rocr.Statistics
    text: TextSample
    probes: list[Probe]
    people: list[str]
    base: Evaluation

    def ask_about_redirect(self, candidate: Candidate, people: Sequence[str]) -> dict[str, Any]:
        """Ask the unedited model, with the redirect's name in place of each person's, and return a row."""
        named = [p for p in self.probes if p.subject in people and p.subject in p.query]
        base = restrict(self.base, self.probes, named)
        swapped = [replace_subject(probe, candidate.redirects[0]) for probe in named]
        change = compare_evaluations(base, evaluate(self.model, self.tokenizer, swapped, FORMS))
        row: dict[str, Any] = {"candidate": candidate.name, "people": list(people), "seconds": 0.0, "together": 0}
        row |= {f"forget {part.form}": [part.before, part.after, part.chance] for part in change.changes}
        return row

    def run(
        self, candidate: Candidate, people: Sequence[str], retain: Sequence[str], more: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Unlearn people and more names together, evaluate people and retain set, revert the edit, and return a row."""
        if candidate.config is None:
            return self.ask_about_redirect(candidate, people)
        redirects = candidate.redirects
        concepts = [rocr.Concept(name, redirects[i % len(redirects)]) for i, name in enumerate([*people, *more])]
        asked = [p for p in self.probes if p.subject in {*people, *retain}]
        chosen = [replace(p, split="forget" if p.subject in people else "retain") for p in asked]
        base = restrict(self.base, self.probes, chosen)
        if candidate.chosen:
            forget = [p for p in chosen if p.split == "forget"]
            concepts = [c.concept for c in choose_redirects(self.model, self.tokenizer, forget, redirects)]
        start = time.perf_counter()
        guards = rocr.Guards(force=True)  # the authors' settings exceed some limits
        edit = rocr.unlearn(self.model, self.tokenizer, concepts, self.statistics, candidate.config, guards=guards)
        seconds = time.perf_counter() - start
        try:
            after = evaluate(self.model, self.tokenizer, chosen, FORMS)
            after.measures["perplexity"] = perplexity(self.model, self.text)
        finally:
            edit.revert(self.model)
        change = compare_evaluations(base, after)
        row: dict[str, Any] = {"candidate": candidate.name, "people": list(people), "seconds": seconds}
        row |= {"together": len(concepts), "redirects": [concept.redirect for concept in edit.concepts[: len(people)]]}
        for part in change.changes:
            row[f"{part.split} {part.form}"] = [part.before, part.after, part.chance]
        row["perplexity"] = [self.base.measures["perplexity"], after.measures["perplexity"]]
        row["norm"] = [layer.relative_norm for layer in edit.report.layers]
        return row


def restrict(base: Evaluation, probes: Sequence[Probe], chosen: Sequence[Probe]) -> Evaluation:
    """Return the scores of the chosen probes, with their indices and splits in `chosen`."""
    place = {(p.subject, p.query): (i, p.split) for i, p in enumerate(chosen)}
    items = []
    for item in base.items:
        found = place.get((probes[item.probe].subject, probes[item.probe].query))
        if found is not None:
            items.append(replace(item, probe=found[0], split=found[1]))
    return Evaluation(items, len(chosen))


def known_facts(model: nn.Module, tokenizer: Any, probes: list[Probe], most: int) -> tuple[list[Probe], Evaluation]:
    """Return at most `most` known facts of each person with at least LEAST_FACTS, and the model's scores for them."""
    everything = evaluate(model, tokenizer, probes, FORMS, options=EvaluateOptions(seed=0))
    kept: dict[str, list[int]] = {}
    for index in sorted(everything.known_probes(KNOWN)):
        kept.setdefault(probes[index].subject, []).append(index)
    chosen = [i for facts in kept.values() if len(facts) >= LEAST_FACTS for i in facts[:most]]
    number = {old: new for new, old in enumerate(chosen)}
    items = [replace(item, probe=number[item.probe]) for item in everything.items if item.probe in number]
    return [probes[i] for i in chosen], Evaluation(items, len(chosen))


def candidates(text: str | None, seed: int = 0) -> list[Candidate]:
    """Return the named candidates, or all; each changes one of the default settings with a seed, other than 0 named."""
    default = rocr.EditConfig(seed=seed)
    one = {
        "default": default,
        "ridge 0.1": replace(default, ridge=0.1),
        "ridge 0.5": replace(default, ridge=0.5),
        "ridge 2": replace(default, ridge=2.0),
        "gamma 1": replace(default, gamma=1.0),
        "as a short list": replace(default, token_schedule="full", template_weight=0.0),
        "as a long list": replace(default, token_schedule="ramp", template_weight=0.03),
        "gamma 30": replace(default, gamma=30.0),
        "rows of weight 1": replace(default, least_closed=0.0),
        "closed 0.8": replace(default, least_closed=0.8),
        "retained weight 3": replace(default, retain_weight=3.0),
        "strength 1.5": replace(default, strength=1.5),
        "last token only": replace(default, key_tokens="last"),
        "a key per template": replace(default, keys_per_concept="all"),
        "layers 2,3": replace(default, layers=(2, 3)),
        "layers 2,5": replace(default, layers=(2, 5)),
        "layers 3,5": replace(default, layers=(3, 5)),
        "layers 2,4,6": replace(default, layers=(2, 4, 6)),
        "layers 3-5": replace(default, layers=(3, 4, 5)),
        "layers 2-4": replace(default, layers=(2, 3, 4)),
        "layers 4-6": replace(default, layers=(4, 5, 6)),
    }
    found = [Candidate(name, config) for name, config in one.items()]
    others = ("Frédéric Chopin", "Donald Trump", "Lionel Messi", "Pikachu", "a gardener")
    found += [Candidate(f"redirect {name}", default, (name,)) for name in others]
    found += [Candidate(f"about {name}, no edit", None, (name,)) for name in (REDIRECT, others[0])]
    found.append(Candidate("redirect auto", default, ("auto",)))
    found.append(Candidate("redirect chosen", default, CHOICES, chosen=True))
    found.append(Candidate("official", rocr.EditConfig.official(), ("Donald Trump",)))
    names = text.split(";") if text else [candidate.name for candidate in found]
    unknown = set(names) - {candidate.name for candidate in found}
    if unknown:
        raise SystemExit(
            f"Unknown candidates: {', '.join(sorted(unknown))}; the candidates are "
            f"{', '.join(candidate.name for candidate in found)}."
        )
    ending = f", seed {seed}" if seed else ""
    return [replace(candidate, name=candidate.name + ending) for candidate in found if candidate.name in names]


def prepare(arguments: argparse.Namespace) -> Bench:
    """Load the model, collect statistics on the first half of the text, and find the probes that the model knows."""
    loaded = load_model(find_model(arguments.model), getattr(torch, arguments.dtype))
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = list(read_texts([arguments.text]))
    half = len(texts) // 2
    ordinary = texts[:half]
    sample = TextSample.take(texts[half:], tokenizer, arguments.perplexity_tokens)
    place = Path(arguments.statistics)
    if place.exists():
        statistics = rocr.Statistics.load(place)
    else:
        options = rocr.CollectOptions(tokens=arguments.statistics_tokens)
        if arguments.seed:
            random.Random(arguments.seed).shuffle(ordinary)
        configs = [candidate.config for candidate in candidates(arguments.candidates)]
        architecture = find_architecture(model)
        layers = sorted({layer for config in configs if config for layer in chosen_layers(config, architecture)})
        statistics = rocr.collect_statistics(model, tokenizer, ordinary, layers, options)
        statistics.save(place)
    probes = [probe for path in arguments.probes for probe in load_probes(path) if probe.kind != "thing"]
    probes, base = known_facts(model, tokenizer, probes, arguments.facts)
    base.measures["perplexity"] = perplexity(model, sample)
    people = list(dict.fromkeys(probe.subject for probe in probes))
    return Bench(model, tokenizer, statistics, sample, probes, people, base)


def main() -> None:
    """Run the candidates and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--probes", nargs="+", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--statistics", required=True, help="file to read, or to write if it does not exist")
    parser.add_argument("--statistics-tokens", type=int, default=140_000)
    parser.add_argument("--perplexity-tokens", type=int, default=8192)
    parser.add_argument("--facts", type=int, default=5, help="maximum number of facts of each person")
    parser.add_argument(
        "--people", type=int, default=8, help="number of people to search on; the others are for --test"
    )
    parser.add_argument("--most", type=int, default=10, help="maximum number of people to search or test on")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--together", type=number_list, default=[], help="numbers of people to unlearn at once")
    parser.add_argument(
        "--names", nargs="+", default=[], help="files with more names, one a line or as `subject` of JSON lines"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the settings, and of the order of the texts for new statistics"
    )
    parser.add_argument("--candidates", help="names, separated by semicolons (default: all)")
    parser.add_argument("--test", action="store_true", help="use the people that are not searched on")
    parser.add_argument("--out", required=True, help="file to which the rows are added")
    arguments = parser.parse_args()
    bench = prepare(arguments)
    searched, others = bench.people[: arguments.people], bench.people[arguments.people :]
    rows = read_rows(Path(arguments.out))
    people = (others if arguments.test else searched)[: arguments.most]
    retained = others[arguments.most :][:RETAINED_TOGETHER]
    with Path(arguments.out).open("a", encoding="utf-8") as file:

        def run(candidate: Candidate, group: list[str], retain: list[str], more: list[str]) -> None:
            together = len(group) + len(more) if candidate.config else 0
            done = [(row["candidate"], row["people"], row["together"]) for row in rows]
            if (candidate.name, group, together) not in done:
                rows.append(bench.run(candidate, group, retain, more))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()

        for candidate in candidates(arguments.candidates, arguments.seed):
            if not arguments.together:
                for person in people:
                    run(candidate, [person], retained[:RETAINED], [])
            for count in arguments.together:
                more = [name for name in listed_names(arguments.names) if name not in {*people, *retained, *REDIRECTS}]
                spread = replace(candidate, redirects=REDIRECTS)
                run(spread, people[:count], retained, more[: max(0, count - len(people))])
    print(table(rows))


def number_list(text: str) -> list[int]:
    """Return integers that are separated by commas."""
    return [int(part) for part in text.split(",")]


def listed_names(paths: Sequence[str]) -> list[str]:
    """Return the names in files, or the subjects of JSON lines, without duplicates."""
    lines = [(path, line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(json.loads(line)["subject"] if path.endswith(".jsonl") else line for path, line in lines))


if __name__ == "__main__":
    main()
