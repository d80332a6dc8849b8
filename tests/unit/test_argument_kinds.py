"""Arguments of another type than a public function takes: an InputError names the argument and says what to pass."""

import pytest

import rocr
from rocr.evaluation import EvaluateOptions

pytestmark = pytest.mark.usefixtures("one_thread")
PROBES = [rocr.Probe("Ada Byron", "Who wrote programs?", "Ada Byron"), rocr.Probe("rain", "What falls?", "rain")]
TEXT = "one long text"


@pytest.fixture
def call(model, tokenizer, texts, statistics, concepts):
    """call(function, argument=value): the function with its usual arguments and one other value."""
    reads = {"model": model, "tokenizer": tokenizer}
    edits = {**reads, "concepts": concepts, "statistics": statistics}
    usual = {
        rocr.unlearn: {**edits, "config": rocr.EditConfig(layers=(1, 2))},
        rocr.collect_statistics: {**reads, "texts": texts, "layers": (1, 2)},
        rocr.evaluate: {**reads, "probes": PROBES, "forms": ("qa",)},
        rocr.choose_redirects: {**reads, "probes": PROBES, "candidates": ["a gardener", "a key"], "forms": ("qa",)},
        rocr.propose_aliases: {**reads, "concepts": concepts, "languages": ("Greek",)},
        rocr.load_concepts: {"path": "list.txt"},
        rocr.load_probes: {"path": "list.jsonl"},
        rocr.Edit.load: {"path": "edit.safetensors"},
        rocr.Statistics.load: {"path": "statistics.safetensors"},
    }
    return lambda function, **other: function(**usual[function] | other)


@pytest.mark.parametrize(
    ("function", "argument", "value", "said"),
    [
        (rocr.collect_statistics, "texts", TEXT, "texts must be a list of texts, not a single text: 'one long text'"),
        (rocr.collect_statistics, "texts", TEXT.encode(), "texts must be a list of texts, not b'one"),
        (rocr.collect_statistics, "texts", 3, r"texts must be a list of texts, not 3 \(int\)"),
        (rocr.collect_statistics, "texts", [TEXT, 3], r"texts\[1\] must be one of a list of texts, not 3"),
        (rocr.collect_statistics, "texts", iter([TEXT, 3]), r"texts\[1\] must be a text, not 3"),
        (rocr.collect_statistics, "layers", "1,2", "layers must be a list of layer numbers, such as"),
        (rocr.collect_statistics, "layers", [1.5], "layers must be a list of layer numbers, such as"),
        (rocr.collect_statistics, "options", {"tokens": 3}, "options must be a rocr.CollectOptions, not {"),
        (rocr.unlearn, "concepts", "Ada Byron", r"concepts must be a list of rocr.Concept, not a single text: 'Ada"),
        (rocr.unlearn, "concepts", rocr.Concept("a", "b"), "concepts must be a list of rocr.Concept, not Concept"),
        (rocr.unlearn, "statistics", "s.safetensors", "statistics must be a rocr.Statistics, such as"),
        (rocr.unlearn, "config", {"ridge": 2}, r"config must be a rocr.EditConfig, not \{'ridge': 2\} \(dict\)"),
        (rocr.unlearn, "guards", {"force": True}, "guards must be a rocr.Guards, not {"),
        (rocr.unlearn, "base_edit", "edit.safetensors", "base_edit must be a rocr.Edit, such as"),
        (rocr.unlearn, "retain", "Grace Hopper", "retain must be a list of retained names, not a single text: 'Grace"),
        (rocr.unlearn, "ask", "5", "ask must be a whole number, not '5'"),
        (rocr.evaluate, "probes", PROBES[0], "probes must be a list of rocr.Probe, not Probe"),
        (rocr.evaluate, "probes", "probes.jsonl", "Read a file of probes with rocr.load_probes"),
        (rocr.evaluate, "forms", "qa", "forms must be a list of forms, not a single text: 'qa'"),
        (rocr.evaluate, "targets", "rain", "targets must be a list of names, not a single text: 'rain'"),
        (rocr.evaluate, "known", "0.5", "known must be a number from 0 to 1, not '0.5'"),
        (rocr.evaluate, "base", {}, "base must be a rocr.Evaluation, not {}"),
        (rocr.evaluate, "options", {}, "options must be a rocr.evaluation.EvaluateOptions, not {}"),
        (rocr.choose_redirects, "candidates", "rain", "candidates must be a list of names, not a single text: 'rain'"),
        (rocr.choose_redirects, "forms", "qa", "forms must be a list of forms, not a single text: 'qa'"),
        (rocr.choose_redirects, "chat", {}, "chat must be a rocr.ChatSettings, not {}"),
        (rocr.propose_aliases, "concepts", "Ada Byron", "concepts must be a list of rocr.Concept, not a single text"),
        (rocr.propose_aliases, "languages", "Greek", "languages must be a list of languages, not a single text"),
        (rocr.propose_aliases, "related", "yes", "related must be True or False, not 'yes'"),
        (rocr.propose_aliases, "redirect", None, "redirect must be a name, not None"),
        (rocr.propose_aliases, "chat", {}, "chat must be a rocr.ChatSettings, not {}"),
        (rocr.load_concepts, "path", ["list.txt"], r"path must be a path, not \['list.txt'\] \(list\)"),
        (rocr.load_probes, "path", None, "path must be a path, not None"),
        (rocr.Edit.load, "path", None, "path must be a path, not None"),
        (rocr.Statistics.load, "path", 3, r"path must be a path, not 3 \(int\)"),
    ],
)
def test_an_argument_of_another_type_is_named(function, argument, value, said, call):
    with pytest.raises(rocr.InputError, match=said):
        call(function, **{argument: value})


