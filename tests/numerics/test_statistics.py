import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rocr
from rocr import CollectOptions, Concept, EditConfig, InputError, Statistics
from rocr.io.tensors import write_tensors
from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import Fingerprint, fingerprint
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDING = 1e-6  # merged against one run, relative to the largest entry; at most 2e-7 was measured
CUT = CollectOptions(length=16, batch_tokens=256)
CONCEPTS = [Concept("Ada Byron", "Blaise Pascal")]


def collect(model, tokenizer, texts, layers=(1, 2)):
    return rocr.collect_statistics(model, tokenizer, texts, layers, CUT)


def assert_near(found, expected):
    assert found.tokens == expected.tokens
    for layer in expected.layers:
        moment = expected.second_moment(layer)
        assert (found.second_moment(layer) - moment).abs().max() < ROUNDING * moment.abs().max()


def test_merged_from_parts_equals_one_run(model, tokenizer, texts):
    first, second, third = f" {texts[1]}" * 16, f" {texts[3]}" * 15 + " Ada", texts[5]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (first, second)]
    assert lengths[0] % 16 == 0
    whole = collect(model, tokenizer, [first, second, third])
    # One run joins documents by the end-of-text token; written out, it lets the parts be cut at the same places.
    end = tokenizer.eos_token
    rest = collect(model, tokenizer, [f"{end}{second}{end}{third}"])
    assert_near(collect(model, tokenizer, [first]).merge(rest), whole)
    assert_near(rest.merge(collect(model, tokenizer, [first])), whole)


