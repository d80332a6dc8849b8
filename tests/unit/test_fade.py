"""FADE, what is left in the worst wording, and what fine-tuning leaves forgotten, against values by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import Evaluation, Probe
from rocr.evaluation.baselines.methods import MethodResult
from rocr.evaluation.baselines.relearning import kept_share, knowledge, tuned
from rocr.evaluation.baselines.tables import results_json, robustness_table
from rocr.evaluation.fade import Fade, FadeMeasure, FadeOptions, end_tokens, fade_of, likelihood
from rocr.evaluation.forms import PromptStyle
from rocr.evaluation.lora_training import Example
from rocr.evaluation.sampling import sample_continuations
from rocr.evaluation.scores import ItemScore

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London"),
    Probe("Ada Byron", "What did Ada Byron write?", "programs"),
    Probe("Ada Byron", "What did she write?", "notes"),
]
pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(model, prompt, tokens):
    """Log-probability of tokens after a prompt, from one pass over all of them."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_samples_are_drawn_with_the_probabilities_that_they_report(family, make_model):
    model = make_model(family)
    prompt = [5, 6, 7, 8]
    samples = sample_continuations(model, prompt, 6, 5, set(), seed=0)
    assert samples == sample_continuations(model, prompt, 6, 5, set(), seed=0)
    assert samples != sample_continuations(model, prompt, 6, 5, set(), seed=1)
    assert [len(sample.tokens) for sample in samples] == [5] * 6
    for sample in samples:
        assert sample.log_probability == pytest.approx(by_hand(model, prompt, sample.tokens), abs=1e-4)
    (scores,) = likelihood(model, [prompt], [samples])
    assert scores == pytest.approx([sample.log_probability for sample in samples], abs=1e-4)


def test_samples_are_the_same_without_a_cache(model, monkeypatch):
    cached = sample_continuations(model, [5, 6, 7], 5, 4, set(), seed=2)
    monkeypatch.setattr("rocr.evaluation.sampling.keeps_cache", lambda _: False)
    again = sample_continuations(model, [5, 6, 7], 5, 4, set(), seed=2)
    assert [each.tokens for each in cached] == [each.tokens for each in again]


def test_samples_end_at_an_end_token(model):
    free = sample_continuations(model, [5, 6, 7], 4, 6, set(), seed=0)
    end = free[0].tokens[2]
    (first, *_) = sample_continuations(model, [5, 6, 7], 4, 6, {end}, seed=0)
    assert first.tokens == free[0].tokens[: free[0].tokens.index(end) + 1]
    assert first.log_probability == pytest.approx(by_hand(model, [5, 6, 7], first.tokens), abs=1e-4)


def test_how_often_a_token_is_drawn_is_its_probability(model):
    count = 4000
    samples = sample_continuations(model, [5, 6, 7], count, 1, set(), seed=0)
    with torch.no_grad():
        exact = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    drawn = torch.bincount(torch.tensor([sample.tokens[0] for sample in samples]), minlength=len(exact)) / count
    deviation = (exact * (1 - exact) / count).sqrt()
    assert ((drawn - exact).abs() <= 5 * deviation + 1 / count).all()


def test_fade_is_the_sum_of_both_divergences_per_token():
    ways = [[[(2.0, 4), (1.0, 2)], [(0.0, 3), (3.0, 3)]], [[(1.0, 1), (1.0, 4)], [(-1.0, 2), (2.0, 2)]]]
    first = (3 / 6 + 3 / 6) / 2
    second = (2 / 5 + 1 / 4) / 2
    found = fade_of(ways)
    assert found.value == pytest.approx(first + second)
    assert found.by_samples[1] == pytest.approx((2 / 4 + 0) / 2 + (1 - 0.5) / 2)
    assert found.by_samples[2] == found.value
    alone = [(1 / 2 + 3 / 3) / 2 + (1 / 4 + 2 / 2) / 2, found.by_samples[1]]
    center = sum(alone) / 2
    assert found.error == pytest.approx(math.sqrt(sum((value - center) ** 2 for value in alone) / 2))
    assert found.questions == 2
    assert fade_of([[way[0][:1]] for way in ways]).error is None
    assert list(fade_of([[[(0.1 * i, 1) for i in range(6)]]] * 2).by_samples) == [1, 2, 4, 6]
    with pytest.raises(rocr.RocrError, match="FADE is not a finite number"):
        fade_of([[[(math.inf, 1)]], [[(0.0, 1)]]])


