"""A compared method that is interrupted leaves the model as it was: weights, hooks, gradients, modes."""

from dataclasses import replace

import pytest
import torch

from rocr.evaluation import Probe
from rocr.evaluation.baselines import advnpo, jensun, mrp, rmu, unierase
from rocr.evaluation.baselines.method import MethodComparison
from rocr.evaluation.baselines.methods import METHOD, Robustness, compare_methods
from rocr.evaluation.baselines.training import restored
from tests.support.models import same_weights

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London"),
    Probe("Ada Byron", "What did Ada Byron write?", "programs"),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air"),
    Probe("Robert Downey", "What does Robert Downey grow?", "roses"),
]
NEW = ("AdvNPO", "JensUn", "RMU", "MRP", "UniErase")
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]


class Stopped(BaseException):
    """An interruption, which no code may catch by the way."""


def state_of(model, weights_of):
    """What an unlearning changes, besides the weights: hooks of rocr, gradients, flags and modes."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if "rocr" in hook.__module__
    ]
    flags = [(p.requires_grad, p.grad is None, len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return weights_of(model), hooks, flags, modes, torch.is_grad_enabled()


def same_state(one, other):
    return same_weights(one[0], other[0]) and one[1:] == other[1:]


@pytest.fixture
def comparison(model, tokenizer, statistics):
    small = {layer: moment * 1e-2 for layer, moment in statistics.moments.items()}  # below the authors' threshold
    statistics = replace(statistics, moments=small)
    return MethodComparison(model, tokenizer, PROBES, statistics, "a gardener", forms=["qa"], steps=3)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("stop", ["training", "questions"])
def test_an_interruption_restores_everything(method, stop, comparison, weights_of):
    comparison.model.train()
    before = state_of(comparison.model, weights_of)
    seen = []

    def interrupt(report):
        seen.append(report)
        if report.stage == stop and report.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        list(compare_methods(comparison, ["Ada Byron"], [method], interrupt))
    assert seen[-1].stage == stop
    assert same_state(before, state_of(comparison.model, weights_of))


def test_an_interruption_of_fine_tuning_restores_the_method_too(comparison, weights_of):
    before = state_of(comparison.model, weights_of)

    def interrupt(report):
        if report.stage == "training" and report.total == 7:
            raise Stopped

    with pytest.raises(Stopped):
        list(compare_methods(comparison, ["Ada Byron"], ["RMU"], interrupt, Robustness(relearning_steps=7)))
    assert same_state(before, state_of(comparison.model, weights_of))


@pytest.mark.parametrize("method", ["MRP", "RMU", "UniErase", "rocr"])
def test_an_interruption_in_a_sequence_restores_all_of_its_targets(method, comparison, weights_of):
    before = state_of(comparison.model, weights_of)
    asked = 0

    def interrupt(report):
        nonlocal asked
        asked += report.stage == "questions" and report.done == report.total
        if asked == 2:
            raise Stopped

    in_order = replace(comparison, sequential=True)
    with pytest.raises(Stopped):
        list(compare_methods(in_order, ["Ada Byron", "Blaise Pascal"], [method], interrupt))
    assert same_state(before, state_of(comparison.model, weights_of))


def test_a_second_target_is_unlearned_on_top_of_the_first(comparison, weights_of):
    """The rocr of a sequence is one edit of both; after the second target, the first is put back."""
    first, second = compare_methods(replace(comparison, sequential=True), ["Ada Byron", "Blaise Pascal"], ["rocr"])
    assert [first.target, second.target] == ["Ada Byron", "Blaise Pascal"]
    assert set(second.evaluation.by_target()) == {"Ada Byron", "Blaise Pascal"}
    alone = [
        result.evaluation.by_target()["Ada Byron"] for result in compare_methods(comparison, ["Ada Byron"], ["rocr"])
    ]
    assert first.evaluation.by_target()["Ada Byron"] == alone[0]
    assert METHOD["rocr"].sequential and not METHOD["JensUn"].sequential


def test_a_method_holds_copies_of_the_weights_that_it_trains_and_no_others(comparison, monkeypatch):
    """RMU and UniErase copy down-projections; adapters and projections are beside the model and copy nothing."""
    copied = []

    def recording(parameters):
        copied.append(sum(parameter.numel() for parameter in parameters))
        return restored(parameters)

    for module in (rmu, unierase):
        monkeypatch.setattr(module, "restored", recording)
    one = comparison.model.model.layers[0].mlp.down_proj.weight.numel()
    for method, matrices in (("RMU", [3]), ("UniErase", [4]), ("MRP", []), ("AdvNPO", []), ("JensUn", [])):
        copied.clear()
        list(compare_methods(comparison, ["Ada Byron"], [method]))
        assert copied == [count * one for count in matrices]
    assert not any(hasattr(module, "restored") for module in (mrp, advnpo, jensun))
