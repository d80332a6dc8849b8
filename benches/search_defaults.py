"""What the default settings are chosen by: forgetting in every form, and what it costs, on people the model knows.

    python benches/search_defaults.py MODEL --probes people.jsonl --text wikitext2_test_raw.txt --out search.jsonl

The first half of the text gives the statistics, the second half the perplexity. People are taken in the order of
the probes, with at least three facts that the model knows; those to search on come first, those to test on after
them (`--test`). Each is unlearned alone, and asked about beside some of the others, who should be kept: people
that are not among those searched or tested on. With `--together 10,50,100` so many people are unlearned at once,
with the names of `--names` after the known ones. "about NAME, no edit" asks the model as it is the same questions
with the redirect's name in the place of the person's: what would be left if an edit made the model read exactly that.
Rows are written as they come, and a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from search_rows import FORMS, read_rows, table
from torch import nn

import rocr
from rocr import unlearn as pipeline
from rocr.evaluation import (
    EvaluateOptions,
    Evaluation,
    Probe,
    choose_redirects,
    compare_evaluations,
    evaluate,
    load_probes,
)
from rocr.evaluation.redirects import about
from rocr.evaluation.text_measures import TextSample, perplexity
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
"""Of people who are unlearned together: one redirect for all would teach the model that everybody is that person."""
CHOICES = (
    *REDIRECTS,
    *("Bob Marley", "Jackie Chan", "Mother Teresa", "Attila the Hun", "Sitting Bull", "Louis Armstrong"),
)
"""Redirects to choose among for each person; the last six share little with those who were searched on."""
KEPT, KEPT_TOGETHER = 8, 16


@dataclass(frozen=True)
class Candidate:
    """Settings to try, and what people are redirected to; without settings, no edit: the redirect is asked about."""

    name: str
    config: rocr.EditConfig | None
    redirects: tuple[str, ...] = (REDIRECT,)
    chosen: bool = False  # among the redirects, for each person by itself


@dataclass
class Bench:
    """A model with what is asked of it, and its scores before any edit."""

    model: nn.Module
    tokenizer: Any
    statistics: rocr.Statistics
    text: TextSample
    probes: list[Probe]
    people: list[str]
    base: Evaluation

    def ask_about_redirect(self, candidate: Candidate, people: Sequence[str]) -> dict[str, Any]:
        """Ask the model as it is, with the redirect's name in the place of each person's."""
        named = [p for p in self.probes if p.subject in people and p.subject in p.query]
        base = restrict(self.base, self.probes, named)
        swapped = [about(probe, candidate.redirects[0]) for probe in named]
        change = compare_evaluations(base, evaluate(self.model, self.tokenizer, swapped, FORMS))
        row: dict[str, Any] = {"candidate": candidate.name, "people": list(people), "seconds": 0.0, "together": 0}
        row |= {f"forget {part.form}": [part.before, part.after, part.chance] for part in change.changes}
        return row

    def run(
        self, candidate: Candidate, people: Sequence[str], retain: Sequence[str], more: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Unlearn people and more names together, ask about the people and about those to keep, and undo it."""
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
        guards = rocr.Guards(force=True)  # the authors' settings pass some
        edit = rocr.unlearn(self.model, self.tokenizer, concepts, self.statistics, candidate.config, guards=guards)
        seconds = time.perf_counter() - start
        try:
            after = evaluate(self.model, self.tokenizer, chosen, FORMS)
            after.measures["perplexity"] = perplexity(self.model, self.text)
        finally:
            edit.revert(self.model)
        change = compare_evaluations(base, after)
        row: dict[str, Any] = {"candidate": candidate.name, "people": list(people), "seconds": seconds}
        row |= {"together": len(concepts), "redirects": [concept.redirect for concept in concepts[: len(people)]]}
        for part in change.changes:
            row[f"{part.split} {part.form}"] = [part.before, part.after, part.chance]
        row["perplexity"] = [self.base.measures["perplexity"], after.measures["perplexity"]]
        row["norm"] = [layer.relative_norm for layer in edit.report.layers]
        return row


def restrict(base: Evaluation, probes: Sequence[Probe], chosen: Sequence[Probe]) -> Evaluation:
    """The scores of some probes, numbered and split as these are."""
    place = {(p.subject, p.query): (i, p.split) for i, p in enumerate(chosen)}
    items = []
    for item in base.items:
        found = place.get((probes[item.probe].subject, probes[item.probe].query))
        if found is not None:
            items.append(replace(item, probe=found[0], split=found[1]))
    return Evaluation(items, len(chosen))


def known_facts(model: nn.Module, tokenizer: Any, probes: list[Probe], most: int) -> tuple[list[Probe], Evaluation]:
    """At most so many known facts of each person with enough of them, and the model's scores there."""
    everything = evaluate(model, tokenizer, probes, FORMS, options=EvaluateOptions(seed=0))
    kept: dict[str, list[int]] = {}
    for index in sorted(everything.known_probes(KNOWN)):
        kept.setdefault(probes[index].subject, []).append(index)
    chosen = [i for facts in kept.values() if len(facts) >= LEAST_FACTS for i in facts[:most]]
    number = {old: new for new, old in enumerate(chosen)}
    items = [replace(item, probe=number[item.probe]) for item in everything.items if item.probe in number]
    return [probes[i] for i in chosen], Evaluation(items, len(chosen))