def test_merging_weighs_means_by_their_tokens(model, tokenizer, texts):
    parts = [collect(model, tokenizer, [text]) for text in texts[:3]]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.tokens == sum(part.tokens for part in parts)
    assert merged.text == "+".join(part.text for part in parts)
    for layer in (1, 2):
        mean = sum(part.second_moment(layer).double() * part.tokens for part in parts) / merged.tokens
        torch.testing.assert_close(merged.second_moment(layer).double(), mean, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(merged.second_moment(layer), parts[0].second_moment(layer))


def test_saved_and_loaded_to_the_last_bit(statistics, tmp_path):
    statistics.save(tmp_path / "statistics")
    loaded = Statistics.load(tmp_path / "statistics")
    assert (loaded.tokens, loaded.text, loaded.fingerprint, loaded.layers) == (
        statistics.tokens,
        statistics.text,
        statistics.fingerprint,
        statistics.layers,
    )
    assert all(torch.equal(loaded.second_moment(layer), statistics.second_moment(layer)) for layer in loaded.layers)
    with pytest.raises(InputError, match="exists"):
        statistics.save(tmp_path / "statistics")
    statistics.save(tmp_path / "statistics", overwrite=True)


def test_loaded_statistics_give_the_same_edit(model, tokenizer, concepts, statistics, tmp_path, weights_of):
    rocr.unlearn(other := copy.deepcopy(model), tokenizer, concepts, statistics)
    statistics.save(tmp_path / "statistics")
    rocr.unlearn(model, tokenizer, concepts, Statistics.load(tmp_path / "statistics"))
    assert same_weights(weights_of(model), weights_of(other))


def test_layers_that_are_not_covered(model, tokenizer, statistics, texts):
    with pytest.raises(InputError, match=r"cover layers 0, 1, 2, 3, 4, not layer 7"):
        statistics.second_moment(7)
    with pytest.raises(InputError, match=r"cover layers 1, 2, not layer 3"):
        rocr.unlearn(model, tokenizer, CONCEPTS, collect(model, tokenizer, texts), EditConfig(layers=[2, 3]))


@pytest.mark.parametrize("difference", ["weights", "depth", "width", "family", "tokenizer", "chat template"])
def test_statistics_of_another_model_are_refused(make_model, make_tokenizer, tokenizer, texts, difference, weights_of):
    model, other_tokenizer = {
        "weights": lambda: (make_model("Llama", seed=1), tokenizer),
        "depth": lambda: (make_model("Llama", num_hidden_layers=2), tokenizer),
        "width": lambda: (make_model("Llama", intermediate_size=40), tokenizer),
        "family": lambda: (make_model("Qwen2"), tokenizer),
        "tokenizer": lambda: (make_model("Llama"), make_tokenizer(start=True)),
        "chat template": lambda: (make_model("Llama"), make_tokenizer(chat=None)),
    }[difference]()
    statistics = collect(make_model("Llama"), tokenizer, texts, (0, 3))
    before = weights_of(model)
    with pytest.raises(InputError, match=r"collected on LlamaForCausalLM .* but the model to edit is \w+ \(model"):
        rocr.unlearn(model, other_tokenizer, CONCEPTS, statistics, EditConfig(layers=[0]))
    assert same_weights(weights_of(model), before)


def test_statistics_of_another_model_or_of_other_layers_are_not_merged(model, make_model, tokenizer, texts):
    statistics = collect(model, tokenizer, texts)
    with pytest.raises(InputError, match="collected on LlamaForCausalLM"):
        statistics.merge(collect(make_model("Llama", seed=1), tokenizer, texts))
    with pytest.raises(InputError, match=r"layers \(1, 2\) cannot be merged with those of \(1, 3\)"):
        statistics.merge(collect(model, tokenizer, texts, (1, 3)))
    with pytest.raises(InputError, match=r"layers \(1, 2\) cannot be merged with those of \(2,\)"):
        statistics.merge(collect(model, tokenizer, texts, (2,)))


def test_layers_that_share_a_tensor_are_saved(statistics, tmp_path):
    moment = statistics.second_moment(1)
    shared = replace(statistics, moments={1: moment, 2: moment, 3: moment[:]})
    shared.save(tmp_path / "shared")
    loaded = rocr.Statistics.load(tmp_path / "shared")
    assert all(torch.equal(loaded.second_moment(layer), moment) for layer in (1, 2, 3))


def test_a_forged_size_is_refused(model, tokenizer, statistics):
    forged = replace(statistics, moments={layer: torch.eye(47) for layer in statistics.layers})
    with pytest.raises(InputError, match="layer 1 are of keys of size 47, but the model's have size 48"):
        rocr.unlearn(model, tokenizer, CONCEPTS, forged)


@pytest.fixture
def parts(statistics, tmp_path):
    """Header and tensors of a statistics file, and a function that writes them with changes."""
    path = tmp_path / "statistics"
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["rocr"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(**changes):
        moments = {**tensors, **changes.pop("tensors", {})}
        save_file(moments, path, metadata={"rocr": json.dumps({**header, **changes})})
        return path

    return write


def test_damaged_files_are_refused(parts):
    path = parts()
    whole = path.read_bytes()
    Statistics.load(path)
    for damaged in (b"", whole[:1000], whole[:-4], whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{path} is not a safetensors file"):
            Statistics.load(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "rocr edit 1"}, "has the format 'rocr edit 1', but 'rocr statistics 1' is needed"),
        ({"tokens": 0}, "5 second moments of 0 tokens"),
        ({"tokens": "many"}, "of many tokens"),
        ({"fingerprint": {"model": "x"}}, "not a complete statistics file"),
        ({"fingerprint": {"model": None, "layer": 1, "tokenizer": "x", "name": "x"}}, "not a complete statistics file"),
        ({"fingerprint": 3}, "not a complete statistics file"),
        ({"tensors": {"second_moment.one": torch.zeros(2, 2)}}, "not a complete statistics file"),
        ({"tensors": {"second_moment.1": torch.zeros(2, 3)}}, r"layer 1 is torch\.float32 of shape \(2, 3\)"),
        ({"tensors": {"second_moment.1": torch.zeros(2)}}, r"layer 1 is torch\.float32 of shape \(2,\)"),
        ({"tensors": {"second_moment.1": torch.zeros(2, 2).half()}}, r"layer 1 is torch\.float16"),
        (
            {"tensors": {"second_moment.1": torch.full((2, 2), float("nan"))}},
            "layer 1 holds values that are not finite",
        ),
    ],
)
def test_files_with_wrong_contents_are_refused(parts, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        Statistics.load(parts(**changes))


def test_a_file_without_moments(tmp_path):
    mark = Fingerprint("a", 1, "b", "c")
    Statistics({}, 5, "t", mark).save(tmp_path / "empty")
    with pytest.raises(InputError, match="0 second moments of 5 tokens"):
        Statistics.load(tmp_path / "empty")


@pytest.fixture
def edited(model, tokenizer, statistics):
    """A copy of the model that carries an edit of layer 1."""
    other = copy.deepcopy(model)
    rocr.unlearn(other, tokenizer, CONCEPTS, statistics, EditConfig(layers=[1]))
    return other


def test_statistics_of_an_edited_model_are_not_those_of_the_original(
    model, edited, tokenizer, texts, statistics, tmp_path
):
    of_the_edited = rocr.collect_statistics(edited, tokenizer, texts, [1, 3])
    of_the_edited.save(tmp_path / "statistics")
    config = EditConfig(layers=[3])
    for given, each in (
        (of_the_edited, model),
        (Statistics.load(tmp_path / "statistics"), model),
        (statistics, edited),
    ):
        with pytest.raises(InputError, match=r"other down-projections than .* at layer 1: .*\(revert\).*\(Edit\.add\)"):
            rocr.unlearn(copy.deepcopy(each), tokenizer, CONCEPTS, given, config)
    with pytest.raises(InputError, match=r"have other down-projections at layer 1: one of them carried an edit"):
        rocr.collect_statistics(model, tokenizer, texts, [1, 3]).merge(of_the_edited)
    # The keys of a layer do not depend on its own down-projection, nor on later ones.
    rocr.unlearn(copy.deepcopy(model), tokenizer, CONCEPTS, of_the_edited, EditConfig(layers=[1]))
    rocr.unlearn(copy.deepcopy(edited), tokenizer, CONCEPTS, statistics, EditConfig(layers=[1]))
    rocr.unlearn(edited, tokenizer, CONCEPTS, of_the_edited, config)


def test_an_edit_is_changed_with_the_statistics_of_the_original(model, tokenizer, statistics):
    config = EditConfig(layers=[1, 3])
    edit = rocr.unlearn(model, tokenizer, CONCEPTS, statistics, config)
    added = edit.add([rocr.Concept("Æsop", "a gardener")], model, tokenizer, statistics)
    assert len(added.concepts) == len(CONCEPTS) + 1
    added.remove("Æsop", model).revert(model)
    rocr.unlearn(model, tokenizer, CONCEPTS, statistics, config)


def test_statistics_of_rocr_0_1_stay_usable(model, tokenizer, statistics, concepts, tmp_path):
    """Their fingerprint took other values, and they do not say which down-projections there were."""
    old = fingerprint(find_architecture(model), tokenizer, 4, like=replace(statistics.fingerprint, model="0" * 64))
    assert old.is_old and not statistics.fingerprint.is_old
    provenance = replace(statistics.provenance, down_projections=())
    replace(statistics, fingerprint=old, provenance=provenance).save(tmp_path / "old")
    loaded = Statistics.load(tmp_path / "old")
    assert "down_projections" not in loaded.provenance.to_json() and loaded.fingerprint == old
    other = copy.deepcopy(model)
    edit = rocr.unlearn(other, tokenizer, concepts, loaded)
    assert edit.fingerprint == old
    edit.save(tmp_path / "edit")
    again = rocr.Edit.load(tmp_path / "edit")
    again.add([rocr.Concept("Æsop", "a gardener")], other, tokenizer, loaded).revert(other)
    again.apply(model)
    again.revert(model)
    with pytest.raises(InputError, match=r"one is a fingerprint of rocr 0\.1"):
        loaded.merge(statistics)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    with pytest.raises(InputError, match=r"collected on .* but the model to edit is"):
        rocr.unlearn(model, tokenizer, concepts, loaded)
    with pytest.raises(InputError, match=r"was made for .* but this model's fingerprint is"):
        again.apply(model)


@pytest.mark.parametrize("value", [3, [3], [None], {"1": "x"}, "abc"])
def test_digests_that_are_none_are_refused(statistics, tmp_path, value):
    statistics.save(tmp_path / "statistics")
    with safe_open(tmp_path / "statistics", framework="pt") as file:
        header = json.loads(file.metadata()["rocr"])
    header["provenance"]["down_projections"] = value
    write_tensors(tmp_path / "forged", header, load_file(tmp_path / "statistics"))
    with pytest.raises(InputError, match="not a complete statistics file"):
        Statistics.load(tmp_path / "forged")
