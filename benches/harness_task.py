"""Write the questions of the tasks of lm-evaluation-harness from the probe set: `python benches/harness_task.py`."""

from __future__ import annotations

import json
from pathlib import Path

from rocr.cli.options import PROBES
from rocr.evaluation import load_probes
from rocr.evaluation.forms import ORT_FORMS, PromptStyle, build_items

FOLDER = Path(__file__).parents[1] / "integrations" / "lm_eval"
WRITTEN = FOLDER / "questions.jsonl"


def questions() -> str:
    """Return the lines of the file: each probe in each form of ORT, with the answer that is scored."""
    probes = load_probes(PROBES)
    items, plain = (build_items(probes, ORT_FORMS, PromptStyle(subtoken_example=shown)) for shown in (True, False))
    lines = []
    for item, other in zip(items, plain, strict=True):
        row = {
            "form": item.form,
            "subject": probes[item.probe].subject,
            "message": item.message,
            "suffix": item.suffix,
            "answer": item.answers[item.correct],
        }
        if other.message != item.message:
            row["plain"] = other.message  # the authors show Llama models no example
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    WRITTEN.write_text(questions(), encoding="utf-8")
    print(f"{WRITTEN}: {len(questions().splitlines()):,} questions")
