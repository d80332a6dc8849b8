"""What compared methods need of a model and of questions, which is checked before any of them runs."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import rocr
from rocr.evaluation import Probe
from rocr.evaluation.baselines.method import Case, MethodComparison, Unlearned
from rocr.evaluation.baselines.methods import METHOD, METHODS, Robustness, compare_methods, layers_to_edit
from rocr.evaluation.baselines.training import trainable
from rocr.evaluation.probes.probe import split_by_subject

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London"),
    Probe("Ada Byron", "What did Ada Byron write?", "programs"),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air"),
    Probe("Blaise Pascal", "What did Blaise Pascal build?", "machines"),
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case(model, tokenizer, statistics):
    comparison = MethodComparison(model, tokenizer, PROBES, statistics, "a gardener", forms=["qa"])
    return Case(comparison, model, "Ada Byron", split_by_subject(PROBES, ["Ada Byron"]))


def test_layers_that_need_statistics_are_those_of_the_methods(make_model):
    model = make_model("Llama", num_hidden_layers=30)
    edited = [layers_to_edit(model, methods=methods) for methods in (["rocr", "RMU"], METHODS)]
    assert edited == [[2, 4, 5, 6], [2, 4, 5, 6, 7, 8]]


def test_methods_say_what_they_miss(case, make_model):
    with torch.inference_mode():
        loaded = make_model("Llama")
    with pytest.raises(rocr.InputError, match="inference_mode"), trainable(loaded):
        pass
    with pytest.raises(rocr.InputError, match="inference_mode"), METHOD["RMU"].unlearned(replace(case, model=loaded)):
        pass
    alone = replace(case, probes=[replace(probe, form="adversarial") for probe in case.probes])
    for name in ("JensUn", "RMU", "MRP", "UniErase", "AdvNPO"):
        with pytest.raises(rocr.InputError, match="form qa"), METHOD[name].unlearned(alone):
            pass


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("Mixtral", "UniErase", "UniErase edits dense MLPs, and layer 0 is a mixture of experts"),
        ("GPT-2", "JensUn", "no linear modules named q_proj and v_proj"),
        ("GPT-2", "AdvNPO", "no linear modules named q_proj and v_proj"),
    ],
)
def test_a_model_that_a_method_cannot_change_is_refused_before_any_method_runs(family, method, words, case, make_model):
    comparison = replace(case.comparison, model=make_model(family))
    reports = []
    with pytest.raises(rocr.InputError, match=words):
        list(compare_methods(comparison, ["Ada Byron"], ["original", method], reports.append))
    assert not reports


def test_questions_about_others_are_needed_before_any_method_runs(case):
    comparison = replace(case.comparison, probes=PROBES[:2])
    reports = []
    for methods, robustness in ((["original", "RMU", "MRP"], None), (["original"], Robustness(relearning_steps=2))):
        with pytest.raises(rocr.InputError, match="need probes of the form qa about subjects besides the target"):
            list(compare_methods(comparison, ["Ada Byron"], methods, reports.append, robustness))
    assert not reports
    others = replace(comparison, retain=PROBES[2:])
    assert [e.answer for e in replace(case, comparison=others, probes=PROBES[:2]).retain()]


def test_what_a_sequence_has_forgotten_is_not_retained(case, monkeypatch):
    """A later target's methods train on questions about others, which the targets before it no longer are."""
    probes = [*PROBES, Probe("Robert Downey", "What does Robert Downey do?", "acts")]
    seen = []

    @contextmanager
    def looking(inner):
        seen.append({probe.subject: probe.split for probe in inner.probes})
        yield Unlearned(inner.model)

    monkeypatch.setitem(METHOD, "RMU", replace(METHOD["RMU"], unlearned=looking))
    comparison = replace(case.comparison, probes=probes, sequential=True)
    results = list(compare_methods(comparison, ["Ada Byron", "Blaise Pascal"], ["RMU"]))
    assert seen == [
        {"Ada Byron": "forget", "Blaise Pascal": "retain", "Robert Downey": "retain"},
        {"Blaise Pascal": "forget", "Robert Downey": "retain"},
    ]
    assert set(results[1].evaluation.by_target()) == {"Ada Byron", "Blaise Pascal"}
