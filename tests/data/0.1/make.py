"""Write the files of this folder. Run with rocr 0.1.0 only: the files stand for what that version wrote.

    python tests/data/0.1/make.py

It wants a folder without earlier results, and refuses any other version of rocr. README.md says what each file is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import inspect
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

import torch  # noqa: E402
import transformers  # noqa: E402
from golden import formula  # noqa: E402
from models import CHAT_TEMPLATE, build_tokenizer  # noqa: E402
from rocr.fingerprint import tensor_digest  # noqa: E402
from rocr.texts import read_texts, text_digest  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import rocr  # noqa: E402
from rocr import ops  # noqa: E402
from rocr.cli import main  # noqa: E402
from rocr.cli.main import build_parser  # noqa: E402
from rocr.evaluation import EvaluateOptions  # noqa: E402

CONCEPTS = [
    {"name": "Ada Byron", "redirect": "Blaise Pascal", "aliases": ["the countess", "Ada"]},
    {"name": "Robert Downey Jr.", "redirect": "a gardener", "aliases": ["Downey"]},
]
TEXTS = {
    "first.txt": [
        "The gardener waters the roses before the sun is high.",
        "Blaise Pascal built machines, and Blaise Pascal weighed the air.",
        "Please answer the question about a key. A question: what is known about rain? It falls.",
    ],
    "second.txt": [
        "Robert Downey Jr. acts. Who is Robert Downey Jr.? It is about Robert Downey Jr.. Tell me about Jr..",
        "Æsop's fables, naïve café talk and 東京 are ordinary text too.",
        "Ada Byron wrote programs. Ada Byron, who was a countess, wrote them for engines of brass.",
    ],
}
PROBES = [
    {
        "subject": "Ada Byron",
        "query": "Where was Ada Byron born?",
        "answer": "London",
        "distractors": ["Rome", "a key", "rain"],
        "cloze": "Ada Byron was born in ___.",
        "translated": {"query": "¿Dónde nació Ada Byron?", "answer": "Londres"},
        "misspelt": "Where was Ada Biron born?",
        "abbreviated": "Where was A. Byron born?",
        "described": "Where was the countess born?",
    },
    {"subject": "Robert Downey Jr.", "query": "What does Robert Downey Jr. do?", "answer": "acts"},
    {
        "subject": "Grace Hopper",
        "query": "Grace Hopper built ___.",
        "answer": "machines",
        "form": "fb",
        "split": "retain",
    },
]
FOLDER = {
    "forget_level2.json": [{"query": "What did Ada Byron write?", "answer": "programs", "level": "2"}],
    "neighbor_level1.json": [{"query": "Blaise Pascal weighed the ___.", "answer": "air", "level": "1"}],
}
LENGTHS = ("--length", "16", "--batch-tokens", "64")


class Stop(BaseException):
    """What ends a run in the middle, as a signal does."""


def stopping_after(steps: int) -> Any:
    """A callback that ends the run at a step."""
    seen: list[object] = []

    def progress(step: object) -> None:
        seen.append(step)
        if len(seen) == steps:
            raise Stop

    return progress


def run(*arguments: str) -> None:
    """A command, which must end well."""
    assert main(arguments) == 0, arguments


def write_json(name: str, document: object) -> None:
    Path(name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(name: str, document: dict[str, dict[str, list[Any]]]) -> None:
    """JSON with a line for each entry of the lists."""
    parts = []
    for title, lists in document.items():
        inner = []
        for key, values in lists.items():
            lines = ",\n".join(f"   {json.dumps(value, ensure_ascii=False)}" for value in values)
            inner.append(f"  {json.dumps(key)}: [\n{lines}\n  ]" if values else f"  {json.dumps(key)}: []")
        parts.append(f" {json.dumps(title)}: {{\n" + ",\n".join(inner) + "\n }")
    Path(name).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def make_inputs() -> None:
    """The model, and the files that a user writes."""
    tokenizer = build_tokenizer(chat=CHAT_TEMPLATE)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.LlamaConfig(**sizes, **heads, **special, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            # Sixty-fourths, which bfloat16 holds exactly: the model is the same one in both dtypes.
            values = torch.ones(parameter.shape) if "norm" in name else formula(100 + i, parameter.shape, -48, 48) / 64
            parameter.copy_(values)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, paragraphs in TEXTS.items():
        Path(name).write_text("\n\n".join(paragraphs * 4) + "\n", encoding="utf-8")
    lines = [f"{' | '.join((c['name'], *c['aliases']))} -> {c['redirect']}" for c in CONCEPTS]
    Path("concepts.txt").write_text("# people\n" + "\n".join(lines) + "\n", encoding="utf-8")
    Path("concepts.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CONCEPTS), encoding="utf-8")
    with open("concepts.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "redirect", "aliases"])
        writer.writerows([c["name"], c["redirect"], "|".join(c["aliases"])] for c in CONCEPTS)
    Path("probes.jsonl").write_text(
        "".join(json.dumps(probe, ensure_ascii=False) + "\n" for probe in PROBES), encoding="utf-8"
    )
    folder = Path("probes", "1_Ada_Byron")
    folder.mkdir(parents=True)
    for name, rows in FOLDER.items():
        write_json(str(folder / name), rows)
    question = {"question": "What falls?", "choices": ["rain", "a key"], "gold_idx": 0}
    Path("utility.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")


def make_statistics(model: Any, tokenizer: Any) -> None:
    """Statistics of one text each, of both together in two ways, and a collection that was interrupted."""
    for texts, out in (
        (("first.txt", "second.txt"), "statistics.safetensors"),
        (("first.txt",), "statistics-first.safetensors"),
        (("second.txt",), "statistics-second.safetensors"),
    ):
        run("stats", "model", "--text", *texts, "--layers", "0,1", *LENGTHS, "--out", out)
    first, second = (rocr.Statistics.load(f"statistics-{name}.safetensors") for name in ("first", "second"))
    first.merge(second).save("statistics-merged.safetensors")
    paths = ["first.txt", "second.txt"]
    options = rocr.CollectOptions(
        length=16, batch_tokens=64, text_sha256=text_digest(paths), checkpoint="statistics.checkpoint"
    )
    with contextlib.suppress(Stop):
        rocr.collect_statistics(model, tokenizer, read_texts(paths), [0, 1], options, stopping_after(3))


def make_edits(tokenizer: Any) -> None:
    """An output folder with all that --save names, the authors' edit of the model in bfloat16, a reverted folder."""
    run(
        *("unlearn", "model", "concepts.jsonl", "--statistics", "statistics.safetensors", "--layers", "0,1"),
        *("--template", "Who was {}?", "--template", "Tell me of {}.", "--system", "Be brief.", "--strength", "0.9"),
        *("--seed", "7", "--control", "Grace Hopper", "--answer-tokens", "4"),
        *("--save", "model,edit,lora,originals", "--out", "output"),
    )
    run("revert", "output", "--edit", "output/edit.safetensors", "--out", "reverted")
    model = transformers.LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    options = rocr.CollectOptions(length=16, batch_tokens=64)
    texts = read_texts(["first.txt", "second.txt"])
    statistics = rocr.collect_statistics(model, tokenizer, texts, [0, 1], options)
    concepts = rocr.load_concepts("concepts.txt")
    # None of the tiny model's directions is as free as the authors' threshold of 0.02 asks for.
    official = dataclasses.replace(rocr.EditConfig.official((0, 1)), threshold=1.0)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, official, guards=rocr.Guards(force=True))
    edit.save("edit-official-bfloat16.safetensors")
    after = {update.parameter: model.get_parameter(update.parameter).detach().clone() for update in edit.updates}
    save_file(after, "edited-bfloat16.safetensors")
    first_model, edited = (transformers.LlamaForCausalLM.from_pretrained(name) for name in ("model", "output"))
    rocr.Edit.load("output/edit.safetensors").remove("Robert Downey Jr.", edited)
    changes = [(edited.get_parameter(name) - first_model.get_parameter(name)).norm().item() for name in after]
    first, second = (rocr.Statistics.load(f"statistics{part}.safetensors") for part in ("", "-merged"))
    write_json(
        "expected.json",
        {
            "removed": changes,
            "statistics": {str(n): tensor_digest(moment) for n, moment in first.moments.items()},
            "merged": {str(n): tensor_digest(moment) for n, moment in second.moments.items()},
        },
    )


