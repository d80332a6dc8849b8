import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import EvaluateOptions, Evaluation, Probe, compare_evaluations, evaluate
from rocr.evaluation.baselines.methods import MethodResult
from rocr.evaluation.baselines.tables import forget_table, retain_table
from rocr.evaluation.forms import build_items
from rocr.evaluation.report import measure_rows, report_json, score_table, table_rows, write_json
from rocr.evaluation.scores import ItemScore, mean, relative_fall
from rocr.model.chat import render_chat

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London", ("Paris", "Rome", "Oslo"), cloze="Ada is from ___."),
    Probe("Ada Byron", "What did Ada Byron write?", "programs", ("operas", "poems", "laws")),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air", ("gold", "salt", "a key"), split="retain"),
]
ROUNDING = 1e-5


def probability(model: nn.Module, tokenizer: Any, message: str, suffix: str, answer: str) -> float:
    """exp(-mean NLL) of an answer, from one unbatched forward pass."""
    prompt = tokenizer(render_chat(tokenizer, message) + suffix, add_special_tokens=False)["input_ids"]
    target = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + target])).logits[0].double().log_softmax(dim=-1)
    nll = [-float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(target)]
    return math.exp(-sum(nll) / len(nll))


def score(subject: str, form: str, value: float, probe: int = 0, split: str = "forget") -> ItemScore:
    chance = 0.25 if form == "mcp" else None
    return ItemScore(probe, subject, form, split, value, 0.5, 0.0, None, False, chance)


def test_every_form_scores_the_answer_as_a_forward_pass_by_hand(model: nn.Module, tokenizer: Any) -> None:
    evaluation = evaluate(model, tokenizer, PROBES)
    assert len(evaluation.items) == 12
    question = "Question: Where was Ada Byron born?\n"
    cloze = "Please complete the blank in the following question.\nQuestion: Ada is from ___.\n"
    by_hand = {
        "qa": (f"Please briefly answer the following question.\n{question}", "Answer:", " London"),
        "fb": (cloze, "Answer:", " London"),
        "subtoken": (build_items(PROBES, ["subtoken"])[0].message, "Answer:\n", "L\no\nn\nd\no\nn\n"),
    }
    for form, (message, suffix, answer) in by_hand.items():
        item = evaluation.select(form, "forget")[0]
        assert item.score == pytest.approx(probability(model, tokenizer, message, suffix, answer), abs=ROUNDING)
    choice = build_items(PROBES, ["mcp"])[0]
    letters = [probability(model, tokenizer, choice.message, "Answer:", f" {letter}") for letter in "ABCD"]
    item = evaluation.select("mcp", "forget")[0]
    assert item.score == pytest.approx(letters[choice.correct], abs=ROUNDING)
    assert item.choice == pytest.approx(letters[choice.correct] / sum(letters), abs=ROUNDING)


def test_means_are_over_a_targets_items_and_then_over_targets() -> None:
    items = [score("a", "qa", 0.2), score("a", "qa", 0.4), score("a", "qa", 0.6), score("b", "qa", 0.8)]
    items += [score("c", "qa", 0.9, split="retain"), score("a", "mcp", 0.75), score("b", "fb", 0.9)]
    evaluation = Evaluation(items, 4)
    form = evaluation.form_score("qa", "forget")
    assert form is not None and form.score == pytest.approx(0.6) and (form.items, form.targets) == (4, 2)
    retain = evaluation.form_score("qa", "retain")
    assert retain is not None and retain.score == 0.9
    assert evaluation.form_score("fb", "retain") is None
    assert evaluation.worst() == {"a": ("qa", pytest.approx(0.4)), "b": ("fb", 0.9)}
    assert evaluation.worst_score() == pytest.approx(0.65)


def test_a_mean_hides_no_score_that_is_not_a_number() -> None:
    with pytest.raises(rocr.RocrError, match="1 of 2 scores are not finite numbers"):
        mean([0.5, float("nan")])
    with pytest.raises(rocr.RocrError):
        Evaluation([score("a", "qa", float("nan"))], 1).form_score("qa", "forget")


def test_only_known_probes_count() -> None:
    items = [score("a", "mcp", 0.9, 0), score("a", "mcp", 0.3, 0), score("a", "qa", 0.1, 0)]
    items += [score("a", "mcp", 0.2, 1), score("a", "qa", 0.9, 1), score("b", "qa", 0.7, 2), score("b", "fb", 0.1, 2)]
    evaluation = Evaluation(items, 3)
    assert evaluation.known_probes(0.5) == {0, 2}, "multiple choice decides where there is any"
    kept = evaluation.restricted({0, 2}, 0.5)
    assert (len(kept.items), kept.probes, kept.known) == (5, 3, 2)
    with pytest.raises(rocr.InputError, match="knows none of the 3 probes"):
        evaluation.restricted(set(), 0.5)


def test_the_filter_looks_at_the_base_model(model: nn.Module, tokenizer: Any) -> None:
    base = evaluate(model, tokenizer, PROBES, ["qa"])
    best = max(base.items[:2], key=lambda item: item.score)
    threshold = best.score * 0.999
    kept = evaluate(model, tokenizer, PROBES, ["qa"], known=threshold, base=base)
    assert best.probe in {item.probe for item in kept.items} and kept.known_threshold == threshold
    with pytest.raises(rocr.InputError, match="knows none"):
        evaluate(model, tokenizer, PROBES, ["qa"], known=1.0)
    with pytest.raises(rocr.InputError, match="between 0 and 1"):
        evaluate(model, tokenizer, PROBES, ["qa"], known=2.0)


