from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rocr
from rocr.evaluation import Probe
from rocr.evaluation.attacks.weights import relearning_curve, round_groups, rounded
from rocr.evaluation.baselines.methods import METHODS, MethodComparison, compare_methods
from rocr.evaluation.lora_training import Training, question_examples, trained
from rocr.model.architecture import find_architecture
from tests.support.models import same_weights

pytestmark = pytest.mark.thorough

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London"),
    Probe("Ada Byron", "What did Ada Byron write?", "programs"),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air"),
]
Weights = Callable[[nn.Module], dict[str, Tensor]]


def answer_nll(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
    return -sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 1), (2, 63), (5, 128), (4, 123)])
def test_rounding_leaves_few_values_and_small_errors(bits: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    grid = round_groups(weight, bits)
    levels = 2 ** (bits - 1) - 1
    for row, exact in zip(grid.split(64, dim=1), weight.split(64, dim=1), strict=True):
        step = exact.abs().amax(dim=1, keepdim=True) / levels
        assert ((row - exact).abs() <= step * 0.5001).all()
        assert ((row / step) - (row / step).round()).abs().max() < 1e-3
    assert round_groups(grid, bits).allclose(grid, rtol=1e-5)


def test_rounded_weights_come_back_bit_for_bit(model: nn.Module, weights_of: Weights) -> None:
    before = weights_of(model)
    weight = find_architecture(model).down_projection(2).weight
    with rounded(model, [2], 4):
        assert not same_weights(before, weights_of(model))
        assert round_groups(weight, 4).allclose(weight, rtol=1e-5)
    assert same_weights(before, weights_of(model))
    with pytest.raises(rocr.InputError, match="between 2 and 8"), rounded(model, [2], 1):
        pass


@pytest.mark.parametrize(("loss", "sign"), [("learn", -1), ("ascent", 1), ("npo", 1), ("dpo", 1)])
def test_training_moves_the_answer_the_right_way_and_leaves_the_model_alone(
    loss: Any, sign: int, model: nn.Module, tokenizer: Any, weights_of: Weights
) -> None:
    pytest.importorskip("peft")
    before = weights_of(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    examples = question_examples(tokenizer, PROBES[:2], (lambda _: "rain") if loss == "dpo" else None)
    example = examples[0]
    first = answer_nll(model, example.prompt, example.answer)
    with trained(model, examples, Training(loss, 1e-2, batch=2, epochs=4)) as adapted:
        change = answer_nll(adapted, example.prompt, example.answer) - first
    assert change * sign > 0.05
    assert same_weights(before, weights_of(model)), "an adapter never touches the weights"
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert answer_nll(model, example.prompt, example.answer) == first


def test_a_curve_of_relearning_asks_what_was_not_taught(model: nn.Module, tokenizer: Any) -> None:
    pytest.importorskip("peft")
    curve = relearning_curve(
        model, tokenizer, PROBES[:1], PROBES[1:2], Training("learn", 1e-2, batch=1), epochs=(2,), forms=["qa"]
    )
    assert list(curve) == [0, 2] and curve[0].items != curve[2].items
    with pytest.raises(rocr.InputError, match="both taught and asked"):
        relearning_curve(model, tokenizer, PROBES[:1], PROBES[:1], Training("learn", 1e-2))


def test_every_method_is_compared_and_the_model_is_left_as_it_was(
    model: nn.Module, tokenizer: Any, statistics: rocr.Statistics, weights_of: Weights
) -> None:
    pytest.importorskip("peft")
    before = weights_of(model)
    small = {layer: moment * 1e-2 for layer, moment in statistics.moments.items()}  # below the authors' threshold
    comparison = MethodComparison(
        model, tokenizer, PROBES, replace(statistics, moments=small), "a gardener", forms=["qa"], steps=2
    )
    results = list(compare_methods(comparison, ["Ada Byron"]))
    assert [result.method for result in results] == list(METHODS)
    assert same_weights(before, weights_of(model))
    scores = [[item.score for item in result.evaluation.items] for result in results]
    assert all(score != scores[0] for score in scores[1:])
    assert all(result.seconds > 0 and result.peak_bytes > 2**20 for result in results)
    with pytest.raises(rocr.InputError, match="Unknown methods: magic"):
        list(compare_methods(comparison, ["Ada Byron"], ["magic"]))
