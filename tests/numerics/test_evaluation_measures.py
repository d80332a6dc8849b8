import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import EvaluateOptions, Probe, evaluate
from rocr.evaluation.measures import (
    ChoiceQuestion,
    TextSample,
    choice_accuracy,
    contains,
    divergence,
    free_answers,
    load_choice_questions,
    measures_of_answers,
    ngram_entropy,
    perplexity,
)
from rocr.evaluation.neighbours import name_states, nearest_subjects
from rocr.model.generate import ask

PROBE = Probe("Ada Byron", "Where was Ada Byron born?", "London")


def log_probabilities(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits.double().log_softmax(dim=-1)


def test_perplexity_is_that_of_the_definition(model: nn.Module, tokenizer: Any, texts: list[str]) -> None:
    sample = TextSample.take(texts, tokenizer, tokens=150, length=63)
    assert sample.tokens.shape == (3, 63)
    logits = log_probabilities(model, sample.tokens)[:, :-1]
    nll = -logits.gather(-1, sample.tokens[:, 1:, None]).mean()
    for batch in (1, 2, 8):
        assert perplexity(model, sample, batch) == pytest.approx(math.exp(float(nll)), rel=1e-5)
    with pytest.raises(rocr.InputError, match="fewer than 512 tokens"):
        TextSample.take(["short"], tokenizer)


def test_perplexity_that_is_not_a_number_is_an_error(model: nn.Module) -> None:
    with torch.no_grad():
        next(iter(model.parameters()))[7] = float("nan")
    with pytest.raises(rocr.RocrError, match="not a finite number"):
        perplexity(model, TextSample(torch.tensor([[5, 7, 8]])))


def test_divergence_is_that_of_the_definition_and_nothing_without_a_change(
    model: nn.Module, tokenizer: Any, texts: list[str]
) -> None:
    sample = TextSample.take(texts, tokenizer, tokens=100, length=20)
    weight = next(iter(model.parameters()))
    change = torch.randn_like(weight) * 0.1

    @contextmanager
    def without_change() -> Iterator[None]:
        weight.data.sub_(change)
        yield
        weight.data.add_(change)

    then = log_probabilities(model, sample.tokens)
    weight.data.add_(change)
    now = log_probabilities(model, sample.tokens)
    wanted = float((then.exp() * (then - now)).sum(dim=-1).mean())
    assert wanted > 1e-3
    assert divergence(model, sample, without_change, batch=2) == pytest.approx(wanted, rel=1e-3)
    sample = TextSample(sample.tokens[:1])
    change.zero_()
    assert divergence(model, sample, without_change) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        ("a a a a a", 0.0),
        ("", 0.0),
        ("a b c d e", (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2),
        ("a b a b a", (2 / 3 * 1 + 4 / 3 * -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))) / 2),
    ],
)
def test_entropy_of_ngrams_by_hand(words: str, bits: float) -> None:
    assert ngram_entropy(words.split()) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("He was born in LONDON.", "London", True),
        ("Londonderry", "London", False),
        ("Málaga, Spain", "malaga", True),
        ("the I-Have a dream!", "I Have a Dream", True),
        ("", "x", False),
        ("anything", "?", False),
    ],
)
def test_an_answer_is_contained_as_whole_words(text: str, answer: str, found: bool) -> None:
    assert contains(text, answer) is found


def test_containment_is_measured_on_what_the_model_writes(model: nn.Module, tokenizer: Any) -> None:
    written = ask(model, tokenizer, [PROBE.query], 48)[0]
    word = next(word for word in "".join(c if c.isalnum() else " " for c in written).split() if word)
    right = Probe("Ada Byron", PROBE.query, word)
    wrong = Probe("Rain", PROBE.query, "zzzz", split="retain")
    answers = free_answers(model, tokenizer, {4: wrong, 2: right})
    assert [(a.probe, a.text, a.contained) for a in answers] == [(2, written, True), (4, written, False)]
    measures = measures_of_answers(answers)
    assert (measures["contained forget"], measures["contained retain"]) == (1.0, 0.0)
    assert measures["n-gram entropy"] == pytest.approx(ngram_entropy(written.split()))


def test_utility_counts_the_letters_that_the_model_prefers(model: nn.Module, tokenizer: Any) -> None:
    choices = ("rain", "roses", "engines")
    questions = [ChoiceQuestion("What falls?", choices, correct) for correct in range(3)]
    accuracy = choice_accuracy(model, tokenizer, questions, 512)
    assert accuracy == {"accuracy": pytest.approx(1 / 3), "chance": pytest.approx(1 / 3), "questions": 3}
    preferred = [choice_accuracy(model, tokenizer, [question], 512)["accuracy"] for question in questions]
    assert sorted(preferred) == [0, 0, 1]


def test_utility_files_report_every_line(tmp_path: Path) -> None:
    good = {"id": "x", "question": "What falls?", "choices": ["rain", "roses"], "gold_idx": 0}
    path = tmp_path / "utility.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert load_choice_questions(path) == [ChoiceQuestion("What falls?", ("rain", "roses"), 0)]
    bad = [{**good, "gold_idx": 2}, {**good, "choices": ["rain"]}, {"question": "What?"}, 3, {**good, "question": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(rocr.InputError) as error:
        load_choice_questions(path)
    assert [line.split(":")[1] for line in str(error.value).split("\n")] == ["1", "2", "3", "4", "5"]


def test_the_nearest_subject_is_the_one_with_the_likest_state(model: nn.Module, tokenizer: Any) -> None:
    names = ["Ada Byron", "Blaise Pascal", "Robert Downey Jr.", "Æsop", "rain"]
    states = name_states(model, tokenizer, names).double()
    centred = states - states.mean(dim=0)
    cosines = {
        name: float(row @ centred[0] / row.norm() / centred[0].norm()) for name, row in zip(names, centred, strict=True)
    }
    found = nearest_subjects(model, tokenizer, "Ada Byron", names, count=2)
    best = sorted(names[1:], key=lambda name: -cosines[name])[:2]
    assert [name for name, _ in found] == best
    assert [cosine for _, cosine in found] == pytest.approx([cosines[name] for name in best], abs=1e-4)
    with pytest.raises(rocr.InputError, match="too few"):
        nearest_subjects(model, tokenizer, "Ada Byron", ["Ada Byron", "rain"])


def test_measures_that_are_asked_for_are_in_the_evaluation(model: nn.Module, tokenizer: Any, texts: list[str]) -> None:
    options = EvaluateOptions(
        generate=True,
        text=TextSample.take(texts, tokenizer, tokens=40, length=20),
        utility=[ChoiceQuestion("What falls?", ("rain", "roses"), 0)],
    )
    measures = evaluate(model, tokenizer, [PROBE], ["qa"], options=options).measures
    assert set(measures) == {"contained forget", "n-gram entropy", "perplexity", "utility"}
