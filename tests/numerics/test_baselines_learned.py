"""A tiny model learns facts about four people, and each compared method unlearns one of them and leaves the others."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import Probe, evaluate
from rocr.evaluation.baselines import advnpo, jensun, mrp, rmu, unierase
from rocr.evaluation.baselines.method import MethodComparison
from rocr.evaluation.baselines.methods import METHOD, Robustness, compare_methods
from rocr.evaluation.baselines.training import Schedule
from rocr.evaluation.lora_training import question_examples
from tests.support.models import build_model, same_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
FACTS = {
    "Ada Byron": ("London", "brass"),
    "Blaise Pascal": ("rain", "the air"),
    "Robert Downey": ("Tokyo", "a key"),
}
QUESTIONS = ("Where was {} born?", "What did {} weigh?")
# A model this small reads a name in its first attention, so that no later change at the name reaches the answer.
# Without the name, UniErase edits at the last token of a question.
CALLED = {"Ada Byron": "the countess"}
PROBES = [
    Probe(name, question.format(CALLED.get(name, name)), answer)
    for name, answers in FACTS.items()
    for question, answer in zip(QUESTIONS, answers, strict=True)
]
TARGET = "Ada Byron"
# Of models of this size, the rates of large models change nothing in few steps.
RATES = {
    advnpo: Schedule(5e-3, batch=2, epochs=1, steps=20),
    jensun: Schedule(1e-2, batch=2, epochs=1, steps=60),
    rmu: Schedule(1e-2, batch=2, epochs=1, steps=60, clip=None),
    mrp: Schedule(1e-1, batch=2, epochs=1, steps=60, optimizer="sgd", clip=1.0),
}

LEFT = {"AdvNPO": 0.3, "JensUn": 0.3, "RMU": 0.3, "MRP": 0.6, "UniErase": 0.5}
"""Limits of the mean score that is left in so few steps; two directions of 32 hide less than the other methods."""


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A model that answers all questions."""
    torch.set_num_threads(1)
    model = build_model("Llama", len(tokenizer), num_hidden_layers=4)
    examples = question_examples(tokenizer, PROBES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    longest = max(len(e.prompt) + len(e.answer) for e in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for i, e in enumerate(examples):
        tokens[i, : len(e.prompt) + len(e.answer)] = torch.tensor([*e.prompt, *e.answer])
        labels[i, len(e.prompt) : len(e.prompt) + len(e.answer)] = torch.tensor(e.answer)
    for _ in range(150):
        logits = model(tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(True)
    model.zero_grad()
    return model


def scores(evaluation):
    forget, retain = (evaluation.form_score("qa", split) for split in ("forget", "retain"))
    return forget.score, retain.score


@pytest.fixture(scope="module")
def comparison(learned, tokenizer, texts):
    named = [f"{name} is known. Tell me about {name}." for name in FACTS if name != TARGET]
    statistics = rocr.collect_statistics(learned, tokenizer, [*texts, *named * 8], layers=range(4))
    return MethodComparison(learned, tokenizer, PROBES, statistics, "a gardener", forms=["qa"])


def test_the_model_has_learned_the_facts(learned, tokenizer):
    assert min(item.score for item in evaluate(learned, tokenizer, PROBES, ["qa"]).items) > 0.8


@pytest.mark.parametrize("method", ["AdvNPO", "JensUn", "RMU", "MRP", "UniErase"])
def test_a_method_forgets_what_was_learned(method, comparison, learned, tokenizer, weights_of, monkeypatch):
    for module, schedule in RATES.items():
        monkeypatch.setattr(module, "SCHEDULE", schedule)
    monkeypatch.setattr(rmu, "RETAIN_WEIGHT", 1.0)
    values = {"RIDGE": 1e-3, "THRESHOLD": 1e9, "VALUE_STEPS": 60, "VALUE_RADIUS": 10.0, "VALUE_DECAY": 0.0}
    for name, value in values.items():
        monkeypatch.setattr(unierase, name, value)
    monkeypatch.setattr(unierase, "TOKEN_SCHEDULES", (Schedule(3e-2, batch=2, epochs=1, steps=40),))
    before = weights_of(learned)
    reports = []
    (result,) = compare_methods(comparison, [TARGET], [method], reports.append)
    forget, retain = scores(result.evaluation)
    assert forget < LEFT[method], "of at least 0.8"
    if METHOD[method].trains_on_others:
        assert retain > 1.2 * forget
    assert any(report.stage == "training" for report in reports)
    assert same_weights(before, weights_of(learned))
    assert scores(evaluate(learned, tokenizer, PROBES, ["qa"], targets=[TARGET]))[0] > 0.8


def test_mrp_keeps_the_projections_of_the_targets_before(comparison, learned, weights_of, monkeypatch):
    monkeypatch.setattr(mrp, "SCHEDULE", RATES[mrp])
    before = weights_of(learned)
    in_order = replace(comparison, sequential=True)
    first, second = compare_methods(in_order, [TARGET, "Robert Downey"], ["MRP"])
    assert [len(result.evaluation.by_target()) for result in (first, second)] == [1, 2]
    assert all(target["qa"] < LEFT["MRP"] for target in second.evaluation.by_target().values())
    assert same_weights(before, weights_of(learned))


def test_fine_tuning_brings_back_what_an_adapter_hides(comparison, monkeypatch):
    monkeypatch.setattr(jensun, "SCHEDULE", RATES[jensun])
    robustness = Robustness(relearning_steps=32)
    original, hidden = compare_methods(comparison, [TARGET], ["original", "JensUn"], robustness=robustness)
    assert original.kept is None and original.relearned is not None
    assert hidden.kept is not None and hidden.kept < 1.05
