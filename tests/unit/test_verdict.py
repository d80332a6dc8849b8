"""Intervals, and what an evaluation says in words."""

import math

import pytest
import torch

from rocr.evaluation import Evaluation
from rocr.evaluation.bootstrap import interval
from rocr.evaluation.scores import ItemScore
from rocr.evaluation.verdict import judge


def first(means: torch.Tensor) -> torch.Tensor:
    return means[:, 0]


def test_an_interval_of_few_subjects_is_exact() -> None:
    both = interval([[0.0], [1.0]], first)
    assert both is not None and (both.low, both.high, both.subjects) == (0.0, 1.0, 2)
    # The sum of the drawn ones of one 5 among five subjects is 5 Binomial(5, 1/5): P(<= 2) = 0.942, P(<= 3) = 0.993.
    one = interval([[0.0], [0.0], [0.0], [0.0], [5.0]], first)
    assert one is not None and (one.low, one.high) == (0.0, 3.0)
    assert interval([[0.5]], first) is None


def test_a_sampled_interval_is_near_the_exact_one_and_is_seeded() -> None:
    rows = [[value] for value in (0.1, 0.35, 0.5, 0.62, 0.9)]
    exact, sampled = interval(rows, first), interval(rows, first, seed=1, most_exact=0)
    assert exact is not None and sampled is not None
    assert abs(exact.low - sampled.low) < 0.03 and abs(exact.high - sampled.high) < 0.03
    assert sampled == interval(rows, first, seed=1, most_exact=0) != interval(rows, first, seed=2, most_exact=0)


def test_the_interval_of_a_mean_of_many_is_that_of_the_normal_distribution() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = interval([[float(value)] for value in values], first)
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert (found.high + found.low) / 2 == pytest.approx(float(values.mean()), abs=0.1 * half)


def test_a_statistic_that_is_often_undefined_has_no_interval() -> None:
    assert interval([[0.0], [1.0]], lambda means: torch.where(means[:, 0] > 0, means[:, 0], torch.nan)) is None


def items(split: str, form: str, scores: dict[str, list[float]], chance: float | None = None) -> list[ItemScore]:
    return [
        ItemScore(probe, subject, form, split, score, 0.0, 0.0, chance=chance)
        for subject, values in scores.items()
        for probe, score in enumerate(values)
    ]


BEFORE = [
    *items("forget", "qa", {"Ada": [0.8, 0.6], "Bo": [0.5]}),
    *items("forget", "mcp", {"Ada": [0.3, 0.28], "Bo": [0.27]}, chance=0.25),
    *items("retain", "qa", {"Cy": [0.5], "Di": [0.5]}),
]
AFTER = [
    *items("forget", "qa", {"Ada": [0.1, 0.1], "Bo": [0.3]}),
    *items("forget", "mcp", {"Ada": [0.3, 0.28], "Bo": [0.27]}, chance=0.25),
    *items("retain", "qa", {"Cy": [0.4], "Di": [0.3]}),
]


def test_the_sentence_says_what_is_gone_what_it_cost_and_how_sure_that_is() -> None:
    before = Evaluation(BEFORE, 5, measures={"contained retain": 0.33, "perplexity": 10.0, "contained forget": 0.5})
    after = Evaluation(AFTER, 5, measures={"contained retain": 0.19, "perplexity": 10.2, "contained forget": 0.1})
    verdict = judge(after, before)
    # qa: before (0.7 + 0.5) / 2, after (0.1 + 0.3) / 2; Ada alone loses 6/7, Bo 2/5.
    assert verdict.sentence == (
        "2 concepts: 67% of what the model knew in QA is gone (95% interval 40% to 86%); "
        "multiple choice says nothing here: the model was at chance before (0.28 where chance is 0.25); "
        "of what it knew about 2 other subjects at most 30% is lost, in QA (95% interval 20% to 40%); "
        "intervals over 2 concepts are rough."
    )
    silent = verdict.of("mcp", "forget")
    assert silent is not None and not silent.known and silent.interval is None
    assert [(alarm.name, alarm.before, alarm.after) for alarm in verdict.alarms] == [
        ("retain qa", 0.5, 0.35),
        ("contained retain", 0.33, 0.19),
    ]
    assert "fell from 0.33 to 0.19, by 42%" in verdict.alarms[1].sentence
    assert "--key-tokens last" in verdict.next_step


def test_a_choice_that_is_not_surely_above_chance_is_not_counted() -> None:
    wide = Evaluation(items("forget", "mcp", {"A": [0.9], "B": [0.1], "C": [0.1]}, chance=0.25), 3)
    sure = Evaluation(items("forget", "mcp", {"A": [0.9], "B": [0.6], "C": [0.5]}, chance=0.25), 3)
    assert [judge(found, found).judgements[0].known for found in (wide, sure)] == [False, True]


def test_the_next_step_follows_from_the_numbers() -> None:
    old = Evaluation(items("forget", "qa", {"A": [0.8], "B": [0.8]}), 2)

    def step(score: float) -> str:
        return judge(Evaluation(items("forget", "qa", {"A": [score], "B": [score]}), 2), old).next_step

    assert "redirect" in step(0.6) and "--attacks all" in step(0.1)
    nothing = Evaluation(items("forget", "qa", {"A": [0.01], "B": [0.0]}), 2)
    assert "knew nothing" in judge(nothing, nothing).sentence and "--probes" in judge(nothing, nothing).next_step
    alone = judge(old)
    assert alone.sentence.startswith("No edit: of 2 subjects") and "--edit" in alone.next_step


def test_one_concept_has_no_interval_and_the_sentence_says_so() -> None:
    old, new = (Evaluation(items("forget", "qa", {"A": [score]}), 1) for score in (0.8, 0.2))
    sentence = judge(new, old).sentence
    assert "1 concept: 75%" in sentence and "no interval" in sentence and "cost is not measured" in sentence