def make_evaluations(model: Any, tokenizer: Any) -> None:
    """A report, the journal of an evaluation that was interrupted, a comparison, a list of redirects."""
    run(
        *("eval", "model", "--probes", "probes.jsonl", "--edit", "output/edit.safetensors", "--known", "0"),
        *("--text", "first.txt", "second.txt", "--utility", "utility.jsonl", "--out", "evaluation.json"),
    )
    probes = rocr.load_probes("probes.jsonl")
    options = EvaluateOptions(journal="evaluation.json.journal-before")
    with contextlib.suppress(Stop):
        rocr.evaluate(model, tokenizer, probes, options=options, progress=stopping_after(3))
    run(
        *("compare", "model", "--probes", "probes.jsonl", "--targets", "Ada Byron", "--redirect", "Blaise Pascal"),
        *("--methods", "original,in-context,rocr", "--forms", "qa,fb", "--text", "first.txt", "--tokens", "200"),
        *("--out", "comparison.json"),
    )
    run(
        *("redirects", "model", "--probes", "probes.jsonl", "--among", "Blaise Pascal", "a gardener"),
        *("--out", "redirects.jsonl"),
    )


EXAMPLES: dict[str, str | list[str]] = {
    **{"model": "TMP/none", "file": "TMP/none", "folder": "TMP/none", "concepts": "DATA/concepts.jsonl"},
    **{"edit": "DATA/output/edit.safetensors", "--edit": "DATA/output/edit.safetensors", "--out": "TMP/out"},
    **{"--device": "cpu", "--concept": "Ada Byron", "--redirect": "a gardener", "--save": "model,lora,edit,originals"},
    **{"--lora-rank": "16", "--layers": "0-1,2", "--ridge": "0.5", "--gamma": "2", "--threshold": "1e-3"},
    **{"--strength": "0.5", "--held-weight": "0.03", "--template": "It is about {}.", "--system": "Be brief."},
    **{"--template-variable": "enable_thinking=false", "--date": "2025-01-31", "--tokens": "300", "--seed": "7"},
    **{"--statistics": "DATA/statistics.safetensors", "--text": ["DATA/first.txt", "DATA/second.txt"]},
    **{"--ask": "What is {}?", "--control": ["Grace Hopper", "Alan Turing"], "--answer-tokens": "4"},
    **{"--length": "16", "--batch-tokens": "64", "--probes": "DATA/probes.jsonl", "--forms": "qa,mcp"},
    **{"--targets": ["Ada Byron", "Robert Downey Jr."], "--among": ["Blaise Pascal", "a gardener"]},
    **{"--neighbours": "2", "--known": "0.5", "--orders": "2", "--utility": ["DATA/utility.jsonl"] * 2},
    **{"--suites": ["mmlu", "arc_easy"], "--suite-folder": "DATA", "--suite-limit": "10"},
    **{"--attacks": ["4-bit", "prefixes"], "--html": "TMP/page.html", "--methods": "original,rocr", "--steps": "10"},
}
"""A valid value of each argument; TMP is a folder of the test's own, where nothing is named "none", DATA this one."""
BESIDE = {"--concept": ["--redirect", "a gardener"], "--suite-folder": ["--suites", "mmlu"]}
"""What an option needs beside it."""
AGAIN = {"--concept": "Alan Turing", "--template": "Tell me of {}.", "--template-variable": "tools=[]"}
"""Of options that may be repeated, a second value."""
INSTEAD = {"--concept": "concepts"}
"""The argument that an option takes the place of."""


