import dataclasses
import json
import math

import pytest

from rocr import EditConfig, InputError, Template
from rocr.config import OFFICIAL_TEMPLATES
from rocr.model.architecture import authors_layers, default_layers, find_architecture
from rocr.model.layers import chosen_layers, resolve_layers

MAY_BE_UNSET = ("token_schedule", "variants")
"""Choices that the number of concepts makes where they are None."""


def test_defaults_are_valid_and_frozen():
    config = EditConfig()
    assert config.layers is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ridge = 1.0


def test_the_authors_settings():
    config = EditConfig.official(layers=(4, 5, 6))
    assert (config.method, config.threshold, config.ridge) == ("projected", 0.02, 1.0)
    assert not config.relative_ridge and not config.relative_threshold
    assert (config.key_tokens, config.keys_per_concept, config.contexts) == ("last", "mean", "official")
    assert (config.token_schedule, config.template_weight) == ("full", 0.0)
    assert len(config.templates) == 6
    assert config.templates[0] == Template(" {}.", chat=True, answer="Answer:")
    assert config.templates[4].text == "Tell me about {}."
    assert config.layers == (4, 5, 6)
    assert config.strength == 1.0


def test_layers_that_the_model_chooses():
    for config, layers in ((EditConfig(), None), (EditConfig.official(), "official")):
        assert (config.layers, config.layer_numbers) == (layers, ())
    assert EditConfig(contexts="official").layers is None, "the contexts choose no layers"
    assert EditConfig(layers=[2, 1]).layer_numbers == (1, 2)


def test_only_the_layers_setting_chooses_the_layers_of_the_authors(make_model):
    model = find_architecture(make_model("Llama", num_hidden_layers=7))
    assert chosen_layers(EditConfig.official(), model) == authors_layers(7) == (1, 2, 3)
    assert chosen_layers(EditConfig(layers="official"), model) == authors_layers(7)
    assert chosen_layers(EditConfig(contexts="official"), model) == default_layers(7) == (1, 3)
    assert resolve_layers(EditConfig.official(), model) == EditConfig.official(layers=(1, 2, 3))


@pytest.mark.parametrize("layers", ["authors", (), (1, 1), (-1,), (True,), 4, ("official",)])
def test_layers_that_cannot_be(layers):
    with pytest.raises(InputError, match=r"^layers "):
        EditConfig(layers=layers)


@pytest.mark.parametrize(
    "config",
    [
        EditConfig(),
        EditConfig.official(),
        EditConfig.official((1, 2)),
        EditConfig(layers=[3, 1], templates=("Who is {}?", Template("{}", chat=True)), seed=7, method="projected"),
    ],
)
def test_json_and_back(config):
    assert EditConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_settings_that_the_length_of_the_list_chooses():
    for count in (1, 24):
        assert EditConfig().for_concepts(count) == EditConfig(
            token_schedule="full", template_weight=0.0, variants="spelling"
        )
    for count in (25, 10_000):
        assert EditConfig().for_concepts(count) == EditConfig(
            token_schedule="ramp", template_weight=0.03, variants="none"
        )
    given = EditConfig(token_schedule="full", template_weight=2.0, variants="all")
    for config in (given, EditConfig.official()):
        assert config.for_concepts(1) == config.for_concepts(1000) == config


def test_settings_of_an_older_file_are_as_they_were_then():
    older = {
        name: value
        for name, value in EditConfig().to_json().items()
        if name not in ("token_schedule", "template_weight", "variants")
    }
    assert EditConfig.from_json(older) == EditConfig(token_schedule="full", template_weight=0.0, variants="none")


def test_layers_are_sorted_and_templates_may_be_plain_texts():
    assert EditConfig(layers=[6, 4, 5]).layers == EditConfig(layers=range(4, 7)).layers == (4, 5, 6)
    assert EditConfig(templates="Who is {}?").templates == (Template("Who is {}?"),)
    assert EditConfig(templates=["a {}", OFFICIAL_TEMPLATES[0]]).templates == (Template("a {}"), OFFICIAL_TEMPLATES[0])


@pytest.mark.parametrize("layers", [[], "4", [1, 1], [-1], [1.0], [True], 3, ["1"]])
def test_layers_that_are_none(layers):
    with pytest.raises(InputError, match="layers"):
        EditConfig(layers=layers)


@pytest.mark.parametrize("templates", [[], [3], ["no place"], ["{} {}"]])
def test_templates_that_are_none(templates):
    with pytest.raises(InputError, match="template"):
        EditConfig(templates=templates)


@pytest.mark.parametrize("name", ["ridge", "threshold", "strength", "gamma", "template_weight", "least_closed"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_numbers_out_of_range(name, value):
    if (name, value) in (("gamma", 0), ("template_weight", 0), ("template_weight", None), ("least_closed", 0)):
        assert getattr(EditConfig(**{name: value}), name) == value, "no weight at all, or chosen by the list"
        return
    with pytest.raises(InputError, match=f"{name} must be a finite number .* not {value!r}"):
        EditConfig(**{name: value})


@pytest.mark.parametrize("name", ["method", "key_tokens", "keys_per_concept", "contexts", *MAY_BE_UNSET])
@pytest.mark.parametrize("value", ["other", None, 3])
def test_choices_out_of_range(name, value):
    if name in MAY_BE_UNSET and value is None:
        return  # chosen by the number of concepts
    with pytest.raises(InputError, match=f"{name} must be one of .*, not {value!r}"):
        EditConfig(**{name: value})


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True])
def test_seeds_out_of_range(seed):
    with pytest.raises(InputError, match="seed must be a whole number"):
        EditConfig(seed=seed)


def test_unknown_settings_are_named():
    with pytest.raises(InputError, match=r"Unknown settings: .*gama, rigde"):
        EditConfig.from_json({"rigde": 1.0, "gama": 2.0, "ridge": 1.0})
