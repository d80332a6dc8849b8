import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import rocr
from rocr import Concept, Edit, EditConfig, GuardError, Guards, InputError, VerificationError
from rocr.edit.edit import Edit as EditClass
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
PEOPLE = [
    Concept("Ada Byron", "Blaise Pascal", ("the countess",)),
    Concept("Robert Downey Jr.", "a gardener"),
    Concept("the engines", "the roses"),
]
# Relative to the norm of the update. The keys are measured in batches of other sizes: 3e-6 was measured.
ROUNDING = 5e-5


def config(layers: tuple[int, ...] = (1, 2, 3), measure: Any = "once", **changes: Any) -> EditConfig:
    return EditConfig(layers=layers, measure=measure, ridge=0.5, **changes)


def updates(edit: Edit) -> list[torch.Tensor]:
    return [update.factors.left.double() @ update.factors.right.double() for update in edit.updates]


def differences(edit: Edit, expected: Edit) -> list[float]:
    """For each layer the distance of the updates, relative to the expected one."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(updates(edit), updates(expected), strict=True)]


@pytest.fixture(scope="module")
def made():
    """Edits that were made from the start, with their models, by concepts and settings."""
    return {}


@pytest.fixture
def make(model, tokenizer, statistics, made):
    """make(concepts, config): the edit of a fresh model, made from the start, and that model: copies of one's own."""

    def edited(concepts, settings):
        key = repr((concepts, settings, rocr.config.LONG_LIST))
        if key not in made:
            fresh = copy.deepcopy(model)
            made[key] = rocr.unlearn(fresh, tokenizer, concepts, statistics, settings), fresh
        return copy.deepcopy(made[key])

    return edited


@pytest.mark.parametrize("names", ["Ada Byron", "the countess", ["robert  DOWNEY jr."], ["the engines", "Ada Byron"]])
@pytest.mark.parametrize(
    "settings",
    [config(), config((2,), "each"), config(method="projected", threshold=0.3), config(keys_per_concept="all")],
    ids=["once", "one layer", "projected", "wide"],
)
def test_removing_equals_an_edit_made_without(make, names, settings):
    whole, _ = make(PEOPLE, settings)
    gone = {"Ada Byron": 0, "the countess": 0, "robert  DOWNEY jr.": 1, "the engines": 2}
    left_out = {gone[name] for name in ([names] if isinstance(names, str) else names)}
    expected, _ = make([c for i, c in enumerate(PEOPLE) if i not in left_out], settings)
    smaller = whole.remove(names)
    assert smaller.concepts == expected.concepts and smaller.concept_of == expected.concept_of
    assert max(differences(smaller, expected)) < ROUNDING
    assert min(differences(whole, expected)) > 1e-2, "the removed concept made no difference before"
    for mine, theirs in zip(smaller.report.layers, expected.report.layers, strict=True):
        assert mine.closed == pytest.approx(theirs.closed, abs=1e-3)
        assert mine.relative_norm == pytest.approx(theirs.relative_norm, rel=1e-3)


def test_layers_measured_one_after_the_other_are_exact_in_the_first_only(make):
    whole, _ = make(PEOPLE, config(measure="each"))
    expected, _ = make(PEOPLE[1:], config(measure="each"))
    smaller = whole.remove("Ada Byron")
    first, *later = differences(smaller, expected)
    assert first < ROUNDING
    assert whole.report.inexact == [] and smaller.report.inexact == [2, 3]
    assert all(difference > ROUNDING for difference in later), "the trace of the removed concept is documented"


def test_more_keys_than_inputs_keep_the_metric(make):
    whole, _ = make(PEOPLE, config(keys_per_concept="all"))
    update = whole.updates[0]
    assert len(update.keys) > update.keys.shape[1] and update.system.metric is not None
    assert update.factors.stored_left is None and update.factors.stored_right.shape == (32, 48)
    few, _ = make(PEOPLE[2:], config(keys_per_concept="all"))
    assert few.updates[0].system.product is not None


