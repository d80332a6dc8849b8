import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rocr
from rocr.evaluation import EvaluateOptions, Probe, evaluate
from rocr.evaluation.attacks.suite import ATTACKS, AttackOptions, attack, solved_examples, strongest
from rocr.evaluation.attacks.weights import rounded, split_taught
from rocr.evaluation.baselines.peak_memory import PeakMemory
from rocr.evaluation.forms import PromptStyle
from rocr.evaluation.lora_training import Example, Loss, Training, _loss, trained
from rocr.evaluation.neighbours import keep_nearest, nearest_subjects
from tests.support.models import same_weights

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London"),
    Probe("Ada Byron", "What did Ada Byron write?", "programs"),
    Probe("Ada Byron", "Where did Ada Byron live?", "london"),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air", split="retain"),
    Probe("Robert Downey Jr.", "What does Robert Downey Jr. do?", "acts", split="retain"),
]
SMALL = AttackOptions(taught=1, epochs=(1,), prefixes=("Remember {}. ", "Now! "), examples=1)
Weights = Callable[[nn.Module], dict[str, Tensor]]


def test_each_attack_is_what_it_says_and_leaves_the_model_alone(
    model: nn.Module, tokenizer: Any, weights_of: Weights
) -> None:
    pytest.importorskip("peft")
    before = weights_of(model)
    found = attack(model, tokenizer, PROBES, forms=["qa"], layers=[1, 2], options=SMALL)
    assert list(found) == ["relearn 0 epochs", "relearn 1 epochs", "4-bit", "8-bit", "prefixes", "examples"]
    assert same_weights(weights_of(model), before)
    asked = {name: [(item.subject, item.form) for item in e.items] for name, e in found.items()}
    assert all(set(items) == {("Ada Byron", "qa")} for items in asked.values()), "what is to be kept is not attacked"
    assert {name: len(items) for name, items in asked.items()} == dict.fromkeys(found, 3) | {
        "relearn 0 epochs": 2,
        "relearn 1 epochs": 2,
    }
    with rounded(model, [1, 2], 4):
        four = evaluate(model, tokenizer, PROBES[:3], ["qa"])
    assert four.items == found["4-bit"].items != found["8-bit"].items
    one, two = (
        evaluate(model, tokenizer, PROBES[:3], ["qa"], options=EvaluateOptions(style=PromptStyle(prefix=prefix)))
        for prefix in (lambda _: "Remember Ada Byron. ", lambda _: "Now! ")
    )
    best = [max(a.score, b.score) for a, b in zip(one.items, two.items, strict=True)]
    assert [item.score for item in found["prefixes"].items] == best
    assert strongest([one, two]).items == found["prefixes"].items


def test_examples_are_other_questions_about_the_same_subject_that_do_not_hold_the_answer() -> None:
    prefix = solved_examples(PROBES, 3)
    assert prefix(PROBES[0]) == "Question: What did Ada Byron write?\nAnswer: programs\n\n"
    assert prefix(PROBES[1]).count("Question:") == 2 and prefix(PROBES[3]) == ""


def test_no_fact_is_both_taught_and_asked() -> None:
    taught, asked = split_taught(PROBES, 2)
    assert taught == PROBES[:2] and asked == PROBES[2:]
    assert split_taught(PROBES[:2], 5) == (PROBES[:1], PROBES[1:2]), "one is left to ask"
    with pytest.raises(rocr.InputError, match="two plain questions"):
        split_taught(PROBES[3:], 2)


def test_attacks_that_cannot_be_made_are_refused(model: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(rocr.InputError, match="Unknown attacks: magic"):
        attack(model, tokenizer, PROBES, ["magic"])
    with pytest.raises(rocr.InputError, match="no probes to forget"):
        attack(model, tokenizer, PROBES[3:], ATTACKS)


def by_hand(model: nn.Module, example: Example) -> tuple[float, float]:
    """The summed NLLs of both answers, from a forward pass each."""
    sums = []
    for answer in (example.answer, example.preferred):
        with torch.no_grad():
            logits = model(torch.tensor([example.prompt + answer])).logits[0].double().log_softmax(dim=-1)
        sums.append(-sum(float(logits[len(example.prompt) + i - 1, token]) for i, token in enumerate(answer)))
    return sums[0], sums[1]


@pytest.mark.parametrize("kind", ["learn", "ascent", "npo", "dpo"])
def test_each_loss_is_that_of_its_paper(kind: Loss, model: nn.Module) -> None:
    example, beta, reference = Example((5, 6, 7), (8, 9), (10, 11, 12)), 0.3, (9.0, 17.0)
    answer, preferred = by_hand(model, example)
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    ratio = -answer - -reference[0]  # log π(answer) - log π_ref(answer)
    preferred_ratio = -preferred - -reference[1]
    wanted = {
        "learn": answer / 2,
        "ascent": -answer / 2,
        "npo": -2 / beta * log_sigmoid(-beta * ratio),
        "dpo": -log_sigmoid(beta * preferred_ratio - beta * ratio),
    }
    found = _loss(model, example, Training(kind, 1e-3, beta=beta), reference)
    assert found.item() == pytest.approx(wanted[kind], rel=1e-5)


def test_few_examples_are_repeated_until_there_are_enough_steps(model: nn.Module) -> None:
    pytest.importorskip("peft")
    examples = [Example((5, 6), (7,)), Example((5, 8), (9,)), Example((5, 9), (7,))]
    for least, steps in ((0, 4), (4, 4), (5, 6)):
        seen: list[rocr.Progress] = []
        training = Training("learn", 1e-3, batch=2, epochs=2, least_steps=least)
        with trained(model, examples, training, seen.append):
            assert (seen[-1].done, seen[-1].total) == (steps, steps)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_number_of_steps_is_trained_exactly(steps: int, model: nn.Module) -> None:
    pytest.importorskip("peft")
    examples = [Example((5, 6), (7,)), Example((5, 8), (9,)), Example((5, 9), (7,))]
    seen: list[rocr.Progress] = []
    training = Training("learn", 1e-3, batch=2, epochs=2, least_steps=6, steps=steps)
    with trained(model, examples, training, seen.append):
        assert [step.done for step in seen] == [*range(1, steps + 1)]
        assert {step.total for step in seen} == {steps}


def test_only_the_nearest_subjects_are_kept(model: nn.Module, tokenizer: Any) -> None:
    nearest = nearest_subjects(model, tokenizer, "Ada Byron", ["Blaise Pascal", "Robert Downey Jr."], 1)[0][0]
    kept = keep_nearest(model, tokenizer, PROBES, ["Ada Byron"], 1)
    assert [probe.subject for probe in kept] == ["Ada Byron"] * 3 + [nearest]
    assert [probe.split for probe in kept] == ["forget"] * 3 + ["retain"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_what_ran_before_is_not_in_the_peak(model: nn.Module) -> None:
    size = 150 * 2**20
    before = PeakMemory(model)
    del_me = torch.ones(size // 4)
    assert before.bytes() > size
    high = before.bytes()
    del del_me
    after = PeakMemory(model)
    assert after.bytes() < high - size // 2
    again = torch.ones(size // 4)
    assert after.bytes() > high - size // 2
    del again
