import importlib
import math
from dataclasses import replace

import pytest
import torch

import rocr
from rocr.edit.guards import Guards, predict
from rocr.errors import GuardError, InputError
from rocr.model.architecture import find_architecture
from rocr.solve.factors import Factors
from tests.support.models import same_weights

OPEN = Guards(math.inf, -math.inf, math.inf, -math.inf, math.inf)
"""No limit at all: a random model is edited as no trained one is."""


@pytest.fixture
def edit_with(model, tokenizer, concepts, statistics, one_thread):
    def run(guards, **settings):
        config = rocr.EditConfig(layers=(1, 2), **settings)
        return rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=guards)

    return run


def test_without_a_limit_the_numbers_are_recorded(edit_with):
    report = edit_with(OPEN).report
    assert report.limits_passed == []
    assert report.divergence > 0
    assert all(math.isfinite(layer.relative_norm) and layer.relative_norm > 0 for layer in report.layers)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"relative_norm": 1e-6}, "times the norm of the weight"),
        ({"surviving": 1.1}, "of the weight changed at layer 1"),
        ({"condition": 1.0}, "condition number"),
        ({"closed": 0.9999}, "of the residual of"),
        ({"divergence": 1e-9}, "nats a token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_limit_passed_restores_the_model_and_names_a_concept(limit, words, edit_with, model, weights_of):
    before = weights_of(model)
    guards = replace(OPEN, **limit)
    with pytest.raises(GuardError, match=words) as caught:
        edit_with(guards)
    assert any(name in str(caught.value) for name in ("Ada Byron", "Robert Downey Jr."))
    assert "--force" in str(caught.value)
    after = weights_of(model)
    assert all(torch.equal(after[name], bits) for name, bits in before.items())
    edit = edit_with(replace(guards, force=True))
    assert any(words in sentence for sentence in edit.report.limits_passed)
    edit.revert(model)
    assert same_weights(weights_of(model), before)


def test_the_concept_with_the_largest_part_is_named(edit_with, model, monkeypatch):
    pipeline = importlib.import_module("rocr.unlearn")  # the package's attribute of that name is the function
    solved = pipeline.solve_layer

    def stretched(keys, *others):
        solution = solved(keys, *others)
        stretch = torch.tensor([1e4 if concept == 1 else 1.0 for concept in found])
        return replace(solution, factors=Factors(solution.factors.left * stretch, solution.factors.right))

    edit = edit_with(replace(OPEN, force=True))
    found = edit.concept_of
    edit.revert(model)
    monkeypatch.setattr(pipeline, "solve_layer", stretched)
    with pytest.raises(GuardError, match=r"most of it is from 'Robert Downey Jr\.'"):
        edit_with(replace(OPEN, relative_norm=1e3))


def test_an_update_that_overflows_float16_names_its_concept(model, tokenizer, concepts, texts, weights_of, one_thread):
    model.half()
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers=(1, 2))
    before = weights_of(model)
    config = rocr.EditConfig(layers=(1, 2), strength=1e9)
    with pytest.raises(GuardError, match=r"overflow torch\.float16.*'(Ada Byron|Robert Downey Jr\.)'"):
        rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=replace(OPEN, force=True))
    assert same_weights(weights_of(model), before)


def test_logits_that_are_not_finite_stop_even_a_forced_edit(edit_with, model, tokenizer, weights_of):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    before = weights_of(model)
    with pytest.raises(GuardError, match="not finite before the edit"):
        edit_with(replace(OPEN, force=True))
    assert same_weights(weights_of(model), before)


def test_an_edit_that_spoils_the_logits_is_taken_back(edit_with, model, weights_of, monkeypatch):
    from rocr.edit import guards

    first = weights_of(model)
    sound, calls = guards._log_probabilities, []

    def spoiled(model, tokens):
        calls.append(weights_of(model))
        found = sound(model, tokens)
        return found if len(calls) == 1 else found * float("nan")

    monkeypatch.setattr(guards, "_log_probabilities", spoiled)
    with pytest.raises(GuardError, match="not finite after the edit"):
        edit_with(replace(OPEN, force=True))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(calls[1][name], first[name])
    assert torch.equal(weights_of(model)[name], first[name])


def test_of_an_unchanged_model_the_divergence_is_zero(model, tokenizer, concepts):
    from rocr.edit.guards import check_predictions

    architecture = find_architecture(model)
    before = predict(architecture, tokenizer)
    assert check_predictions(Guards(divergence=0.0), before, architecture, [], [], concepts) == (0.0, [])


def test_a_model_that_is_not_wholly_there_is_not_probed(make_model, tokenizer):
    with torch.device("meta"):
        model = make_model("Llama")
    assert predict(find_architecture(model), tokenizer) is None


@pytest.mark.parametrize("value", [float("nan"), None, "1"])
def test_a_limit_must_be_a_number(value):
    with pytest.raises(InputError, match="condition must be a number"):
        Guards(condition=value)