def test_removing_from_a_model_gives_it_the_smaller_edit(make, weights_of):
    whole, carrier = make(PEOPLE, config())
    _, expected = make(PEOPLE[:2], config())
    smaller = whole.remove("the engines", carrier)
    for (name, mine), (_, theirs) in zip(carrier.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4, msg=name)
    assert smaller.report.layers[0].surviving > 0.9
    before = weights_of(carrier)
    smaller.revert(carrier)
    whole.apply(carrier)
    assert not same_weights(weights_of(carrier), before)


def test_removing_and_reverting_gives_back_the_first_bits(model, tokenizer, statistics, weights_of):
    first = weights_of(model)
    edit = rocr.unlearn(model, tokenizer, PEOPLE, statistics, config())
    assert not same_weights(weights_of(model), first)
    edit.remove("the engines", model).revert(model)
    assert same_weights(weights_of(model), first)


@pytest.mark.parametrize(
    "settings",
    [config(), config((2,), "each"), config(keys_per_concept="all"), config(method="projected", threshold=0.3)],
    ids=["once", "one layer", "wide", "projected"],
)
def test_adding_equals_an_edit_made_with(make, tokenizer, statistics, settings, weights_of):
    edit, carrier = make(PEOPLE[:1], settings)
    expected, _ = make(PEOPLE, settings)
    larger = edit.add(PEOPLE[1:], carrier, tokenizer, statistics)
    assert larger.concepts == expected.concepts and sorted(larger.concept_of) == sorted(expected.concept_of)
    assert max(differences(larger, expected)) < ROUNDING
    assert len(larger.report.distance) == 3
    larger.revert(carrier)
    assert same_weights(weights_of(carrier), weights_of(make(PEOPLE, settings)[1])) is False
    edit.apply(carrier)
    edit.revert(carrier)


def test_adding_what_was_removed_gives_the_first_edit_again(make, tokenizer, statistics):
    whole, carrier = make(PEOPLE, config())
    again = whole.remove("the engines", carrier).add(PEOPLE[2:], carrier, tokenizer, statistics)
    assert max(differences(again, whole)) < ROUNDING


def test_an_addition_that_fails_leaves_the_model_with_the_edit(make, tokenizer, statistics, weights_of):
    edit, carrier = make(PEOPLE[:1], config())
    before = weights_of(carrier)
    for concepts in (PEOPLE[:1], [Concept("Blaise Pascal", "rain")]):
        with pytest.raises(InputError):
            edit.add(concepts, carrier, tokenizer, statistics)
    original = copy.deepcopy(carrier)
    edit.revert(original)
    other = rocr.collect_statistics(original, tokenizer, ["Another text, and not a long one."], (1, 2, 3))
    with pytest.raises(InputError, match="but these are of"):
        edit.add(PEOPLE[1:], carrier, tokenizer, other)
    assert same_weights(weights_of(carrier), before)


@pytest.mark.parametrize("changes", [{}, {"keys_per_concept": "all"}], ids=["narrow", "wide"])
def test_merged_edits_equal_one_in_either_order(make, changes):
    expected, _ = make(PEOPLE, config(**changes))
    first, second = (make(part, config(**changes))[0] for part in (PEOPLE[:2], PEOPLE[2:]))
    assert max(differences(first.merge(second), expected)) < ROUNDING
    assert max(differences(second.merge(first), expected)) < ROUNDING
    summed = [a + b for a, b in zip(updates(first), updates(second), strict=True)]
    assert (summed[0] - updates(expected)[0]).norm() > 1e-2 * summed[0].norm(), "a sum is another edit"


def test_merging_across_the_length_of_a_long_list_is_inexact_in_either_order(make, monkeypatch):
    """Also where one edit was given the settings that the other left to the number of concepts."""
    monkeypatch.setattr("rocr.config.LONG_LIST", 3)
    left, _ = make(PEOPLE[:2], config((2,)))
    given, _ = make(PEOPLE[2:], config((2,), template_weight=0.0, variants="spelling"))
    for merged in (left.merge(given), given.merge(left)):
        assert merged.report.by_count == ["template_weight", "variants"]
        assert merged.report.inexact == [2]
    assert given.merge(make(PEOPLE[:2], given.config)[0]).report.inexact == []


