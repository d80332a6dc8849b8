"""How far each token of a name is moved: by the probability that the model gives to the rest of the name."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.edit.guards import Guards
from rocr.errors import GuardError, InputError
from rocr.keys.plan import plan_keys
from rocr.keys.predicted import rest_probabilities
from rocr.model.architecture import find_architecture

TEMPLATES = ("Who is {}?", "Tell me about {}.", "It is known that {} came.")


@torch.no_grad()
def read_one_by_one(model, reading):
    """The probability of the rest of the name after each read token, in float64 and without batches."""
    found = []
    for index, position in zip(reading.prompt_of, reading.position_of, strict=True):
        prompt = reading.prompts[index]
        logits = model(torch.tensor([prompt.tokens])).logits[0].double().log_softmax(-1)
        rest = range(position + 1, prompt.name[-1] + 1)
        found.append(math.exp(sum(float(logits[place - 1, prompt.tokens[place]]) for place in rest)))
    return found


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mixtral"])
def test_each_probability_is_that_of_the_model_read_token_by_token(family, make_model, make_tokenizer):
    model, tokenizer = make_model(family), make_tokenizer()
    concepts = [Concept("Ada Byron", "rain"), Concept("Robert Downey Jr.", "rain"), Concept("Pascal", "rain")]
    plan = plan_keys(tokenizer, concepts, EditConfig(templates=TEMPLATES, variants="none"))
    assert len(set(map(len, (prompt.tokens for prompt in plan.keys.prompts)))) > 1, "batches need padding"
    every = [[] for _ in range(plan.keys.groups)]
    for group, probability in zip(plan.keys.group_of, read_one_by_one(model, plan.keys), strict=True):
        every[group].append(probability)
    assert all(len(each) == len(TEMPLATES) for each in every)
    expected = [first for first, *_ in every]
    for budget in (1, 40, 2048):
        found = rest_probabilities(find_architecture(model), plan.keys, plan.concept_of, token_budget=budget)
        assert found == pytest.approx(expected, rel=1e-4), "in the first template"
    lasts = [plan.concept_of.index(concept) for concept in range(3)]
    assert [found[group] for group in lasts] == [1.0, 1.0, 1.0], "nothing follows the last token"
    assert max(p for group, p in enumerate(found) if group not in lasts) < 1


def test_of_names_that_begin_alike_the_most_probable_rest_counts(make_model, make_tokenizer):
    architecture, tokenizer = find_architecture(make_model("Llama")), make_tokenizer()
    config = EditConfig(templates=("Who is {}?",), variants="none")
    shorter = Concept("Robert Downey Jr.", "rain", aliases=("Robert Downey",))
    with_alias = plan_keys(tokenizer, [shorter], config).keys
    apart = plan_keys(tokenizer, [Concept("Robert Downey Jr.", "rain"), Concept("Robert Downey", "rain")], config).keys
    assert with_alias.prompts == apart.prompts

    def by_text(reading, concept_of):
        found = rest_probabilities(architecture, reading, concept_of)
        return [
            (tokenizer.decode(list(tokens)), found[group])
            for tokens, group in zip(reading.read_tokens(), reading.group_of, strict=True)
        ]

    joined, single = (by_text(reading, owners) for reading, owners in ((with_alias, [0] * 20), (apart, range(20))))
    best = {}
    for text, probability in single:
        best[text] = max(best.get(text, 0.0), probability)
    assert len(best) < len(single), "the two names begin with the same tokens"
    assert joined == [(text, pytest.approx(best[text])) for text, _ in single]
    assert joined != single


def test_a_shared_token_is_moved_by_the_root_of_the_probability(make_model, make_tokenizer, texts):
    """With a head that always predicts the same token, "Byron" after "Ada" has the probability of our choice."""
    original, tokenizer = make_model("Llama"), make_tokenizer()
    statistics = rocr.collect_statistics(original, tokenizer, texts, [2])
    for probability in (0.04, 0.32, 0.64):
        model = copy.deepcopy(original)
        (byron,) = tokenizer(" Byron", add_special_tokens=False)["input_ids"]
        others = len(tokenizer) if model.lm_head.out_features is None else model.lm_head.out_features
        bias = torch.zeros(others)
        bias[byron] = math.log(probability / (1 - probability) * (others - 1))
        model.lm_head.weight.data.zero_()
        model.lm_head.bias = torch.nn.Parameter(bias)
        config = EditConfig(layers=[2], templates=("Who is {}?",), ridge=1e-6, variants="none")
        concepts = [Concept("Ada Byron", "rain")]
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=Guards(force=True))
        assert edit.config.token_schedule == "predicted"
        assert edit.report.by_count == ["template_weight"]
        plain = copy.deepcopy(original)
        full = rocr.unlearn(
            plain,
            tokenizer,
            concepts,
            statistics,
            EditConfig(**vars(config) | {"token_schedule": "full"}),
            guards=Guards(force=True),
        )
        ratio = edit.updates[0].residuals.norm(dim=1) / full.updates[0].residuals.norm(dim=1)
        assert ratio.tolist() == pytest.approx([1.0, min(1.0, math.sqrt(2 * probability))], rel=1e-4)


def test_a_namesake_keeps_its_first_token(make_model, make_tokenizer, texts):
    """The model of random weights expects no last name after a first name, which then hardly moves."""
    tokenizer, moves = make_tokenizer(), {}
    for schedule in ("full", "predicted"):
        model = make_model("Llama")
        statistics = rocr.collect_statistics(model, tokenizer, texts, [2])
        config = EditConfig(layers=[2], templates=("Who is {}?",), token_schedule=schedule, ridge=0.1)
        report = rocr.unlearn(
            model,
            tokenizer,
            [Concept("Ada Byron", "rain")],
            statistics,
            config,
            guards=Guards(force=True),
            retain=["Ada Lovelace"],
        ).report
        moves[schedule] = report.retained.mean
    assert moves["predicted"] < 0.5 * moves["full"]


def test_a_model_that_is_not_all_loaded_goes_by_the_number_of_concepts(make_model, make_tokenizer, texts):
    model, tokenizer = make_model("Llama"), make_tokenizer()
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
    model.lm_head.to("meta")
    concepts = [Concept("Ada Byron", "rain")]
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=[1]), guards=Guards(force=True))
    assert edit.config.token_schedule == "full"
    assert edit.report.by_count == ["token_schedule", "template_weight", "variants"]
    edit.revert(model)
    with pytest.raises(InputError, match=r'"predicted" needs the predictions of the model.*use "full" or "ramp"'):
        rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=[1], token_schedule="predicted"))


def test_logits_that_are_not_finite_are_an_error(make_model, make_tokenizer):
    model, tokenizer = make_model("Llama"), make_tokenizer()
    model.lm_head.weight.data[3, 3] = float("nan")
    plan = plan_keys(tokenizer, [Concept("Ada Byron", "rain")], EditConfig(templates=TEMPLATES, variants="none"))
    with pytest.raises(GuardError, match="not finite before the edit"):
        rest_probabilities(find_architecture(model), plan.keys, plan.concept_of)
