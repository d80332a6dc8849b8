"""Compare the specificity of edits with statistics from the model's own text and from a given text.

    python benches/specificity.py --text wikitext2_test_raw.txt

The first half of the text is for statistics, the second half for perplexity. The five people of the demo are
unlearned. "forgotten" and "kept" are the mean negative log-likelihoods of the answers that the model gives before any
edit, about these people and about others.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rocr
from rocr.demo import CONCEPTS, demo_model
from rocr.model.chat import render_chat
from rocr.model.generate import ask
from rocr.model.load import find_model, load_model

OTHERS = (
    "Isaac Newton",
    "Marie Curie",
    "Napoleon Bonaparte",
    "Charles Darwin",
    "Bill Gates",
    "Pablo Picasso",
    "Tom Hanks",
    "Barack Obama",
    "Michael Jordan",
    "Steve Jobs",
)


@dataclass(frozen=True)
class Row:
    """The results for one source of statistics: mean NLL of answers in nats per token, and perplexity of the text."""

    source: str
    tokens: int
    forgotten: float
    kept: float
    perplexity: float


def answer_loss(model: nn.Module, tokenizer: Any, names: list[str], answers: list[str]) -> float:
    """Return the mean NLL of the answers to "Who is ...?", in nats per token, averaged over names."""
    losses = []
    for name, answer in zip(names, answers, strict=True):
        prompt = tokenizer(render_chat(tokenizer, f"Who is {name}?"), add_special_tokens=False)["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        losses.append(sequence_loss(model, torch.tensor([prompt + target]), len(prompt)))
    return sum(losses) / len(losses)


@torch.no_grad()
def sequence_loss(model: nn.Module, tokens: Tensor, start: int) -> float:
    """Return the mean NLL of tokens (batch, n) from position `start`, in nats per token."""
    logits = model(tokens).logits[:, start - 1 : -1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten()))


def main() -> None:
    """Measure and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536])
    arguments = parser.parse_args()
    loaded = load_model(find_model(str(demo_model())))
    model, tokenizer = loaded.model, loaded.tokenizer
    paragraphs = arguments.text.read_text(encoding="utf-8").split("\n")
    half = len(paragraphs) // 2
    held_out = torch.tensor(tokenizer("\n".join(paragraphs[half:]))["input_ids"])[: 16 * 512].view(16, 512)
    concepts = rocr.load_concepts(CONCEPTS)
    names = [concept.name for concept in concepts]
    answers = ask(model, tokenizer, [f"Who is {name}?" for name in (*names, *OTHERS)])

    def measure(source: str, tokens: int) -> Row:
        forgotten = answer_loss(model, tokenizer, names, answers[: len(names)])
        kept = answer_loss(model, tokenizer, list(OTHERS), answers[len(names) :])
        return Row(source, tokens, forgotten, kept, math.exp(sequence_loss(model, held_out, 1)))

    rows = [measure("no edit", 0)]
    sources: list[tuple[str, list[str] | None, int | None]] = [("the model's own text", None, None)]
    sources += [(arguments.text.name, paragraphs[:half], tokens) for tokens in arguments.tokens]
    for source, texts, tokens in sources:
        options = rocr.CollectOptions(tokens=tokens)
        statistics = rocr.collect_statistics(model, tokenizer, texts, options=options)
        edit = rocr.unlearn(model, tokenizer, concepts, statistics)
        rows.append(measure(source, statistics.tokens))
        edit.revert(model)
    print("| statistics from | tokens | forgotten, NLL | kept, NLL | perplexity |\n|---|---:|---:|---:|---:|")
    for row in rows:
        print(f"| {row.source} | {row.tokens:,} | {row.forgotten:.2f} | {row.kept:.3f} | {row.perplexity:.2f} |")


if __name__ == "__main__":
    main()
