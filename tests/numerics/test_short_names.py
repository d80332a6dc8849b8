"""Beginnings that stand for a whole name are found by what a model predicts, and moved the full distance."""

from __future__ import annotations

from itertools import count

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.edit import short_names as module
from rocr.edit.automatic_redirects import BEGINNINGS
from rocr.edit.guards import Guards
from rocr.edit.short_names import MAX_CONCEPTS, SENTENCES, short_name_keys, short_names
from rocr.keys.plan import plan_keys
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind

ADA = Concept("Ada Byron Lovelace", "rain")
CONFIG = EditConfig(templates=("Who is {}?",), variants="none")


@pytest.fixture
def architecture(make_model):
    """A model whose predictions about names differ."""
    model = make_model("Llama")
    model.lm_head.weight.data *= 30
    return with_kind(find_architecture(model), 2)


@torch.no_grad()
def predictions(model, tokenizer, name):
    """Float64 probabilities after each sentence, one by one."""
    texts = [sentence.format(name) for sentence in BEGINNINGS["person"][:SENTENCES]]
    rows = [model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1] for text in texts]
    return torch.stack(rows).double().softmax(-1)


def variation(one, other):
    return float((one - other).abs().sum(dim=1).mean() / 2)


def test_a_beginning_is_nearer_to_the_name_than_half_of_what_the_redirect_is(architecture, make_tokenizer):
    tokenizer, model = make_tokenizer(), architecture.model
    whole = predictions(model, tokenizer, ADA.name)
    apart = variation(whole, predictions(model, tokenizer, ADA.redirect))
    words = ["Ada", "Ada Byron", "Robert", "the sun", "Ada Byron Lovelac", "ada Byron Lovelace", ADA.name]
    shares = {word: 1 - variation(whole, predictions(model, tokenizer, word)) / apart for word in words}
    expected = [word for word in words if shares[word] >= 0.5]
    assert expected[-1] == ADA.name and len(expected) < len(words)
    assert min(abs(share - 0.5) for share in shares.values()) > 1e-3, "rounding decides nothing"
    assert short_names(architecture, tokenizer, ADA, words) == expected


def test_a_model_that_predicts_alike_of_all_names_has_none(architecture, make_tokenizer):
    architecture.model.lm_head.weight.data.zero_()
    assert short_names(architecture, make_tokenizer(), ADA, ["Ada", ADA.name]) == []


def test_the_keys_are_those_of_whole_words_that_are_asked_about(architecture, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(module, "short_names", lambda _model, _tokenizer, _concept, beginnings: list(beginnings))
    plan = plan_keys(tokenizer, [ADA, Concept("Pascal", "rain")], CONFIG)
    reading = plan.keys

    def texts(among, concepts):
        flags = short_name_keys(architecture, tokenizer, reading, plan.concept_of, concepts, among)
        assert len(flags) == reading.groups
        read = dict(zip(reading.group_of, zip(reading.prompt_of, reading.position_of, strict=True), strict=True))
        found = []
        for key, flag in enumerate(flags):
            prompt = reading.prompts[read[key][0]]
            if flag:
                found.append(tokenizer.decode(list(prompt.tokens[prompt.name[0] : read[key][1] + 1])).strip())
        return found

    concepts = [ADA, Concept("Pascal", "rain")]
    assert set(texts([True] * reading.groups, concepts)) == {"Ada", "Ada Byron"}
    assert texts([False] * reading.groups, concepts) == []
    names = (f"name {number}" for number in count())
    many = concepts + [Concept(next(names), "rain") for _ in range(MAX_CONCEPTS - 2)]
    assert set(texts([True] * reading.groups, many)) == {"Ada", "Ada Byron"}
    assert texts([True] * reading.groups, [*many, Concept(next(names), "rain")]) == []


@pytest.mark.parametrize("stands", [True, False])
def test_an_edit_moves_a_short_name_the_full_distance(stands, make_model, make_tokenizer, texts, monkeypatch):
    monkeypatch.setattr(module, "short_names", lambda *arguments: list(arguments[-1]) if stands else [])
    tokenizer = make_tokenizer()
    distances = {}
    for schedule in ("full", "predicted"):
        model = make_model("Llama")
        statistics = rocr.collect_statistics(model, tokenizer, texts, [2])
        config = EditConfig(layers=[2], templates=("Who is {}?",), token_schedule=schedule, ridge=0.1, variants="none")
        edit = rocr.unlearn(
            model, tokenizer, [Concept("x y", "rain")], statistics, config, guards=Guards(force=True), retain=["x z"]
        )
        distances[schedule] = edit.report.retained.mean
    assert (distances["predicted"] > 0.9 * distances["full"]) == stands
