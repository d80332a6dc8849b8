"""Compare the scores of lm-evaluation-harness in the tasks of integrations/lm_eval with those of `rocr.evaluate`.

MODEL is a folder of transformers. Both ask the first questions of each form, in float32; the table has the mean scores
and the largest difference in a question. Needs rocr[harness].

    python benches/harness_scores.py MODEL --questions 20
"""

from __future__ import annotations

import argparse
import sys

import lm_eval
import torch
from harness_task import FOLDER
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from rocr.cli.options import PROBES
from rocr.evaluation import evaluate, load_probes
from rocr.evaluation.forms import ORT_FORMS


def main() -> None:
    """Ask both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=20, help="questions of each form (default: 20)")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    own = evaluate(model, tokenizer, load_probes(PROBES)[: arguments.questions], ORT_FORMS)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=["rocr_ort"],
        task_manager=TaskManager(include_path=str(FOLDER), metadata={"pretrained": arguments.model}),
        limit=arguments.questions,
        bootstrap_iters=0,
    )
    sys.stdout.write("form       harness   rocr      largest difference in a question\n")
    for form in ORT_FORMS:
        mine = [item.score for item in own.items if item.form == form]
        theirs = [sample["score"] for sample in found["samples"][f"rocr_ort_{form}"]]
        assert len(mine) == len(theirs)
        largest = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        sys.stdout.write(f"{form:<10} {sum(theirs) / len(theirs):<9.5f} {sum(mine) / len(mine):<9.5f} {largest:.1e}\n")


if __name__ == "__main__":
    main()
