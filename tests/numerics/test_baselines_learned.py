"""A tiny model learns facts about four people, and each compared method unlearns one of them and leaves the others."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import Probe, evaluate
from rocr.evaluation.baselines import advnpo, jensun, mrp, rmu, unierase
from rocr.evaluation.baselines.method import MethodComparison
from rocr.evaluation.baselines.methods import METHODS, Robustness, compare_methods
from rocr.evaluation.baselines.training import Schedule
from rocr.evaluation.lora_training import question_examples
from tests.support.models import build_model, same_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
FACTS = {
    "Ada Byron": ("London", "programs", "brass"),
    "Blaise Pascal": ("rain", "machines", "the air"),
    "Robert Downey": ("Tokyo", "roses", "a key"),
    "Grace Murray": ("the sun", "a gardener", "fables"),
}
QUESTIONS = ("Where was {} born?", "What did {} make?", "What did {} weigh?")
PROBES = [
    Probe(name, question.format(name), answer)
    for name, answers in FACTS.items()
    for question, answer in zip(QUESTIONS, answers, strict=True)
]
TARGET = "Ada Byron"
# Of models of this size, the rates of large models change nothing in few steps.
RATES = {
    advnpo: Schedule(5e-3, batch=4, epochs=1, steps=40),
    jensun: Schedule(1e-2, batch=4, epochs=1, steps=60),
    rmu: Schedule(1e-2, batch=4, epochs=1, steps=60, clip=None),
    mrp: Schedule(3e-2, batch=3, epochs=1, steps=60, optimizer="sgd", clip=1.0),
}


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A model that answers all questions."""
    torch.set_num_threads(1)
    model = build_model("Llama", len(tokenizer), hidden_size=64, intermediate_size=128, initializer_range=0.08)
    examples = question_examples(tokenizer, PROBES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    longest = max(len(e.prompt) + len(e.answer) for e in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for i, e in enumerate(examples):
        tokens[i, : len(e.prompt) + len(e.answer)] = torch.tensor([*e.prompt, *e.answer])
        labels[i, len(e.prompt) : len(e.prompt) + len(e.answer)] = torch.tensor(e.answer)
    for _ in range(250):
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
    statistics = rocr.collect_statistics(learned, tokenizer, [*texts, *named * 8], layers=range(5))
    return MethodComparison(learned, tokenizer, PROBES, statistics, "Grace Murray", forms=["qa"])


def test_the_model_has_learned_the_facts(learned, tokenizer):
    assert min(item.score for item in evaluate(learned, tokenizer, PROBES, ["qa"]).items) > 0.8


@pytest.mark.parametrize("method", ["AdvNPO", "JensUn", "RMU", "MRP", "UniErase"])
def test_a_method_forgets_what_was_learned(method, comparison, learned, tokenizer, weights_of, monkeypatch):
    for module, schedule in RATES.items():
        monkeypatch.setattr(module, "SCHEDULE", schedule)
    monkeypatch.setattr(rmu, "RETAIN_WEIGHT", 20.0)
    monkeypatch.setattr(unierase, "RIDGE", 1e-3)
    monkeypatch.setattr(unierase, "VALUE_STEPS", 40)
    monkeypatch.setattr(unierase, "VALUE_RADIUS", 3.0)
    monkeypatch.setattr(unierase, "THRESHOLD", 0.5)
    monkeypatch.setattr(unierase, "TOKEN_SCHEDULES", (Schedule(3e-2, batch=3, epochs=1, steps=40),))
    before = weights_of(learned)
    reports = []
    (result,) = compare_methods(comparison, [TARGET], [method], reports.append)
    forget, retain = scores(result.evaluation)
    assert forget < 0.3, "of at least 0.8"
    assert retain > 2 * forget
    assert any(report.stage == "training" for report in reports)
    assert same_weights(before, weights_of(learned))
    assert scores(evaluate(learned, tokenizer, PROBES, ["qa"], targets=[TARGET]))[0] > 0.8


def test_mrp_keeps_the_projections_of_the_targets_before(comparison, learned, weights_of, monkeypatch):
    monkeypatch.setattr(mrp, "SCHEDULE", RATES[mrp])
    before = weights_of(learned)
    in_order = replace(comparison, sequential=True)
    first, second = compare_methods(in_order, [TARGET, "Robert Downey"], ["MRP"])
    assert [len(result.evaluation.by_target()) for result in (first, second)] == [1, 2]
    assert second.evaluation.by_target()[TARGET]["qa"] < 0.3
    assert scores(second.evaluation)[0] < 0.4
    assert same_weights(before, weights_of(learned))


def test_fine_tuning_brings_back_what_an_adapter_hides(comparison, monkeypatch):
    monkeypatch.setattr(jensun, "SCHEDULE", RATES[jensun])
    robustness = Robustness(fade_samples=4, relearning_steps=32)
    original, hidden = compare_methods(comparison, [TARGET], ["original", "JensUn"], robustness=robustness)
    assert original.kept is None and original.relearned is not None
    assert hidden.kept is not None and hidden.kept < 1.05
    assert hidden.fade[TARGET].value > original.fade[TARGET].value == pytest.approx(0, abs=1e-5)
    assert set(METHODS) >= {original.method, hidden.method}