@contextmanager
def metrics_kept() -> Iterator[None]:
    """Build the metric of a layer once for all edits with the same settings: minutes for a large layer."""
    build, kept = pipeline.build_metric, {}

    def build_once(second_moment: torch.Tensor, config: rocr.EditConfig, held: torch.Tensor | None) -> Any:
        choice = (config.method, config.gamma, config.threshold, config.relative_threshold)
        if held is not None:
            choice += (config.held_weight, float(held.double().sum()))
        key = (second_moment.data_ptr(), *choice)
        if key not in kept:
            kept[key] = build(second_moment, config, held)
        return kept[key]

    pipeline.build_metric = build_once
    try:
        yield
    finally:
        pipeline.build_metric = build


def candidates(text: str | None) -> list[Candidate]:
    """The named candidates, or all: each changes one thing of the default settings."""
    default = rocr.EditConfig()
    one = {
        "default": default,
        "ridge 0.1": replace(default, ridge=0.1),
        "ridge 0.5": replace(default, ridge=0.5),
        "ridge 2": replace(default, ridge=2.0),
        "gamma 1": replace(default, gamma=1.0),
        "as a short list": replace(default, reach="whole", held_weight=0.0),
        "as a long list": replace(default, reach="gradual", held_weight=0.03),
        "gamma 30": replace(default, gamma=30.0),
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
    found.append(Candidate("redirect chosen", default, CHOICES, chosen=True))
    found.append(Candidate("official", rocr.EditConfig.official(), ("Donald Trump",)))
    names = text.split(";") if text else [candidate.name for candidate in found]
    unknown = set(names) - {candidate.name for candidate in found}
    if unknown:
        raise SystemExit(f"Unknown candidates: {', '.join(sorted(unknown))}.")
    return [candidate for candidate in found if candidate.name in names]


def prepare(arguments: argparse.Namespace) -> Bench:
    """Load the model, collect statistics on one half of the text, and find what the model knows."""
    loaded = load_model(find_model(arguments.model), getattr(torch, arguments.dtype))
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = list(read_texts([arguments.text]))
    half = len(texts) // 2
    sample = TextSample.take(texts[half:], tokenizer, arguments.perplexity_tokens)
    place = Path(arguments.statistics)
    if place.exists():
        statistics = rocr.Statistics.load(place)
    else:
        options = rocr.CollectOptions(tokens=arguments.statistics_tokens)
        configs = [candidate.config for candidate in candidates(arguments.candidates)]
        architecture = find_architecture(model)
        layers = sorted({layer for config in configs if config for layer in chosen_layers(config, architecture)})
        statistics = rocr.collect_statistics(model, tokenizer, texts[:half], layers, options)
        statistics.save(place)
    probes = [probe for path in arguments.probes for probe in load_probes(path)]
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
    parser.add_argument("--statistics", required=True, help="read from this file, or collected and written there")
    parser.add_argument("--statistics-tokens", type=int, default=140_000)
    parser.add_argument("--perplexity-tokens", type=int, default=8192)
    parser.add_argument("--facts", type=int, default=5, help="of each person, at most")
    parser.add_argument("--people", type=int, default=8, help="to search on; the others are for the test")
    parser.add_argument("--most", type=int, default=10, help="people to search or test on, at most")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--together", type=number_list, default=[], help="numbers of people to unlearn at once")
    parser.add_argument("--names", nargs="+", default=[], help="files with a name or a `subject` a line, for more")
    parser.add_argument("--candidates", help="names, separated by semicolons (default: all)")
    parser.add_argument("--test", action="store_true", help="one at a time, on people that were not searched on")
    parser.add_argument("--out", required=True, help="rows are added to this file")
    arguments = parser.parse_args()
    bench = prepare(arguments)
    searched, others = bench.people[: arguments.people], bench.people[arguments.people :]
    rows = read_rows(Path(arguments.out))
    people = (others if arguments.test else searched)[: arguments.most]
    kept = others[arguments.most :][:KEPT_TOGETHER]
    with metrics_kept(), Path(arguments.out).open("a", encoding="utf-8") as file:

        def run(candidate: Candidate, group: list[str], kept: list[str], more: list[str]) -> None:
            together = len(group) + len(more) if candidate.config else 0
            done = [(row["candidate"], row["people"], row["together"]) for row in rows]
            if (candidate.name, group, together) not in done:
                rows.append(bench.run(candidate, group, kept, more))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()

        for candidate in candidates(arguments.candidates):
            if not arguments.together:
                for person in people:
                    run(candidate, [person], kept[:KEPT], [])
            for count in arguments.together:
                more = [name for name in listed_names(arguments.names) if name not in {*people, *kept, *REDIRECTS}]
                spread = replace(candidate, redirects=REDIRECTS)
                run(spread, people[:count], kept, more[: max(0, count - len(people))])
    print(table(rows))


def number_list(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def listed_names(paths: Sequence[str]) -> list[str]:
    """The names, or the subjects of JSON lines, once each."""
    lines = [(path, line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(json.loads(line)["subject"] if path.endswith(".jsonl") else line for path, line in lines))


if __name__ == "__main__":
    main()