def test_concepts_are_added_past_a_limit_by_force(make, tokenizer, statistics):
    edit, carrier = make(PEOPLE[:2], config((2,)))
    strict = {"relative_norm": 1e-6}
    with pytest.raises(GuardError, match="above the limit of 1e-06"):
        edit.add(PEOPLE[2:], carrier, tokenizer, statistics, guards=Guards(**strict))
    added = edit.add(PEOPLE[2:], carrier, tokenizer, statistics, guards=Guards(force=True, **strict))
    assert len(added.report.limits_passed) == 1


def test_edits_that_do_not_fit_together_are_not_merged(make, model, tokenizer, statistics):
    edit, _ = make(PEOPLE[:1], config())
    other, _ = make(PEOPLE[1:], config((1,)))
    with pytest.raises(InputError, match=r"different settings: layers \(.*\) and \(1,\)\. Make"):
        edit.merge(other)
    with pytest.raises(InputError, match="duplicate"):
        edit.merge(edit)
    with pytest.raises(InputError, match=r"one with rms_norm_eps .*, one with rms_norm_eps 0\.5"):
        edit.merge(replace(edit, concepts=PEOPLE[1:2], computed_with={"rms_norm_eps": 0.5}))
    for layers, words in (((1, 2, 3), "up to different layers"), (range(5), "different statistics")):
        texts = ["Quite another text about rain and engines."] * 9
        elsewhere = rocr.collect_statistics(copy.deepcopy(model), tokenizer, texts, layers)
        foreign = rocr.unlearn(copy.deepcopy(model), tokenizer, PEOPLE[1:], elsewhere, config())
        with pytest.raises(InputError, match=words):
            edit.merge(foreign)


def test_an_edit_made_on_top_of_another_is_not_merged_as_if_it_stood_alone(make, tokenizer, texts, tmp_path):
    first, carrier = make(PEOPLE[:2], config())
    second = rocr.unlearn(
        carrier, tokenizer, PEOPLE[2:], rocr.collect_statistics(carrier, tokenizer, texts, range(5)), config()
    )
    second.save(tmp_path / "edit.safetensors")
    for edit in (second, EditClass.load(tmp_path / "edit.safetensors")):
        for pair in ((first, edit), (edit, first)):
            with pytest.raises(InputError, match=r"layers\.1.*was made in a model that carried another edit"):
                pair[0].merge(pair[1])
    alone, _ = make(PEOPLE[2:], config())
    second.revert(carrier)
    alone.apply(carrier)
    assert first.merge(alone).concepts == PEOPLE, "where an edit was put later does not matter"


def test_an_edit_for_a_while(make, model, weights_of):
    edit, carrier = make(PEOPLE, config())
    edited, first = weights_of(carrier), weights_of(model)
    with edit.applied(model) as same:
        assert same is model and same_weights(weights_of(model), edited)
        with pytest.raises(InputError, match="holds this edit already"), edit.applied(model):
            pass
    assert same_weights(weights_of(model), first)
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        1 / 0  # noqa: B018
    assert same_weights(weights_of(model), first)
    with edit.remove("the engines").applied(model):
        assert not same_weights(weights_of(model), edited) and not same_weights(weights_of(model), first)
    assert same_weights(weights_of(model), first)


def test_names_that_are_not_there_are_named(make):
    edit, _ = make(PEOPLE[:2], config((1,)))
    with pytest.raises(InputError, match=r"holds no 'Grace Hopper': it holds Ada Byron, Robert Downey Jr\."):
        edit.remove(["Ada Byron", "Grace Hopper"])
    with pytest.raises(InputError, match="revert the edit instead"):
        edit.remove(["Ada Byron", "Robert Downey Jr."])
    with pytest.raises(InputError):
        edit.remove([])