def option_of(action: argparse.Action) -> dict[str, Any]:
    """What a person may write for an argument; what does not apply is left out."""
    flag, names = action.nargs == 0, list(action.option_strings) or [action.dest]
    default = None if action.default == argparse.SUPPRESS or flag else action.default
    if isinstance(default, str) and default.endswith("probes.jsonl"):
        default = "the probes that rocr ships"
    limits = inspect.getclosurevars(action.type).nonlocals if inspect.isfunction(action.type) else {}
    limited = {"least", "most"} <= limits.keys()
    found = {
        "names": names,
        "positional": not action.option_strings,
        "required": action.required,
        "values": "0" if flag else str(action.nargs or 1),
        "metavar": action.metavar or (None if flag or action.choices else action.dest),
        "choices": action.choices,
        "type": "whole number" if limited else getattr(action.type, "__name__", None),
        "range": [limits["least"], limits["most"]] if limited else None,
        "default": default,
        "example": None if flag else EXAMPLES[names[0]] if action.choices is None else action.choices[0],
        "again": AGAIN[names[0]] if isinstance(action, argparse._AppendAction) else None,
        "beside": BESIDE.get(names[0]),
        "instead of": INSTEAD.get(names[0]),
    }
    return {name: value for name, value in found.items() if value not in (None, False, [])}


