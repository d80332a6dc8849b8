"""Measure time and memory of unlearning a list of many concepts, and print one Markdown row.

    rocr stats $(python -m rocr.demo) --text TEXT --layers 4,5,6 --out statistics.safetensors
    python benches/bulk_concepts.py --statistics statistics.safetensors --count 1000

The names are made up: every first name is combined with every last name, in a random order with a fixed seed. Many
share a first or a last name, as in a real list of people, so that their keys are similar.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from dataclasses import replace
from itertools import product
from typing import Any

import torch

import rocr
from rocr.config import EditConfig
from rocr.demo import demo_model
from rocr.edit.guards import Guards
from rocr.model.load import find_model, load_model

FIRST = (
    "Ada Albert Alma Anton Astrid Basil Beatrix Bruno Cecily Clara Conrad Cyril Dagmar Dora Edgar Edith Elsa Emil "
    "Esther Felix Flora Frida Gerda Gilbert Greta Harold Hedda Henrik Hugo Ida Ingrid Ivan Jasper Judith Karl Leonora "
    "Linus Lydia Magnus Mabel Nora Oscar Otto Petra Rufus Sigrid Thora Ulrich Vera Winifred"
)
STEMS = (
    "Alder Ash Bar Beck Birch Black Bran Brook Cald Carl Clay Cold Dal Dun East Elm Fair Fen Gil Gold Hart Hav Hazel "
    "High Holm Kirk Lang Lark Lind Mar Mill Nord Oak Pel Quill Raven Red Rock Rose Sand Silver Stan Stone Thorn Under "
    "Wal Water West White Wind"
)
ENDINGS = ("berg", "by", "ford", "ham")
REDIRECTS = ("a gardener", "Blaise Pascal", "a baker in Lyon", "Johann Strauss", "the harbour", "Galileo Galilei")


def make_concepts(count: int) -> list[rocr.Concept]:
    """Return `count` concepts with distinct names, at most 10,000."""
    names = [f"{first} {stem}{ending}" for first, stem, ending in product(FIRST.split(), STEMS.split(), ENDINGS)]
    if not 1 <= count <= len(names):
        raise SystemExit(f"--count must be from 1 to {len(names):,}, not {count}.")
    random.Random(0).shuffle(names)
    return [rocr.Concept(name, REDIRECTS[i % len(REDIRECTS)]) for i, name in enumerate(names[:count])]


def run(count: int, model: str, statistics: rocr.Statistics, config: EditConfig) -> dict[str, Any]:
    """Unlearn `count` concepts in a newly loaded model, and return the cells of the row."""
    started = time.perf_counter()
    loaded = load_model(find_model(model))
    load = time.perf_counter() - started
    started, processor = time.perf_counter(), time.process_time()
    # Thousands of invented names exceed the safety limits; force records this and does not stop the edit.
    edit = rocr.unlearn(
        loaded.model, loaded.tokenizer, make_concepts(count), statistics, config, guards=Guards(force=True)
    )
    total, processor = time.perf_counter() - started, time.process_time() - processor
    stages = {**edit.report.seconds, "other": total - sum(edit.report.seconds.values())}
    collisions, retained = edit.report.collisions, edit.report.retained
    assert collisions is not None and retained is not None
    closed = [sum(layer.closed[i] for layer in edit.report.layers) / len(edit.layers) for i in range(count)]
    return {
        "concepts": f"{count:,}",
        "keys": f"{len(edit.concept_of):,}",
        "load, s": f"{load:.1f}",
        **{f"{stage}, s": f"{seconds:.1f}" for stage, seconds in stages.items()},
        "unlearn, s": f"{total:.1f}",
        "of the processor, s": f"{processor:.1f}",
        "peak, GiB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
        "closed, median": f"{sorted(closed)[count // 2]:.1%}",
        "closed, least": f"{min(closed):.1%}",
        "collinear pairs": f"{collisions.collinear:,}",
        "in conflict": f"{collisions.conflicting:,}",
        "retained names moved, mean": f"{retained.mean:.1%}",
        "by one concept, most": f"{retained.worst[0].share:.1%}",
    }


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--statistics", required=True, metavar="FILE", help="made by `rocr stats`")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--model", help="(default: the demo's SmolLM2-135M-Instruct)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--measure", choices=("each", "once"), default="each")
    arguments = parser.parse_args()
    config = replace(EditConfig(), layers=tuple(arguments.layers), measure=arguments.measure)
    statistics = rocr.Statistics.load(arguments.statistics)
    row = run(arguments.count, arguments.model or str(demo_model()), statistics, config)
    print(f"| {' | '.join(row)} |\n|{'---:|' * len(row)}\n| {' | '.join(row.values())} |")
    print(f"rocr {rocr.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)


if __name__ == "__main__":
    main()