def test_changes_are_shares_of_what_was_known_above_chance() -> None:
    before = Evaluation([score("a", "mcp", 0.85), score("a", "qa", 0.5), score("b", "qa", 0.4, split="retain")], 2)
    after = Evaluation([score("a", "mcp", 0.40), score("a", "qa", 0.1), score("b", "qa", 0.3, split="retain")], 2)
    falls = {(c.form, c.split): c.fall for c in compare_evaluations(before, after).changes}
    assert falls == {
        ("mcp", "forget"): pytest.approx(0.75),
        ("qa", "forget"): pytest.approx(0.8),
        ("qa", "retain"): pytest.approx(0.25),
    }
    assert relative_fall(0.2, 0.1, chance=0.25) == 0
    with pytest.raises(rocr.InputError, match="different items"):
        compare_evaluations(before, Evaluation(after.items[:2], 2))


def test_an_edit_lowers_nothing_but_what_it_should_be_compared_with(
    model: nn.Module, tokenizer: Any, statistics: rocr.Statistics, concepts: list[rocr.Concept]
) -> None:
    before = evaluate(model, tokenizer, PROBES, targets=["Ada Byron"])
    edit = rocr.unlearn(model, tokenizer, concepts, statistics)
    changed = evaluate(model, tokenizer, PROBES, targets=["Ada Byron"])
    edit.revert(model)
    assert [item.score for item in changed.items] != [item.score for item in before.items]
    assert evaluate(model, tokenizer, PROBES, targets=["Ada Byron"]).items == before.items


def test_an_interrupted_evaluation_goes_on_to_the_same_scores(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    whole = evaluate(model, tokenizer, PROBES, options=EvaluateOptions(token_budget=1))
    journal = tmp_path / "journal.jsonl"
    options = EvaluateOptions(token_budget=1, journal=journal)

    def interrupt(step: rocr.Progress) -> None:
        if step.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, PROBES, options=options, progress=interrupt)
    with journal.open("a") as file:
        file.write("[7, [[0.1")  # what a killed process may leave
    steps: list[int] = []
    resumed = evaluate(model, tokenizer, PROBES, options=options, progress=lambda step: steps.append(step.done))
    assert steps[0] == 6 and resumed.items == whole.items
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-3)
    with pytest.raises(rocr.InputError, match="of another evaluation"):
        evaluate(model, tokenizer, PROBES, options=options)
    journal.write_text("notes of mine\n")
    with pytest.raises(rocr.InputError, match="of another evaluation"):
        evaluate(model, tokenizer, PROBES, options=options)
    assert journal.read_text() == "notes of mine\n"


def test_the_report_has_every_score_its_texts_and_a_verdict(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    before = evaluate(model, tokenizer, PROBES, ["qa", "mcp", "subtoken"], options=EvaluateOptions(generate=True))
    before.items = [replace(item, score=0.8) for item in before.items]
    after = replace(
        before, items=[replace(item, score=item.score / 2) for item in before.items], measures={"perplexity": 12.0}
    )
    write_json(report_json(after, before), tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["comparison"]["changes"][0]["fall"] == pytest.approx(0.5)
    assert document["evaluation"]["forms"]["forget"]["qa"]["items"] == 2
    assert document["verdict"]["sentence"].startswith("1 concept: 50% of what the model knew in QA is gone")
    assert "question" not in document["evaluation"]["items"][0]
    first, second, third = document["questions"][:3]
    assert first["question"].endswith("Question: Where was Ada Byron born?\n") and first["answer"] == "London"
    assert second["answer"] in "ABCD" and f"{second['answer']}. London" in second["question"]
    assert third["form"] == "subtoken" and third["answer"] == "London"
    answers = document["evaluation"]["answers"]
    assert [(a["probe"], a["question"], a["answer"]) for a in answers] == [
        (i, probe.query, probe.answer) for i, probe in enumerate(PROBES)
    ]
    assert all(a["text"] for a in answers)
    rows = table_rows(after, before)
    assert [row[0] for row in rows] == ["forget"] * 4 + ["retain"] * 3
    assert [row[1] for row in rows][:4] == ["qa", "mcp", "subtoken", "worst form of each target"]
    alone, shown = score_table(after)
    assert alone == ("split", "form", "score", "chance", "questions", "targets") and len(shown) == 7
    assert measure_rows(after, before) == [("perplexity", "", "12")]


def test_the_tables_of_a_comparison_hold_means_over_targets_and_the_largest_peak() -> None:
    def result(method: str, target: str, forget: float, retain: float, seconds: float, peak: int) -> MethodResult:
        items = [score(target, "qa", forget), score(target, "fb", forget / 2), score("c", "qa", retain, split="retain")]
        return MethodResult(method, target, Evaluation(items, 3), seconds, peak)

    results = [result("rocr", "a", 0.2, 0.5, 1.0, 10**9), result("rocr", "b", 0.4, 0.7, 2.0, 3 * 10**9)]
    results.append(result("original", "a", 0.8, 0.9, 0.0, 10**9))
    columns, rows = forget_table(results, ["qa", "fb"])
    assert columns == ("method", "qa", "fb", "worst form")
    assert rows == [("rocr", "0.300", "0.150", "0.300"), ("original", "0.800", "0.400", "0.800")]
    columns, rows = retain_table(results, ["qa", "fb"])
    assert columns == ("method", "qa", "fb", "seconds", "peak GB")
    assert rows == [("rocr", "0.600", "", "1.5", "3.00"), ("original", "0.900", "", "0.0", "1.00")]


def test_a_model_evaluates_alike_whatever_the_padding_side(
    model: nn.Module, make_tokenizer: Callable[..., Any]
) -> None:
    left, right = (evaluate(model, make_tokenizer(padding_side=side), PROBES) for side in ("left", "right"))
    assert left.items == right.items