def test_a_model_with_a_later_edit_is_refused(make, tokenizer, texts, weights_of):
    edit, carrier = make(PEOPLE[:2], config())
    rocr.unlearn(
        carrier, tokenizer, PEOPLE[2:], rocr.collect_statistics(carrier, tokenizer, texts, (1, 2, 3)), config()
    )
    before = weights_of(carrier)
    with pytest.raises(VerificationError, match="Revert later edits first"):
        edit.remove("Ada Byron", carrier)
    assert same_weights(weights_of(carrier), before)


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(keys_per_concept="all"),
        config(keys_per_concept="all", method="projected", threshold=0.3),
    ],
    ids=["product", "whitened metric", "projected metric"],
)
def test_a_saved_edit_can_be_changed(make, settings, tmp_path):
    edit, carrier = make(PEOPLE, settings)
    edit.save(tmp_path / "edit.safetensors")
    loaded = EditClass.load(tmp_path / "edit.safetensors")
    smaller, expected = loaded.remove("Ada Byron", carrier), edit.remove("Ada Byron")
    assert max(differences(smaller, expected)) < ROUNDING
    smaller.save(tmp_path / "smaller.safetensors")
    again = EditClass.load(tmp_path / "smaller.safetensors")
    again.revert(carrier)
    assert again.concepts == PEOPLE[1:]


def test_edits_apply_in_any_order_to_rounding_and_revert_in_the_reverse_order(make, model, weights_of):
    first, second = (make(part, config())[0] for part in (PEOPLE[:2], PEOPLE[2:]))
    start = weights_of(model)
    other_order = copy.deepcopy(model)
    for edit in (first, second):
        edit.apply(model)
    with pytest.raises(VerificationError):
        first.revert(model)
    one_way = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    second.revert(model)
    first.revert(model)
    assert same_weights(weights_of(model), start)
    for edit in (second, first):
        edit.apply(other_order)
    for name, parameter in other_order.named_parameters():
        torch.testing.assert_close(parameter, one_way[name], atol=1e-6, rtol=1e-5)


MANY = [Concept(f"Ada Byron {i}", "Blaise Pascal") for i in range(26)]
GIVEN = {"token_schedule": "full", "template_weight": 0.0, "variants": "none"}


@pytest.mark.parametrize("before, after", [(23, 24), (24, 25), (25, 24), (25, 26)])
@pytest.mark.parametrize("given", [{}, GIVEN], ids=["chosen by the count", "given"])
def test_a_change_across_the_limit_of_long_lists_is_exact_or_says_that_it_is_not(
    make, tokenizer, statistics, tmp_path, before, after, given
):
    settings = config((2,), "each", least_closed=0.0, **given)
    edit, model = make(MANY[:before], settings)
    edit.save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    removed = edit.remove([concept.name for concept in MANY[after:before]]) if after < before else None
    changed = removed or edit.add(MANY[before:after], model, tokenizer, statistics)
    fresh, _ = make(MANY[:after], settings)
    crosses = (before < 25) != (after < 25)
    assert changed.report.inexact == ([2] if crosses and not given else [])
    if changed.report.inexact:
        assert differences(changed, fresh)[0] > 0.05, "the settings made no difference"
    else:
        assert differences(changed, fresh)[0] < ROUNDING
    assert changed.config == edit.config, "settings that were recorded stay"
    assert changed.report.by_count == ([] if given else ["template_weight", "variants"])


@pytest.mark.parametrize("names", [("John Smith", "Jon Smith"), ("John Smith", "Jane Smith")])
def test_a_change_of_whose_concepts_one_is_a_spelling_of_another_says_that_it_is_not_exact(
    make, tokenizer, statistics, names
):
    """Alone, a concept has the other's name, or the initials of both, among its variants."""
    concepts = [Concept(name, redirect) for name, redirect in zip(names, ("Blaise Pascal", "Ada Byron"), strict=True)]
    settings = config((2,), "each", variants="spelling")
    both, _ = make(concepts, settings)
    first, model = make(concepts[:1], settings)
    second, _ = make(concepts[1:], settings)
    assert both.remove(names[1]).report.inexact == [2]
    assert first.merge(second).report.inexact == [2]
    assert first.add(concepts[1:], model, tokenizer, statistics).report.inexact == [2]
    plain, _ = make(concepts, config((2,), "each", variants="none"))
    assert plain.remove(names[1]).report.inexact == []


def test_edits_that_become_a_long_list_together_say_so(make):
    settings = config((2,), "each")
    first, _ = make(MANY[:13], settings)
    second, _ = make(MANY[13:25], settings)
    assert first.merge(second).report.inexact == [2]
    assert first.merge(second).remove(MANY[0].name).report.inexact == [], "short again"
