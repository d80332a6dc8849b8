"""Every setting of an edit has its documented effect, checked by a number."""

import copy
import dataclasses

import pytest
import torch

import rocr
from rocr import Concept, EditConfig

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = EditConfig(layers=(1, 2), templates=("Who is {}?", "It is about {}."), variants="none")
PROJECTED = {"method": "projected", "threshold": 0.5, "relative_threshold": True}
CASES = {  # setting: what the base has besides, and another value
    "layers": ({}, (1, 3)),
    "method": (PROJECTED | {"method": "whitened"}, "projected"),
    "ridge": ({}, 0.1),
    "relative_ridge": ({}, False),
    "least_closed": ({}, 0.0),
    "gamma": ({}, 1.0),
    "threshold": (PROJECTED, 1.0),
    "relative_threshold": (PROJECTED, False),
    "strength": ({}, 2.0),
    "templates": ({}, ("Who is {}?",)),
    "key_tokens": ({}, "last"),
    "keys_per_concept": ({}, "all"),
    "contexts": ({}, "official"),
    "token_schedule": ({"token_schedule": "full"}, "predicted"),
    "template_weight": ({"template_weight": 0.0}, 1.0),
    "retain_weight": ({}, 0.0),
    "variants": ({"variants": "none"}, "spelling"),
    "variant_weight": ({"variants": "spelling"}, 3.0),
    "measure": ({}, "once"),
    "seed": ({}, 7),
    "chat": ({"templates": (rocr.Template("Who is {}?", chat=True),)}, rocr.ChatSettings(system="Answer in verse.")),
}
RETAIN = ["Grace Hopper"]
ELSEWHERE = {"closing_keys": "test_encoders.py", "keep_zeros": "test_support.py"}
"""Settings of text encoders and of sparse models, and where their effect is tested."""


@pytest.fixture
def edit_of(model, tokenizer, statistics, concepts):
    """edit_of(config): the change of every weight of a fresh model, by layer, and the edit."""

    def run(config, given=statistics):
        edited = copy.deepcopy(model)
        edit = rocr.unlearn(edited, tokenizer, concepts, given, config, guards=rocr.Guards(force=True), retain=RETAIN)
        pairs = zip(edited.model.layers, model.model.layers, strict=True)
        return torch.stack(
            [(new.mlp.down_proj.weight - old.mlp.down_proj.weight).detach().double() for new, old in pairs]
        ), edit

    return run


@pytest.fixture(scope="module")
def of_bases():
    """Changes of weights by settings that several cases start from, each computed once and then once more."""
    return {}


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(EditConfig) if field.name not in ELSEWHERE]
)
def test_each_setting_changes_the_edit(edit_of, statistics, of_bases, name):
    more, value = CASES[name]
    base = dataclasses.replace(BASE, **more)
    given = None if name == "seed" else statistics
    key = (repr(base), given is None)
    if key not in of_bases:
        of_bases[key] = edit_of(base, given)[0]
        assert torch.equal(of_bases[key], edit_of(base, given)[0])
    first = of_bases[key]
    other, _ = edit_of(dataclasses.replace(base, **{name: value}), given)
    assert (other - first).norm() > 0.01 * first.norm()


def state(model, tokenizer, text, layer):
    """Output of a decoder layer at the last token of a text."""
    with torch.no_grad():
        found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    return found.hidden_states[layer + 1][0, -1].double()


@pytest.mark.parametrize("layers", [(1,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_strength_is_a_share_of_the_way_whatever_the_layers(model, tokenizer, statistics, layers, strength):
    """With next to no ridge and two concepts, each state at a name moves by `strength` of the way to its target."""
    names = {"Ada Byron": "Blaise Pascal", "Robert Downey Jr.": "the air"}
    texts = {name: f"Who is {name}" for name in (*names, *names.values())}
    config = EditConfig(
        layers=layers, ridge=1e-6, gamma=0.0, strength=strength, key_tokens="last",
        templates=("Who is {}",),
    )  # fmt: skip
    before = {name: state(model, tokenizer, text, layers[-1]) for name, text in texts.items()}
    rocr.unlearn(model, tokenizer, [Concept(*pair) for pair in names.items()], statistics, config)
    for name, redirect in names.items():
        way = before[redirect] - before[name]
        moved = state(model, tokenizer, texts[name], layers[-1]) - before[name]
        assert float(moved @ way / (way @ way)) == pytest.approx(strength, rel=0.02)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_measured_once_the_update_is_proportional_to_the_strength(edit_of, strength):
    base = dataclasses.replace(BASE, layers=(1, 2, 3), measure="once")
    (one, _), (scaled, _) = edit_of(base), edit_of(dataclasses.replace(base, strength=strength))
    assert (scaled - strength * one).norm() < 1e-4 * scaled.norm()


def test_the_report_measures_the_distance_to_where_the_strength_sends(edit_of):
    for strength in (0.5, 2.0):
        _, edit = edit_of(dataclasses.replace(BASE, strength=strength, layers=(2,), ridge=1e-6, gamma=0.0))
        assert max(edit.report.distance) < 0.01
