import copy
import json
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import EditConfig
from rocr.edit.measures import EditReport, mean_by_concept
from rocr.model.architecture import find_architecture

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(layers=[1, 2], templates=("Who is {}?", "It is about {}."), keys_per_concept="all")


@pytest.mark.parametrize("family", ["Llama", "GPT-2"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measures_are_their_definitions(family, dtype, make_model, tokenizer, texts, concepts):
    model = make_model(family).to(dtype)
    original = find_architecture(copy.deepcopy(model))
    statistics = rocr.collect_statistics(model, tokenizer, texts, CONFIG.layers)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    for update, measures in zip(edit.updates, edit.report.layers, strict=True):
        change = update.factors.left.double() @ update.factors.right.double()
        weight = original.down_projection(update.layer).weight
        edited = find_architecture(model).down_projection(update.layer).weight
        assert measures.relative_norm == pytest.approx(float(change.norm() / weight.double().norm()), rel=1e-3)
        assert measures.surviving == pytest.approx(float((weight != edited).double().mean()))
        assert measures.keys == len(edit.concept_of) == len(update.keys)
        assert measures.layer == update.layer
        assert measures.metric == f"whitened, γ = {CONFIG.gamma:g}"
        assert measures.condition > 1 and measures.ridge == update.system.ridge
        moved = update.keys.double() @ change.T
        for concept, closed in enumerate(measures.closed):
            rows = [row for row, owner in enumerate(edit.concept_of) if owner == concept]
            wanted = update.residuals[rows].double()
            assert closed == pytest.approx(float((moved[rows] * wanted).sum() / wanted.square().sum()), rel=1e-4)


def test_everything_is_closed_as_the_ridge_goes_to_zero(model, tokenizer, statistics, concepts):
    config = EditConfig(layers=[1], key_tokens="last", templates=("Who is {}?",))
    closed = []
    for ridge in (10.0, 1.0, 1e-5):
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, replace(config, ridge=ridge))
        closed.append(edit.report.layers[0].closed)
        edit.revert(model)
    assert [min(shares) for shares in closed] == sorted(min(shares) for shares in closed)
    assert max(closed[0]) < 0.9
    assert closed[-1] == pytest.approx([1.0, 1.0], abs=1e-3)


def test_rounding_to_bfloat16_swallows_small_updates(make_model, tokenizer, texts, concepts):
    survived = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("Llama").to(dtype)
        statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
        edit = rocr.unlearn(
            model, tokenizer, concepts, statistics, EditConfig(layers=[1], strength=0.02, key_tokens="last")
        )
        survived.append(edit.report.layers[0].surviving)
    assert survived[0] > 0.95 > 0.9 > survived[1] > 0.01


def test_means_by_concept():
    values, weights = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([2.0, 1.0, 3.0, 0.0])
    assert mean_by_concept(values, [0, 2, 2, 1], weights) == [1.0, 0.0, 5.0]


def test_a_report_goes_through_json(model, tokenizer, statistics, concepts):
    report = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG).report
    assert EditReport.from_json(json.loads(json.dumps(report.to_json())), len(concepts)) == report