def test_fade_comes_near_to_the_divergence_that_is_summed_over_all_tokens(model, make_model, tokenizer):
    """With continuations of one token, the exact divergence is a sum over the vocabulary."""
    other = make_model("Llama", seed=1, initializer_range=0.1)
    options = FadeOptions(samples=600, tokens=1)
    measure = FadeMeasure.of(model, tokenizer, PROBES[:1], ["Blaise Pascal"], options)
    style = PromptStyle.of(model)
    found = measure.finish(model, measure.observe(other, style))["Blaise Pascal"]
    (prompt,), (asked,) = measure.prompts(PROBES[:1], style), measure.references[0].prompts
    assert "Blaise Pascal" in tokenizer.decode(asked) and "Ada Byron" in tokenizer.decode(prompt)
    with torch.no_grad():
        p = other(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        q = model(torch.tensor([asked])).logits[0, -1].double().log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum())
    assert found.error < 0.1 * exact
    assert abs(found.value - exact) < 4 * found.error


def test_fade_of_the_unedited_model_about_the_target_itself_is_zero(model, tokenizer):
    measure = FadeMeasure.of(model, tokenizer, PROBES, ["Ada Byron", "rain"], FadeOptions(samples=3, tokens=4))
    assert len(measure.probes) == 2, "a question without the name is left out"
    found = measure.finish(model, measure.observe(model, PromptStyle.of(model)))
    assert found["Ada Byron"].value == pytest.approx(0, abs=1e-5)
    assert found["rain"].value > 0.01
    assert list(found["rain"].by_samples) == [1, 2, 3]
    instructed = replace(PromptStyle.of(model), prefix=lambda _: "Forget it. ")
    assert measure.finish(model, measure.observe(model, instructed))["Ada Byron"].value > 0.01
    with pytest.raises(rocr.InputError, match="hold the target's name"):
        FadeMeasure.of(model, tokenizer, PROBES[2:], ["rain"])
    with pytest.raises(rocr.InputError, match="at least 1 sample"):
        FadeMeasure.of(model, tokenizer, PROBES, ["rain"], FadeOptions(samples=0))
    assert end_tokens(model, tokenizer) == {1}


def items(*values):
    return [
        ItemScore(probe, subject, form, "forget", score, 0, 0, chance=chance)
        for probe, subject, form, score, chance in values
    ]


def test_the_worst_case_of_each_fact():
    evaluation = Evaluation(
        items(
            (0, "A", "qa", 0.1, None), (0, "A", "fb", 0.4, None), (0, "A", "mcp", 0.25, 0.25),
            (1, "A", "qa", 0.0, None), (1, "A", "mcp", 0.85, 0.25), (1, "A", "mcp", 0.55, 0.25),
            (2, "B", "qa", 0.0, None), (2, "B", "mcp", 0.1, 0.25),
        ),
        3,
    )  # fmt: skip
    a, b = (0.4 + (0.8 + 0.4) / 2) / 2, 0.0
    assert evaluation.worst_case() == pytest.approx((a + b) / 2)
    assert evaluation.worst_case("retain") is None
    assert evaluation.to_json()["worst_case"] == evaluation.worst_case()
    assert knowledge(evaluation) == pytest.approx((0.025 + 0.4 + ((0.25 + 0.85 + 0.55) / 3 / 2 + 0.1 / 2 - 0.25)) / 3)


def test_the_share_that_stays_forgotten():
    assert kept_share(0.8, 0.2, 0.5) == pytest.approx(0.5)
    assert kept_share(0.8, 0.2, 0.2) == pytest.approx(1.0)
    assert kept_share(0.8, 0.78, 0.8) is None
    assert kept_share(0.0, 0.0, 0.0) is None


def test_tuning_teaches_and_leaves_nothing(model, weights_of):
    before = weights_of(model)
    example = Example((5, 6, 7), (8, 9))
    first = by_hand(model, example.prompt, example.answer)
    reports = []
    with tuned(model, [example], 8, progress=reports.append):
        assert by_hand(model, example.prompt, example.answer) > first
    assert [report.done for report in reports] == list(range(1, 9))
    assert by_hand(model, example.prompt, example.answer) == first
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    with pytest.raises(rocr.InputError, match="no linear modules"), tuned(nn.Linear(2, 2), [example], 1):
        pass


def test_the_table_shows_the_reference_of_each_method():
    evaluation = Evaluation(items((0, "A", "qa", 0.2, None)), 1)
    fades = {"rain": Fade(2.0, 0.3, {1: 2.0}, 1), "snow": Fade(5.0, 0.4, {1: 5.0}, 1)}
    results = [
        MethodResult("rocr", "A", evaluation, 1.0, 1, fades, "rain", evaluation, 0.75),
        MethodResult("rocr", "B", evaluation, 1.0, 1, fades, "snow", evaluation, None),
        MethodResult("UniErase", "A", evaluation, 1.0, 1),
    ]
    headings, rows = robustness_table(results)
    assert headings == ("method", "worst case", "FADE", "kept")
    assert rows == [("rocr", "0.200", "3.50 ± 0.25", "75%"), ("UniErase", "0.200", "", "")]
    first, _, last = results_json(results)
    assert first["fade"]["snow"]["value"] == 5.0 and first["reference"] == "rain" and first["kept"] == 0.75
    assert "fade" not in last and "relearned" not in last
