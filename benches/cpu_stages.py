"""Time the statistics and the edit of a model on a CPU, stage by stage, against the time of their products alone.

    python benches/cpu_stages.py MODEL --text wikitext2_test_raw.txt --concepts 1 1000 --out stages.json

The floor of a step is the operations of its matrix products, those of the model's layers and one triangle of the
second moments, divided by the peak of float32 multiply-adds, which is measured in the same run. What has matrix units
(AMX) or bfloat16 instructions can be faster than this floor. --instruction-set avx2 holds torch, NumPy and rocr to the
instructions of that set. The edit of each number of concepts is made twice, and the second one is reported; its
concepts are the first names of the package's list, all with one redirect.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fma_peak import measure
from instruction_sets import environment, here
from machine import commit, cpu_name
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import rocr
from rocr.edit.controls import load_names
from rocr.model.load import find_model, load_model
from rocr.ops import cpp_backend
from rocr.ops.wide_products import slow_dtypes
from rocr.statistics.corpus import read_texts

REDIRECT = "Tarvin Okelo"


def product_operations(rows: Any, weight: Any, *_: Any, **_more: Any) -> int:
    """Return the operations of a product of rocr's kernel, from the shapes of rows and weight."""
    return 2 * math.prod(rows) * int(weight[0])


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run a function; return its result, and its seconds, processor seconds and tera-operations of products."""
    with FlopCounterMode(display=False) as counter:
        start, processor = time.perf_counter(), time.process_time()
        result = work()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return result, {"seconds": seconds, "processor": processor, "tera": counter.get_total_flops() / 1e12}


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the statistics and the edits in this process."""
    if cpp_backend.is_available(torch.device("cpu")):
        register_flop_formula(torch.ops.rocr.cpp_wide_product)(product_operations)
    threads, instruction_set = torch.get_num_threads(), arguments.instruction_set or here(compiled=True)[0]
    peaks = [measure(instruction_set, threads)]
    loaded = load_model(find_model(arguments.model), torch.bfloat16)
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = list(read_texts([arguments.text]))
    options = rocr.CollectOptions(tokens=arguments.tokens)
    statistics, row = timed(lambda: rocr.collect_statistics(model, tokenizer, texts, options=options))
    sizes = [len(moment) for layer in statistics.layers for moment in statistics.second_moments(layer)]
    row["tera"] += sum(statistics.tokens * size * (size + 1) for size in sizes) / 1e12
    rows = [{"step": f"statistics, {statistics.tokens:,} tokens", **row}]
    names = list(load_names())
    for count in arguments.concepts:
        concepts = [rocr.Concept(name, REDIRECT) for name in names[:count]]
        for _ in range(2):
            edit, row = timed(
                lambda concepts=concepts: rocr.unlearn(
                    model, tokenizer, concepts, statistics, guards=rocr.Guards(force=True)
                )
            )
            edit.revert(model)
        rows.append({"step": f"edit, {count:,} concepts", **row, "stages": edit.report.seconds})
    peaks.append(measure(instruction_set, threads))
    known = [peak for peak in peaks if peak]
    about = {
        "cpu": cpu_name(),
        "threads": threads,
        "instruction_set": instruction_set,
        "peak_gflops": max(known) if known else None,
        "float32_products_of": sorted(str(dtype) for dtype in slow_dtypes()),
        "torch": torch.__version__,
        "commit": commit(),
        "model": Path(arguments.model).name,
    }
    return {"machine": about, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    peak = results["machine"]["peak_gflops"]
    lines = ["| step | seconds | products, 10¹² operations | floor, s | times the floor | slowest stages, s |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for row in results["rows"]:
        floor = row["tera"] * 1e3 / peak if peak else None
        stages = sorted(row.get("stages", {}).items(), key=lambda stage: -stage[1])[:5]
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages)
        ends = f"{floor:.1f} | {row['seconds'] / floor:.2f}" if floor else " | "
        lines.append(f"| {row['step']} | {row['seconds']:.1f} | {row['tera']:.2f} | {ends} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write a JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1])
    parser.add_argument("--instruction-set", help="amx, avx512, avx2 or neon (default: the best of the machine)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    wanted = environment(arguments.instruction_set) if arguments.instruction_set else dict(os.environ)
    if wanted != dict(os.environ):  # the libraries choose their instructions when they are loaded
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=wanted, check=False).returncode)
    results = measure_all(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(results["machine"])
    print(table(results))


if __name__ == "__main__":
    main()
