import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rocr
from rocr import CollectOptions, InputError, Statistics
from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import down_projection_digests
from rocr.statistics.provenance import Provenance, computed_with, versions_now
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = (1, 2)
CUT = CollectOptions(length=32, batch_tokens=256)


def collect(model, tokenizer, texts, **options):
    return rocr.collect_statistics(model, tokenizer, texts, LAYERS, CollectOptions(**(vars(CUT) | options)))


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["rocr"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_says_how_its_text_was_read(model, tokenizer, texts, dtype, tmp_path):
    statistics = collect(model.to(dtype), tokenizer, texts)
    versions = {"rocr": rocr.__version__, "torch": torch.__version__, "transformers": versions_now()["transformers"]}
    before = down_projection_digests(find_architecture(model), max(statistics.layers))
    assert len(before) == max(statistics.layers)
    assert statistics.provenance == Provenance(
        str(dtype)[6:], 32, 1, computed_with(model), len(texts), versions, down_projections=before
    )
    assert statistics.provenance.config["rope_parameters"]["rope_theta"] == 10_000
    assert "rope_scaling" not in statistics.provenance.config
    statistics.save(tmp_path / "statistics")
    assert Statistics.load(tmp_path / "statistics").provenance == statistics.provenance


def test_text_by_the_model_itself(model, tokenizer):
    provenance = collect(model, tokenizer, None, tokens=500).provenance
    sequences = rocr.statistics.collect.sample_sequences(model, tokenizer, 500, 0)
    assert (provenance.length, provenance.documents) == (max(map(len, sequences)), len(sequences))


def test_the_length_is_that_which_the_model_has_positions_for(make_model, tokenizer, texts):
    model = make_model("Llama", max_position_embeddings=16)
    assert collect(model, tokenizer, texts).provenance.length == 16


@pytest.mark.parametrize(("collected", "edited"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_statistics_of_another_dtype_are_refused(model, tokenizer, texts, concepts, collected, edited, weights_of):
    model.bfloat16()  # the weights are the same numbers in both, and so is the fingerprint
    statistics = collect(copy.deepcopy(model).to(getattr(torch, collected)), tokenizer, texts)
    model.to(getattr(torch, edited))
    before = weights_of(model)
    with pytest.raises(InputError, match=rf"with dtype {collected}, but the model to edit has dtype {edited},"):
        rocr.unlearn(model, tokenizer, concepts, statistics, rocr.EditConfig(layers=LAYERS))
    assert same_weights(weights_of(model), before)
    own = collect(model, tokenizer, texts)
    assert own.fingerprint == statistics.fingerprint
    assert not torch.equal(own.second_moment(2), statistics.second_moment(2)), "the keys are the same ones"
    rocr.unlearn(model, tokenizer, concepts, own, rocr.EditConfig(layers=LAYERS))


@pytest.mark.parametrize("family", ["Llama", "GPT-2"], indirect=True)
def test_statistics_of_other_settings_are_refused(family, make_model, tokenizer, texts, concepts):
    eps = {"Llama": "rms_norm_eps", "GPT-2": "layer_norm_epsilon"}[family]
    statistics = collect(make_model(family), tokenizer, texts)
    other = make_model(family, **{eps: 0.5})
    assert collect(other, tokenizer, texts).fingerprint == statistics.fingerprint
    with pytest.raises(InputError, match=rf"with {eps} 1e-0\d, but the model to edit has {eps} 0\.5,"):
        rocr.unlearn(other, tokenizer, concepts, statistics, rocr.EditConfig(layers=LAYERS))
    with pytest.raises(InputError, match=f"cannot be merged: {eps}"):
        statistics.merge(collect(other, tokenizer, texts))
    # Another release of transformers may have other settings: those of one side only are ignored.
    known = statistics.provenance.config
    for config in ({name: value for name, value in known.items() if name != eps}, known | {"unheard_of": 3}):
        read = replace(statistics, provenance=replace(statistics.provenance, config=config))
        own = rocr.EditConfig(layers=LAYERS)
        rocr.unlearn(make_model(family), tokenizer, concepts, read, own, guards=rocr.Guards(force=True))


def test_the_command_refuses_them_and_writes_nothing(files, command, concept, tmp_path):
    given = (*concept, "--statistics", files.statistics, "--out", tmp_path / "out")
    done = command("unlearn", files.model, "--dtype", "bfloat16", *given)
    assert done.code == 2
    assert "collected on" in done.errors and "bfloat16" in done.errors
    assert not list(tmp_path.iterdir())


def test_info_shows_it(files, command):
    done = command("info", files.statistics, "--json")
    provenance = json.loads(done.output)["provenance"]
    assert (provenance["dtype"], provenance["length"], provenance["skipped"]) == ("float32", 128, 1)
    assert provenance["versions"] == versions_now()
    assert "dtype float32, length 128, skipped 1" in command("info", files.statistics).output


def test_merged_statistics_add_up_documents_and_versions(model, tokenizer, texts):
    first, second = collect(model, tokenizer, texts[:3]), collect(model, tokenizer, texts[3:])
    assert first.merge(second).provenance == replace(first.provenance, documents=len(texts))
    older = replace(
        second, provenance=replace(second.provenance, versions=second.provenance.versions | {"torch": "2.4.0"})
    )
    merged = first.merge(older).merge(older)
    assert merged.provenance.versions["torch"] == f"{torch.__version__}, 2.4.0"
    assert merged.provenance.documents == len(texts) + len(texts[3:])


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"length": 16}, {"skipped": 0}], ids=str)
def test_texts_that_were_read_differently_are_not_merged(model, tokenizer, texts, change):
    statistics = collect(model, tokenizer, texts)
    other = replace(statistics, provenance=replace(statistics.provenance, **change))
    name, value = next(iter(change.items()))
    mine = getattr(statistics.provenance, name)
    with pytest.raises(InputError, match=rf"cannot be merged: {name} {mine}, and {name} {value}\."):
        statistics.merge(other)
    with pytest.raises(InputError, match=rf"cannot be merged: {name} {value}, and {name} {mine}\."):
        other.merge(statistics)


