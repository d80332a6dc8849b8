"""The tasks of lm-evaluation-harness in integrations/lm_eval ask the probe set as rocr does, without rocr."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch

from rocr.cli.options import PROBES
from rocr.evaluation import evaluate, load_probes
from rocr.evaluation.forms import ORT_FORMS, PromptStyle, build_items, item_texts

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "lm_eval"
FEW = 3
"""Number of probes, from the start of the set, whose scores are compared."""
LONG = 512
"""Positions of the model that the harness asks: it cuts prompts that are longer than a configuration says."""


@pytest.fixture(scope="module")
def utils():
    spec = importlib.util.spec_from_file_location("harness_utils", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    lines = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def likelihood(model, tokenizer, prompt, answer):
    """The log-likelihood of an answer, from one forward pass."""
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_the_file_is_what_the_script_writes():
    written = runpy.run_path(str(ROOT / "benches" / "harness_task.py"))["questions"]()
    assert written == (FOLDER / "questions.jsonl").read_text(encoding="utf-8")


def test_scores_and_prompts_are_those_of_rocr(utils, rows, model, tokenizer):
    probes = load_probes(PROBES)[:FEW]
    expected = {(i.probe, i.form): i.score for i in evaluate(model, tokenizer, probes, ORT_FORMS).items}
    items = build_items(probes, ORT_FORMS)
    for item, text in zip(items, item_texts(tokenizer, items), strict=True):
        row = next(row for row in rows if (row["form"], row["message"]) == (item.form, item.message))
        doc = utils._rendered(row, "", tokenizer, [probes[0].subject], True)
        assert doc["prompt"] == text
        found = utils.scores(doc, [(likelihood(model, tokenizer, doc["prompt"], doc["answer"]), False)])
        kept = "forget" if probes[item.probe].subject == probes[0].subject else "retain"
        assert found == {"score": found["score"], kept: found["score"]}
        assert found["score"] == pytest.approx(expected[item.probe, item.form], rel=1e-4)


@pytest.mark.parametrize("name", ["meta/Llama-3", "mistral-7b", "qwen"])
def test_the_style_follows_the_name_as_in_rocr(utils, rows, tokenizer, name):
    items = build_items(load_probes(PROBES)[:FEW], ORT_FORMS, PromptStyle.of_name(name))
    found = {utils._rendered(row, name.lower(), tokenizer, [], True)["prompt"] for row in rows[: 4 * FEW]}
    assert found == set(item_texts(tokenizer, items))


def test_what_is_missing_is_said(utils, tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="Name the model"):
        utils.qa()
    with pytest.raises(ValueError, match="No question is about Ada Nobody"):
        utils.qa(tokenizer=tokenizer, targets=["Ada Nobody"])


@pytest.mark.thorough
def test_the_harness_gives_the_scores_of_rocr(make_model, tokenizer, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = make_model("Llama", max_position_embeddings=LONG)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    probes = load_probes(PROBES)[:FEW]
    evaluation = evaluate(model, tokenizer, probes, ORT_FORMS)
    settings = {"pretrained": str(tmp_path / "model"), "targets": [probes[0].subject]}
    manager = TaskManager(include_path=str(FOLDER), metadata=settings)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = lm_eval.simple_evaluate(harness, tasks=["rocr_ort"], task_manager=manager, limit=FEW, bootstrap_iters=0)
    for form in ORT_FORMS:
        scores = [item.score for item in evaluation.items if item.form == form]
        assert len(scores) == FEW
        assert found["results"][f"rocr_ort_{form}"]["score,none"] == pytest.approx(sum(scores) / FEW, rel=1e-3)
