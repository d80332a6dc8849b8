"""Old names of arguments and settings."""

import copy
import dataclasses
import json
import warnings

import pytest

import rocr
from rocr import EditConfig, InputError
from rocr.deprecation import renamed_arguments


@renamed_arguments(old="new")
def add(first, new=0, other=0):
    return first + 10 * new + 100 * other


def test_an_old_keyword_is_the_new_one_and_warns_where_it_is_written():
    with pytest.warns(DeprecationWarning, match="argument 'old' of add is now called 'new'") as found:
        assert add(1, old=2, other=3) == 321
    assert [warning.filename for warning in found] == [__file__]


def test_new_names_and_positions_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert add(1, 2, 3) == add(1, new=2, other=3) == 321
        EditConfig(token_schedule="ramp", template_weight=0.5)


def test_an_argument_under_both_names_is_refused():
    with pytest.raises(InputError, match=r"add was given 'old' and 'new', .*give only 'new'"):
        add(1, old=2, new=2)


def test_unlearn_takes_its_base_edit_by_the_old_name(make_model, make_tokenizer, texts):
    model, tokenizer = make_model("Llama"), make_tokenizer()
    statistics = rocr.collect_statistics(model, tokenizer, texts, [2])
    config, guards = EditConfig(layers=[2], templates=("Who is {}?",)), rocr.Guards(force=True)
    first = rocr.unlearn(
        copy.deepcopy(model), tokenizer, [rocr.Concept("Ada Byron", "rain")], statistics, config, guards=guards
    )
    more = [rocr.Concept("Robert Downey Jr.", "a key")]
    with pytest.warns(DeprecationWarning, match="argument 'kept' of unlearn is now called 'base_edit'"):
        edit = rocr.unlearn(model, tokenizer, more, statistics, first.config, guards=guards, kept=first)
    assert [concept.name for concept in edit.concepts] == ["Ada Byron", "Robert Downey Jr."]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"reach": "whole"}, {"token_schedule": "full"}),
        ({"reach": "gradual"}, {"token_schedule": "ramp"}),
        ({"reach": None}, {"token_schedule": None}),
        ({"held_weight": 0.5}, {"template_weight": 0.5}),
    ],
    ids=str,
)
class TestSettings:
    def test_a_setting_is_given_by_its_old_name(self, old, new):
        (name,), (renamed,) = old, new
        with pytest.warns(DeprecationWarning, match=f"field '{name}' of EditConfig is now called '{renamed}'") as found:
            config = EditConfig(**old)
        assert config == EditConfig(**new)
        assert [warning.filename for warning in found] == [__file__]

    def test_a_setting_is_replaced_by_its_old_name(self, old, new):
        other = EditConfig(token_schedule="full", template_weight=2.0)
        with pytest.warns(DeprecationWarning):
            assert dataclasses.replace(other, **old) == dataclasses.replace(other, **new)

    def test_a_setting_is_read_by_its_old_name(self, old, new):
        (name,), config = old, EditConfig(**new)
        with pytest.warns(DeprecationWarning, match=f"field '{name}' of EditConfig") as found:
            assert getattr(config, name) == old[name]
        assert [warning.filename for warning in found] == [__file__]

    def test_a_file_has_the_old_name(self, old, new):
        with pytest.warns(DeprecationWarning, match="of an edit is now called") as found:
            assert EditConfig.from_json(old) == EditConfig.from_json(new)
        assert [warning.filename for warning in found] == [__file__]

    def test_a_file_is_written_with_the_new_name(self, old, new):
        written = json.loads(json.dumps(EditConfig(**new).to_json()))
        assert {name: written[name] for name in new} == new
        assert not old.keys() & written.keys()


def test_values_are_checked_under_the_new_name():
    with pytest.warns(DeprecationWarning), pytest.raises(InputError, match="token_schedule must be one of full, ramp"):
        EditConfig(reach="nonsense")
    with pytest.warns(DeprecationWarning), pytest.raises(InputError, match="template_weight must be a finite number"):
        EditConfig.from_json({"held_weight": []})
