"""Measure what is gone in every spelling, language and description of a name, and at what price.

    python benches/variants.py MODEL --statistics FILE --out variants.jsonl

Each concept is unlearned alone, in each setting: by its name with all rows of weight 1 ("unweighted"), by its name
alone ("none"), with spellings of the name, with aliases that the model proposes besides ("all"),
and with spellings and its names in three languages as aliases of the list ("listed"). "redirect" asks the unedited
model with the redirect's name in place of the concept's, in the forms that allow it: what an edit leaves at best. Of
each concept at most --facts facts that the model knows (at least 0.5 in multiple choice) are asked in all forms that
they have, and of ten others one in each. No setting was searched on these concepts. Each concept and setting is a row,
written when it is ready; a run with the same file continues after its last row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from namesakes import known

import rocr
from rocr.evaluation import Evaluation, Probe, evaluate, load_probes
from rocr.evaluation.redirects import replace_subject
from rocr.model.load import find_model, load_model
from rocr.statistics.corpus import read_texts

PROBES = Path(rocr.__file__).parent / "data" / "probes.jsonl"
FORMS = (
    "qa", "fb", "mcp", "misspelt", "abbreviated", "lower", "surname", "chinese", "spanish", "russian", "arabic",
    "described",
)  # fmt: skip
PEOPLE = ("Galileo Galilei", "Muhammad Ali", "Jane Austen", "J. K. Rowling", "George Washington", "Michael Jordan")
THINGS = ("Microsoft", "Eiffel Tower", "insulin", "Don Quixote", "French Revolution")
LANGUAGES = ("chinese", "spanish", "russian", "arabic")
SWAPPED = ("qa", "fb", "mcp", *LANGUAGES)
REDIRECTS = {"person": "Frédéric Chopin", "thing": "Mount Everest"}
OTHERS = (
    "Albert Einstein", "William Shakespeare", "Pablo Picasso", "Steve Jobs", "Nelson Mandela", "Charles Dickens",
    "Winston Churchill", "Toyota", "Taj Mahal", "penicillin",
)  # fmt: skip
NAMES = {
    "Galileo Galilei": ("伽利略·伽利雷", "伽利略", "Галилео Галилей", "غاليليو غاليلي"),
    "Muhammad Ali": ("穆罕默德·阿里", "Мухаммед Али", "محمد علي"),
    "Jane Austen": ("简·奥斯汀", "Джейн Остин", "جين أوستن"),
    "J. K. Rowling": ("J·K·罗琳", "Джоан Роулинг", "ج. ك. رولينغ"),
    "George Washington": ("乔治·华盛顿", "Джордж Вашингтон", "جورج واشنطن"),
    "Michael Jordan": ("迈克尔·乔丹", "Майкл Джордан", "مايكل جوردان"),
    "Microsoft": ("微软", "Майкрософт", "مايكروسوفت"),
    "Eiffel Tower": ("埃菲尔铁塔", "Эйфелева башня", "برج إيفل", "Torre Eiffel"),
    "insulin": ("胰岛素", "инсулин", "إنسولين", "insulina"),
    "Don Quixote": ("堂吉诃德", "Дон Кихот", "دون كيخوتي", "Don Quijote"),
    "French Revolution": ("法国大革命", "Французская революция", "الثورة الفرنسية", "Revolución Francesa"),
}
REDIRECT = "redirect"
REDIRECT_NAMES = {
    "Frédéric Chopin": ("弗雷德里克·肖邦", "Frédéric Chopin", "Фредерик Шопен", "فريدريك شوبان"),
    "Mount Everest": ("珠穆朗玛峰", "Monte Everest", "Эверест", "جبل إفرست"),
}
"""Names of the redirects in the languages of `LANGUAGES`."""
SETTINGS = {
    "unweighted": rocr.EditConfig(variants="none", least_closed=0.0),
    "none": rocr.EditConfig(variants="none"),
    "spelling": rocr.EditConfig(variants="spelling"),
    "all": rocr.EditConfig(variants="all"),
    "listed": rocr.EditConfig(variants="spelling"),
}


def sums(evaluation: Evaluation, probes: Sequence[Probe]) -> dict[str, float]:
    """Return the sum of the scores above chance by split and form."""
    found: dict[str, float] = {}
    for item in evaluation.items:
        key = f"{probes[item.probe].split} {item.form}"
        found[key] = found.get(key, 0.0) + item.score - (item.chance or 0.0)
    return found


def about_redirect(probe: Probe, redirect: str) -> tuple[Probe, Probe]:
    """Return a probe without the wordings that do not hold a name of its subject, and it with the redirect's names."""
    kept, swapped = {}, {}
    for language, name in zip(LANGUAGES, REDIRECT_NAMES[redirect], strict=True):
        wording = probe.wordings.get(language)
        own = next((n for n in (*NAMES[probe.subject], probe.subject) if wording and n in wording.query), None)
        if wording is not None and own is not None:
            kept[language] = wording
            swapped[language] = replace(wording, query=wording.query.replace(own, name))
    return replace(probe, wordings=kept), replace(replace_subject(probe, redirect), wordings=swapped)