def test_lengths_that_differ_for_real(model, tokenizer, texts):
    with pytest.raises(InputError, match="length 32, and length 16"):
        collect(model, tokenizer, texts).merge(collect(model, tokenizer, texts, length=16))


def test_a_file_that_does_not_say(model, tokenizer, texts, concepts, tmp_path):
    statistics = collect(model, tokenizer, texts)
    statistics.save(tmp_path / "statistics")
    header = header_of(tmp_path / "statistics")
    del header["provenance"]
    save_file(load_file(tmp_path / "statistics"), tmp_path / "old", metadata={"rocr": json.dumps(header)})
    old = Statistics.load(tmp_path / "old")
    assert old.provenance is None and old.tokens == statistics.tokens
    for one, other in ((old, statistics), (statistics, old)):
        with pytest.raises(InputError, match=r"has no provenance \(how its text was read\): collect it again"):
            one.merge(other)
    assert old.merge(old).provenance is None
    edit = rocr.unlearn(model, tokenizer, concepts, old, rocr.EditConfig(layers=LAYERS))
    assert edit.report.statistics == {"text": old.text, "tokens": old.tokens}


@pytest.mark.parametrize("difference", ["dtype", "torch", "device"])
def test_an_interrupted_collection_goes_on_in_the_same_way_or_not_at_all(model, tokenizer, texts, difference, tmp_path):
    class Stop(Exception):
        pass

    def stop(_):
        raise Stop

    options = CollectOptions(length=32, batch_tokens=64, text_sha256="of these", checkpoint=tmp_path / "state")
    model.bfloat16()
    with pytest.raises(Stop):
        rocr.collect_statistics(model, tokenizer, texts, LAYERS, options, stop)
    if difference == "dtype":
        model.float()
    else:
        header, tensors = header_of(options.checkpoint), load_file(options.checkpoint)
        dtype, device, config, versions = header["identity"]["computed"]
        assert (dtype, device, config, versions) == ("bfloat16", "cpu", computed_with(model), versions_now())
        other = ("cuda", versions) if difference == "device" else (device, versions | {"torch": "2.4.0"})
        header["identity"]["computed"] = [dtype, other[0], config, other[1]]
        save_file(tensors, options.checkpoint, metadata={"rocr": json.dumps(header)})
    before = options.checkpoint.read_bytes()
    with pytest.raises(
        InputError, match=r"checkpoint of another collection.* dtype, the device, a setting or a version"
    ):
        rocr.collect_statistics(model, tokenizer, texts, LAYERS, options)
    assert options.checkpoint.read_bytes() == before
