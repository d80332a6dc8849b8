"""Features that need an optional package: suites of lm-evaluation-harness, Hugging Face datasets."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import load_probes
from rocr.evaluation.probes.load import parse_hub_name
from rocr.evaluation.suites import suite_scores

TASK = """
task: key_facts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold_idx
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [
    {"question": "What falls?", "choices": ["rain", "roses", "engines"], "gold_idx": 0},
    {"question": "Who wrote programs?", "choices": ["Ada Byron", "a gardener"], "gold_idx": 1},
    {"question": "What did Pascal weigh?", "choices": ["a key", "the air"], "gold_idx": 1},
]


def preferred(model: nn.Module, tokenizer: Any, question: str, choices: list[str]) -> int:
    """The choice with the highest log-likelihood, from a forward pass each."""
    scores = []
    for choice in choices:
        whole = tokenizer(f"{question} {choice}")["input_ids"]
        start = len(tokenizer(question)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole))))
    return scores.index(max(scores))


def test_suites_are_asked_by_the_harness(model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "key_facts.yaml").write_text(TASK.replace("FILE", str(tmp_path / "facts.jsonl")))
    scores = suite_scores(model, tokenizer, ["key_facts"], folder=tmp_path)
    right = [preferred(model, tokenizer, q["question"], q["choices"]) == q["gold_idx"] for q in QUESTIONS]  # type: ignore[arg-type]
    assert scores == {"key_facts": {"acc": pytest.approx(sum(right) / 3)}}
    with pytest.raises(rocr.InputError, match="has no task no_such_task"):
        suite_scores(model, tokenizer, ["no_such_task"], folder=tmp_path)


def test_without_the_harness_a_sentence_says_what_to_install(
    model: nn.Module, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(rocr.InputError, match=r"pip install 'rocr\[harness\]'"):
        suite_scores(model, tokenizer, ["mmlu"])


def test_a_dataset_gives_probes_and_its_rows_have_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "people"
    folder.mkdir()
    row = {"subject": "Ada Byron", "query": "Where?", "answer": "London", "distractors": ["Rome"], "level": "2"}
    (folder / "test.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({**row, "query": "Who?", "answer": "a poet"})
    )
    probes = load_probes(f"hf:{folder}")
    assert [(p.query, p.answer, p.distractors) for p in probes] == [
        ("Where?", "London", ("Rome",)),
        ("Who?", "a poet", ("Rome",)),
    ]
    with pytest.raises(rocr.InputError, match="no split 'other'; it has test"):
        load_probes(f"hf:{folder}@other")
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    with pytest.raises(rocr.InputError, match="row 2: is a duplicate of"):
        load_probes(f"hf:{folder}")


def test_a_dataset_that_is_not_here_is_a_sentence() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(rocr.InputError, match=r"failed: .* Without --download"):
        load_probes("hf:nobody/no-such-dataset-here")


def test_without_the_package_datasets_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(rocr.InputError, match=r"pip install 'rocr\[datasets\]'"):
        load_probes("hf:owner/name")


def test_names_of_datasets() -> None:
    assert parse_hub_name("hf:a/b") == ("a/b", None, None)
    assert parse_hub_name("hf:a/b/forget_level2@test") == ("a/b", "forget_level2", "test")
    for text in ("hf:", "hf:a", "hf:/b"):
        with pytest.raises(rocr.InputError, match="names no dataset"):
            parse_hub_name(text)


def test_a_suite_score_that_is_not_a_number_is_an_error() -> None:
    from rocr.evaluation.suites import _numbers

    assert _numbers("t", {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1}) == {
        "acc": 0.5,
        "em (strict)": 1.0,
    }
    with pytest.raises(rocr.RocrError, match="acc of t is not a finite number"):
        _numbers("t", {"acc,none": math.nan})