def shares(rows: Sequence[dict[str, Any]], split: str) -> str:
    """Return the cells of a table: the shares that are lost in each form, of the sums over all rows."""
    cells = []
    for form in FORMS:
        before, after = (sum(row[when].get(f"{split} {form}", 0.0) for row in rows) for when in ("before", "after"))
        cells.append(f"{1 - after / before:.0%}" if before else "")
    return " | ".join(cells)


def write(
    path: Path,
    rows: list[dict[str, Any]],
    row: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    """Add a row to the rows and to the file."""
    rows.append({**row, "before": before, "after": after})
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the shares gone about people and things, and lost about others."""
    lines = ["| variants | about | " + " | ".join(FORMS) + " |", "|---|---|" + "---:|" * len(FORMS)]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        for kind in ("person", "thing"):
            of_kind = [row for row in own if row["kind"] == kind]
            if of_kind:
                lines.append(f"| {setting} | {len(of_kind)} × {kind}, gone | {shares(of_kind, 'forget')} |")
        if setting == REDIRECT:
            continue
        lines.append(f"| {setting} | others, lost | {shares(own, 'retain')} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the settings and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--statistics", type=Path, required=True, help="file to read, or to write if it does not exist")
    parser.add_argument("--text", type=Path, help="text to collect statistics on")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--concepts", nargs="+", default=[*PEOPLE, *THINGS], metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, REDIRECT], default=[*SETTINGS, REDIRECT])
    parser.add_argument("--facts", type=int, default=4, help="facts of each concept (default: 4)")
    parser.add_argument("--weight", type=float, default=rocr.EditConfig().variant_weight, help="of a variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="file to which the rows are added")
    arguments = parser.parse_args()
    loaded = load_model(find_model(arguments.model), torch.bfloat16)
    model, tokenizer = loaded.model, loaded.tokenizer
    if not arguments.statistics.exists():
        options = rocr.CollectOptions(tokens=arguments.tokens)
        texts = list(read_texts([arguments.text]))
        rocr.collect_statistics(model, tokenizer, texts, options=options).save(arguments.statistics)
    statistics = rocr.Statistics.load(arguments.statistics)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    probes = [p for p in load_probes(PROBES) if p.form == "qa"]
    about_others = known(model, tokenizer, [p for p in probes if p.subject in OTHERS])
    others = [replace(next(p for p in about_others if p.subject == name), split="retain") for name in OTHERS]
    others_before = sums(evaluate(model, tokenizer, others, FORMS), others)
    for name in arguments.concepts:
        todo = [s for s in arguments.settings if (s, name) not in [(row["setting"], row["concept"]) for row in rows]]
        if not todo:
            continue
        facts = known(model, tokenizer, [p for p in probes if p.subject == name])[: arguments.facts]
        asked = [replace(p, split="forget") for p in facts]
        before = {**sums(evaluate(model, tokenizer, asked, FORMS), asked), **others_before}
        concept = rocr.Concept(name, REDIRECTS[facts[0].kind or "person"], kind=facts[0].kind)
        for setting in todo:
            row: dict[str, Any] = {"setting": setting, "concept": name, "kind": concept.kind}
            if setting == REDIRECT:
                pairs = [about_redirect(probe, concept.redirect) for probe in asked]
                named, swapped = ([pair[i] for pair in pairs] for i in (0, 1))
                known_before = sums(evaluate(model, tokenizer, named, SWAPPED), named)
                after = sums(evaluate(model, tokenizer, swapped, SWAPPED), swapped)
                write(arguments.out, rows, row, known_before, after)
                continue
            begun = time.perf_counter()
            aliases = NAMES.get(name, ()) if setting == "listed" else ()
            config = replace(SETTINGS[setting], variant_weight=arguments.weight, seed=arguments.seed)
            guards = rocr.Guards(force=True)
            edit = rocr.unlearn(
                model, tokenizer, [replace(concept, aliases=aliases)], statistics, config, guards=guards, ask=0
            )
            seconds = time.perf_counter() - begun
            together = [*asked, *others]
            after = sums(evaluate(model, tokenizer, together, FORMS), together)
            edit.revert(model)
            row |= {"aliases": list(edit.concepts[0].aliases), "seconds": round(seconds, 1)}
            write(arguments.out, rows, row, before, after)
    print(table(rows))


if __name__ == "__main__":
    main()