@pytest.mark.parametrize(
    "function",
    [rocr.unlearn, rocr.collect_statistics, rocr.evaluate, rocr.choose_redirects, rocr.propose_aliases],
)
def test_a_model_a_tokenizer_and_a_callback_must_be_callable(function, call):
    with pytest.raises(rocr.InputError, match=r"tokenizer must be the tokenizer of the model .*, not None"):
        call(function, tokenizer=None)
    with pytest.raises(rocr.InputError, match=r"progress must be a function of one argument, .*, not None"):
        call(function, progress=None)
    with pytest.raises(rocr.InputError, match=r"model must be a loaded model .*, not '/a/path'"):
        call(function, model="/a/path")


def test_the_methods_of_an_edit_name_arguments_too(model, tokenizer, statistics, concepts, call):
    edit = call(rocr.unlearn, guards=rocr.Guards(force=True), ask=0)
    with pytest.raises(rocr.InputError, match=r"statistics must be a rocr.Statistics, such as"):
        edit.add([rocr.Concept("Grace Hopper", "rain")], model, tokenizer, "s.safetensors")
    with pytest.raises(rocr.InputError, match=r"concepts must be a list of rocr.Concept, not a single text"):
        edit.add("Grace Hopper", model, tokenizer, statistics)
    with pytest.raises(rocr.InputError, match="progress must be a function"):
        edit.add([rocr.Concept("Grace Hopper", "rain")], model, tokenizer, statistics, progress=3)
    with pytest.raises(rocr.InputError, match="names must be a list of names, not 3"):
        edit.remove(3)
    with pytest.raises(rocr.InputError, match=r"other must be a rocr.Edit, not 'edit.safetensors'"):
        edit.merge("edit.safetensors")
    assert edit.remove("Ada Byron").concepts == concepts[1:], "one name is a name, not a list of characters"


def test_texts_that_are_read_once_and_other_sequences_are_taken(call, texts):
    expected = call(rocr.collect_statistics).tokens
    assert call(rocr.collect_statistics, texts=iter(texts), layers=range(1, 3)).tokens == expected
    assert call(rocr.collect_statistics, texts=tuple(texts)).tokens == expected


def test_one_alias_and_one_distractor_are_no_list_of_characters(call):
    with pytest.raises(rocr.InputError, match="aliases"):
        call(rocr.unlearn, concepts=[rocr.Concept("Ada Byron", "rain", "countess")])
    with pytest.raises(rocr.InputError, match="distractors"):
        call(rocr.evaluate, probes=[rocr.Probe("rain", "What falls?", "rain", "a key")])


def test_options_of_an_evaluation_are_taken(call):
    assert call(rocr.evaluate, options=EvaluateOptions(seed=1), known=0).probes == 2
