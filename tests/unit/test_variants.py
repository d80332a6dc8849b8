"""Spellings of a name that become keys beside it: which they are, where they are read, and with what weight."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rocr
from rocr import Concept, EditConfig, Guards
from rocr.concepts import folded
from rocr.keys.plan import plan_keys, plan_names
from rocr.keys.variants import MISSPELLINGS, spelling_variants, variants_of
from rocr.solve.metric import build_metric
from rocr.solve.solve import solve_layer

NAMES = ["Stephen King", "Frédéric Chopin", "Jean-Paul Sartre", "J. R. R. Tolkien", "Microsoft", "Ada Byron", "Łódź"]


def edits(one, other):
    """The least number of letters to insert, delete, replace or swap with their neighbour (Damerau)."""
    table = {(i, -1): i + 1 for i in range(-1, len(one))} | {(-1, j): j + 1 for j in range(-1, len(other))}
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
            if i and j and (a, one[i - 1]) == (other[j - 1], b):
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(one) - 1, len(other) - 1]


@pytest.mark.parametrize("name", NAMES)
def test_misspellings_differ_in_one_letter_after_the_first(name):
    found = spelling_variants([name], None, 3)
    assert len(found) == len({folded(each) for each in found}) and folded(name) not in map(folded, found)
    misspelt = [
        each
        for each in found
        if "." not in each.replace("J. R. R.", "") and edits(each, name) == 1 and each.count("-") == name.count("-")
    ]
    others = set(found) - set(misspelt)
    assert len(misspelt) >= min(MISSPELLINGS, 6) - 1 and len(others) <= 4
    for each in misspelt:
        assert [word[0] for word in each.split(" ")] == [word[0] for word in name.split(" ")]


def test_initials_hyphens_and_diacritics():
    assert {"S. King"} == set(spelling_variants(["Stephen King"], "person", 0)[:1])
    assert spelling_variants(["Robert Lee Frost"], None, 0)[:2] == ["R. Lee Frost", "R. L. Frost"]
    assert not any("." in each for each in spelling_variants(["Robert Lee Frost"], "thing", 0))
    assert "Jean Paul Sartre" in spelling_variants(["Jean-Paul Sartre"], None, 0)
    assert "Frederic Chopin" in spelling_variants(["Frédéric Chopin"], None, 0)
    assert "Frederic Chopin" not in spelling_variants(["Frédéric Chopin", "frederic chopin"], None, 0)
    for short in ("X", "Bob Ng", "IT", "42", "毛泽东", "...", "- -"):
        assert not [each for each in spelling_variants([short], "thing", 0) if each != short]


def test_no_other_name_is_made_of_an_abbreviation_or_in_a_script_without_case():
    assert spelling_variants(["NASA"], "thing", 0) == [], "not NSA"
    assert spelling_variants(["李 小龙"], "person", 0) == [], "not 李. 小龙"
    assert not any("." in each for each in spelling_variants(["محمد علي"], "person", 0))
    assert spelling_variants(["Лев Толстой"], "person", 0)[0] == "Л. Толстой"
    assert "Петр Чайковский" in spelling_variants(["Пётр Чайковский"], "person", 0), "й is no и with a mark"
    for name, other in (("ガンジー", "カンシー"), ("नरेन्द्र मोदी", "नरेनदर मोदी")):
        assert other not in spelling_variants([name], "person", 0), "the mark makes another letter"
    assert "Ελευθεριος Βενιζελος" in spelling_variants(["Ελευθέριος Βενιζέλος"], "person", 0)
    assert spelling_variants(["Jean--Paul"], "thing", 0) == ["Jean Paul"]


def test_a_variant_stands_for_one_concept_alone():
    john = Concept("John Smith", "a gardener")
    assert {"Jon Smith", "J. Smith"} <= set(*variants_of([john], 0))
    for other in (Concept("jon smith", "a gardener"), Concept("Ada", "b", ("Jon Smith",)), Concept("Ada", "Jon Smith")):
        assert "Jon Smith" not in variants_of([john, other], 0)[0] and "J. Smith" in variants_of([john, other], 0)[0]
    assert "Jon Smith" not in variants_of([john], 0, kept=["Jon Smith"])[0]
    jane = Concept("Jane Smith", "Ada Byron")
    assert all("J. Smith" not in found for found in variants_of([john, jane], 0)), "it is sent to two places"
    assert "J. Smith" not in variants_of([jane], 0, base=[john])[0]
    alike = replace(jane, redirect="A gardener")
    assert all("J. Smith" in found for found in variants_of([john, alike], 0))


def test_a_variant_that_does_not_fit_into_the_model_is_left_out(tokenizer, configs):
    concepts = [Concept("Augusta Byron", "Blaise Pascal")]
    without, plan = (plan_keys(tokenizer, concepts, config) for config in configs)
    positions = max(without.keys.position_of) + 1
    assert max(plan.keys.position_of) >= positions, "a misspelling has more tokens"
    fitting = plan_keys(tokenizer, concepts, configs[1], positions=positions)
    fitting.check_positions(concepts, positions)
    assert any(fitting.is_variant)


def test_a_word_that_the_tokenizer_does_not_know_is_left_out():
    words = ["<unk>", "Who", "is", "?", "Grace", "Hopper", "Blaise", "Pascal"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    settings = EditConfig(templates=("Who is {}?",), variants="spelling")
    plan = plan_keys(tokenizer, [Concept("Grace Hopper", "Blaise Pascal")], settings)
    at = zip(plan.keys.prompt_of, plan.keys.position_of, strict=True)
    assert {words[plan.keys.prompts[i].tokens[position]] for i, position in at} == {"Grace", "Hopper"}
    assert any(plan.is_variant), "a misspelt first word leaves the last one as it is"


def test_the_seed_draws_the_misspellings():
    first, again, other = (spelling_variants(["Stephen King"], None, seed) for seed in (1, 1, 2))
    assert first == again != other and first[0] == other[0] == "S. King"


@pytest.fixture
def configs():
    templates = ("Who is {}?", "It is about {}.")
    return [
        EditConfig(layers=(1, 2), templates=templates, variants=each, variant_weight=0.5)
        for each in ("none", "spelling")
    ]


def test_their_tokens_are_read_once_with_their_weight(tokenizer, configs):
    concepts = [Concept("Ada Byron", "Blaise Pascal", ("the countess",)), Concept("Robert Downey Jr.", "a gardener")]
    without, plan = (plan_keys(tokenizer, concepts, config) for config in configs)
    assert set(without.weights) == {1.0} and len(without.weights) == without.keys.groups
    assert plan.weights.count(1.0) == without.keys.groups and set(plan.weights) == {1.0, 0.5}
    own = [group for group, weight in enumerate(plan.weights) if weight == 1.0]
    places = {0.5: [], 1.0: []}
    for token, group in zip(plan.keys.read_tokens(), plan.keys.group_of, strict=True):
        places[plan.weights[group]].append((plan.concept_of[group], token))
    assert len(set(places[0.5])) == len(places[0.5]) and not set(places[0.5]) & set(places[1.0])
    assert [plan.concept_of[group] for group in own] == without.concept_of
    assert set(places[1.0]) == {
        (without.concept_of[group], token)
        for token, group in zip(without.keys.read_tokens(), without.keys.group_of, strict=True)
    }
    assert plan_names(tokenizer, ["Ada Byron"], configs[0]) == plan_names(tokenizer, ["Ada Byron"], configs[1])


def test_a_weight_of_two_is_the_row_twice():
    """Rows times √w, as they are in the system, against w equal rows, in float64."""
    keys, residuals, moment = torch.randn(3, 8), torch.randn(3, 5), torch.eye(8)
    metric = build_metric(moment, EditConfig())
    scaled = keys.clone(), residuals.clone()
    for rows in scaled:
        rows[1] *= 2**0.5
    twice = [torch.cat([rows, rows[1:2]]) for rows in (keys, residuals)]
    one, other = (solve_layer(k, r, metric, 0.4).factors for k, r in (scaled, twice))
    mine, theirs = (factors.left.double() @ factors.right.double() for factors in (one, other))
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.usefixtures("one_thread")
def test_a_misspelt_name_moves_to_the_redirect(model, tokenizer, statistics, configs):
    """The heavier the variants, the further; the name itself goes as far."""
    concept = [Concept("Augusta Byron", "Blaise Pascal")]
    misspelt = spelling_variants(["Augusta Byron"], None, 0)[2]

    def state(text):
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return found.hidden_states[3][0, -1].double()

    def distance_after(config, name):
        edit = rocr.unlearn(model, tokenizer, concept, statistics, config, guards=Guards(force=True), retain=[])
        after = state(f"Who is {name}")
        edit.revert(model)
        assert edit.report.layers[0].keys == len(plan_keys(tokenizer, concept, config).weights)
        target = state("Who is Blaise Pascal")
        return float((after - target).norm() / (state(f"Who is {name}") - target).norm())

    heavy = replace(configs[1], variant_weight=10.0)
    plain, spelt, more = (distance_after(config, misspelt) for config in (*configs, heavy))
    assert plain > 0.9 and spelt < 0.7 and more < 0.5
    assert distance_after(configs[1], "Augusta Byron") < distance_after(configs[0], "Augusta Byron") + 0.05


@pytest.mark.usefixtures("one_thread")
def test_variants_do_not_count_in_the_distance_of_a_name(model, tokenizer, statistics, configs):
    """Variants that weigh nothing are hardly moved, and say nothing about how near the name is to its redirect."""
    concepts, found = [Concept("Augusta Byron", "Blaise Pascal")], []
    for config in (configs[0], replace(configs[1], variant_weight=1e-6)):
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, config, guards=Guards(force=True), retain=[])
        edit.revert(model)
        found.append(edit.report.distance[0])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_a_name_that_is_to_stay_is_no_variant(model, tokenizer, statistics, configs):
    concept = [Concept("Augusta Byron", "Blaise Pascal")]
    misspelt = spelling_variants(["Augusta Byron"], None, 0)[2]

    def moved(retain, **names):
        config = replace(configs[1], retain_weight=0.0)
        edit = rocr.unlearn(
            model, tokenizer, concept, statistics, config, guards=Guards(force=True), retain=retain, **names
        )
        edit.revert(model)
        return edit.report.layers[0].keys

    assert moved([misspelt]) == moved(["Robert Downey Jr."]) - 1


def test_a_file_holds_the_settings(configs):
    spelling = configs[1]
    assert "variants" not in EditConfig(variants="none").to_json()
    assert EditConfig.from_json(spelling.to_json()) == spelling and spelling.to_json()["variants"] == "spelling"
    with pytest.raises(rocr.InputError, match="variants"):
        EditConfig(variants="typos")
    with pytest.raises(rocr.InputError, match="variant_weight"):
        EditConfig(variant_weight=0)