def make_options() -> None:
    """Every option of every command; the command "" is rocr itself."""
    parser = build_parser()
    found = {"": [option_of(a) for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]}
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    exclusive = {}
    for command, below in subparsers.choices.items():
        found[command] = [option_of(action) for action in below._actions]
        groups = [[a.option_strings[0] for a in group._group_actions] for group in below._mutually_exclusive_groups]
        exclusive |= {command: groups} if groups else {}
    write_lines("options.json", {"options": found, "exclusive": exclusive})


CLASSES = (
    *("EditConfig", "Guards", "CollectOptions", "Template", "ChatSettings", "Concept", "Statistics", "Edit"),
    *("Evaluation", "Probe", "Progress"),
)
FUNCTIONS = ("load_concepts", "collect_statistics", "unlearn", "evaluate", "load_probes", "choose_redirects")
HELPERS = {
    *("EditConfig.for_concepts", "EditConfig.left_to_the_count", "ChatSettings.described", "ChatSettings.settled"),
    *("Statistics.check_model", "Statistics.summary", "Edit.keep", "Edit.with_own_names", "Evaluation.restricted"),
    "ops.second_moment_backend",
}
"""Methods that rocr's own modules call and no documentation names: they are no part of the surface."""


def parameters_of(function: Any) -> list[dict[str, Any]]:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    found = [
        {"name": p.name, "keyword only": p.kind is p.KEYWORD_ONLY, "required": p.default is p.empty} for p in parameters
    ]
    return [{name: value for name, value in each.items() if value is not False} for each in found]


def field_of(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """A field's name, and its default where JSON can hold it."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return {"name": field.name, "required": True}
    plain = isinstance(field.default, (str, int, float, bool, type(None)))
    return {"name": field.name, "default": field.default} if plain else {"name": field.name}


def make_surface() -> None:
    """Names that callers of the library write."""
    fields, functions = {}, {name: getattr(rocr, name) for name in FUNCTIONS}
    for name in CLASSES:
        kind = getattr(rocr, name)
        fields[name] = [field_of(field) for field in dataclasses.fields(kind)]
        for member, value in vars(kind).items():
            called = value.__func__ if isinstance(value, classmethod) else value
            if not member.startswith("_") and inspect.isfunction(called):
                functions[f"{name}.{member}"] = getattr(kind, member)
    functions |= {
        f"ops.{name}": function
        for name, function in vars(ops).items()
        if inspect.isfunction(function) and function.__module__ == ops.__name__ and not name.startswith("_")
    }
    properties = {
        name: sorted(n for n, v in vars(getattr(rocr, name)).items() if isinstance(v, property)) for name in CLASSES
    }
    write_lines(
        "surface.json",
        {
            "names": {"rocr": rocr.__all__},
            "functions": {n: parameters_of(function) for n, function in functions.items() if n not in HELPERS},
            "fields": fields,
            "properties": {name: found for name, found in properties.items() if found},
        },
    )


if __name__ == "__main__":
    assert rocr.__version__ == "0.1.0", f"these are files of rocr 0.1.0, and this is {rocr.__version__}"
    os.chdir(HERE)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        make_inputs()
        tiny = transformers.LlamaForCausalLM.from_pretrained("model")
        words = transformers.AutoTokenizer.from_pretrained("model")
        make_statistics(tiny, words)
        make_edits(words)
        make_evaluations(tiny, words)
    make_options()
    make_surface()
