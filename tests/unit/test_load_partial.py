import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import rocr
from rocr import InputError
from rocr.export.manifest import file_digest
from rocr.export.rewrite import rewrite_model
from rocr.io.safetensors_layout import read_layout
from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import fingerprint
from rocr.model.load import find_model, load_model
from rocr.model.load_partial import can_load_partially, empty_model, load_partial, needed_tensors
from rocr.model.weight_files import find_weight_files
from tests.support.hostile import safetensors_bytes, split_safetensors
from tests.support.models import FAMILIES
from tests.support.versions import needs_transformers

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def save(tokenizer, tmp_path):
    """save(model, shard size): the model's folder."""

    def saved(model, size="20KB", name="model"):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def source(folder: Path):
    return find_model(str(folder))


# How tensors are spread over files is not a matter of the family, so that one family in a single file is enough.
FAMILIES_AND_SIZES = [*((family, "20KB") for family in FAMILIES), ("Llama", "1GB")]


@pytest.mark.parametrize(("family", "size"), FAMILIES_AND_SIZES, ids=lambda value: value)
def test_the_beginning_of_every_family_computes_the_same(family, size, make_model, tokenizer, concepts, texts, save):
    folder = save(make_model(family), size)
    assert can_load_partially(source(folder))
    whole, part = load_model(source(folder)), load_partial(source(folder), 2)
    assert {p.device.type for p in find_architecture(part.model).layers[3].parameters()} == {"meta"}
    settings = rocr.EditConfig(layers=(1, 2), token_schedule="full", retain_weight=0.0)
    statistics = [rocr.collect_statistics(m.model, tokenizer, texts[:6], (1, 2)) for m in (whole, part)]
    assert statistics[0].fingerprint.model == statistics[1].fingerprint.model
    edits = [
        rocr.unlearn(loaded.model, tokenizer, concepts, own, settings)
        for loaded, own in zip((whole, part), statistics, strict=True)
    ]
    assert [update.applied.after for update in edits[0].updates] == [
        update.applied.after for update in edits[1].updates
    ]


@needs_transformers(5, "it does not load such weights")
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_weights_of_a_kind_that_is_never_edited_are_loaded_as_transformers_does(kind, make_model, save, weights_of):
    folder, name = save(make_model("Llama"), "1GB"), "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    weights[name] = (4 * weights[name]).to(kind)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    whole, part = load_model(source(folder)).model, load_partial(source(folder), 1).model
    assert part.get_parameter(name).dtype == torch.float32
    assert torch.equal(weights_of(part)[name], weights_of(whole)[name])
    assert part.get_parameter(name).any()


@needs_transformers(5, "it has no Gemma 4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalars_of_layers_that_are_stored_as_buffers(dtype, make_model, tokenizer, concepts, texts, save):
    """Gemma 4 stores such buffers in its files; they are not computed."""
    sizes = make_model("Llama").config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = transformers.Gemma4TextConfig(
        **{name: sizes[name] for name in (*names, "num_hidden_layers", "initializer_range")},
        bos_token_id=0, eos_token_id=1, pad_token_id=1, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=sizes["vocab_size"], num_kv_shared_layers=0,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config).to(dtype)
    digests = []
    for scalar in (1.0, 0.4):
        for layer in model.model.layers:
            layer.layer_scalar.fill_(scalar)
        digests.append(fingerprint(find_architecture(model), tokenizer, 2).model)
    assert digests[0] != digests[1], "keys depend on them"
    folder = save(model)
    loaded = [load_model(source(folder)), load_partial(source(folder), 2)]
    assert loaded[1].model.model.layers[1].layer_scalar == loaded[0].model.model.layers[1].layer_scalar < 0.5
    edits = []
    for each in loaded:
        statistics = rocr.collect_statistics(each.model, tokenizer, texts[:6], (1, 2))
        assert statistics.fingerprint.model == digests[1]
        edits.append(
            rocr.unlearn(
                each.model,
                tokenizer,
                concepts,
                statistics,
                rocr.EditConfig(layers=(1, 2), token_schedule="full", retain_weight=0.0),
            )
        )
    first, second = ([update.applied.after for update in edit.updates] for edit in edits)
    assert first == second


@needs_transformers(5, "it sets initial values in another way")
def test_initial_values_of_parameters_without_memory_are_not_drawn(make_model, save, monkeypatch):
    folder = save(make_model("Llama"))

    def drawn(*_, **__):
        raise AssertionError

    initialization = importlib.import_module("transformers.initialization")
    monkeypatch.setitem(initialization.TORCH_INIT_FUNCTIONS, "normal_", drawn)
    assert all(parameter.device.type == "meta" for parameter in empty_model(source(folder)).parameters())


def test_only_the_beginning_is_read(make_model, tokenizer, save):
    folder = save(make_model("Llama"))
    files = find_weight_files(folder)
    architecture = find_architecture(empty_model(source(folder)))
    needed = needed_tensors(files, architecture, 1)
    assert {stored.name for stored in needed} == {
        name
        for name in files.file_of
        if name.startswith(("model.embed", "model.norm", "model.layers.0.", "model.layers.1."))
    }
    mark = fingerprint(find_architecture(load_model(source(folder)).model), tokenizer, 1)
    part = find_architecture(load_partial(source(folder), 1).model)
    assert fingerprint(part, tokenizer, 1).model == mark.model


def test_weights_left_in_their_files_compute_the_same(
    make_model, tokenizer, concepts, texts, save, weights_of, digests
):
    folder = save(make_model("Llama").bfloat16())
    files, config = digests(folder), rocr.EditConfig(layers=(1, 2))
    models = [load_partial(source(folder), 2, mapped=mapped).model for mapped in (False, True)]
    first = {name: weight.clone() for name, weight in weights_of(models[1]).items() if weight.device.type == "cpu"}
    assert all(torch.equal(weight, weights_of(models[0])[name]) for name, weight in first.items())
    statistics = rocr.collect_statistics(models[0], tokenizer, texts[:6], (1, 2))
    edits = [rocr.unlearn(model, tokenizer, concepts, statistics, config) for model in models]
    read, mapped = ([update.applied.after for update in edit.updates] for edit in edits)
    assert read == mapped and not torch.equal(weights_of(models[1])[DOWN], first[DOWN])
    edits[1].revert(models[1])
    assert all(torch.equal(weights_of(models[1])[name], weight) for name, weight in first.items())
    assert digests(folder) == files


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_tensor_in_its_file_wherever_it_begins(tmp_path, shift):
    values = torch.randn(5000).bfloat16()
    save_file({"few": torch.ones(3, dtype=torch.uint8), "values": values}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * shift
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    stored = read_layout(tmp_path / "file")["values"]
    for found in (stored.map(), stored.read()):
        assert torch.equal(found, values)
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[: stored.start + stored.size - 1])
    for take in (stored.map, stored.read):
        with pytest.raises(InputError, match="ends within the tensor values"):
            take()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")
def test_weights_left_in_their_files_are_in_no_memory_of_their_own(tmp_path):
    def own():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    save_file({"values": torch.ones(2**24)}, tmp_path / "file")
    before = own()
    values = read_layout(tmp_path / "file")["values"].map()
    assert float(values.sum()) == 2**24 and own() - before < 2**23, "of 64 MiB, all of them used"


def test_tied_embeddings_stay_tied(make_model, save):
    folder = save(make_model("Llama", tie_word_embeddings=True))
    model = load_partial(source(folder), 1).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.device.type == "cpu"


def test_layers_that_were_not_loaded_are_not_edited(make_model, tokenizer, concepts, statistics, save):
    loaded = load_partial(source(save(make_model("Llama"))), 1)
    with pytest.raises(InputError, match="meta device"):
        rocr.unlearn(
            loaded.model,
            tokenizer,
            concepts,
            statistics,
            rocr.EditConfig(layers=(1, 2), token_schedule="full", retain_weight=0.0),
        )


def test_only_edited_tensors_are_rewritten(make_model, save, digests, tmp_path):
    folder = save(make_model("Llama").bfloat16())
    (folder / "consolidated.pth").write_bytes(b"the first weights in another format")
    before = digests(folder)
    files, name, out = find_weight_files(folder), "model.layers.1.mlp.down_proj.weight", tmp_path / "out"
    out.mkdir()
    values = torch.randn(32, 48).bfloat16()
    (rewritten,) = rewrite_model(files, {name: values}, out)
    assert len(files.files) > 5 and rewritten == files.file_of[name]
    for file in files.files:
        assert (out / file).samefile(folder / file) == (file != rewritten)
    old, new = (folder / rewritten).read_bytes(), (out / rewritten).read_bytes()
    place = files.find(name)
    assert (
        old[: place.start] == new[: place.start] and old[place.start + place.size :] == new[place.start + place.size :]
    )
    assert torch.equal(load_file(out / rewritten)[name], values)
    assert not (out / "consolidated.pth").exists()
    assert digests(folder) == before
    model = load_model(source(out)).model
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, values)


def test_files_are_copied_where_links_are_refused(make_model, save, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(18, "Invalid cross-device link")

    folder = save(make_model("Llama"))
    files = find_weight_files(folder)
    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "out").mkdir()
    rewrite_model(files, {}, tmp_path / "out")
    for file in files.files:
        assert not (tmp_path / "out" / file).samefile(folder / file)
        assert file_digest(tmp_path / "out" / file) == file_digest(folder / file)


def test_a_wrong_tensor_is_refused_before_anything_is_written(make_model, save, tmp_path):
    files, name = find_weight_files(save(make_model("Llama"))), "model.layers.1.mlp.down_proj.weight"
    (tmp_path / "out").mkdir()
    for values in (torch.zeros(32, 48, dtype=torch.bfloat16), torch.zeros(48, 32)):
        with pytest.raises(InputError, match="is stored as"):
            rewrite_model(files, {name: values}, tmp_path / "out")
    with pytest.raises(InputError, match="holds no tensor"):
        rewrite_model(files, {"model.layers.9.weight": torch.zeros(1)}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_index_that_points_elsewhere_is_refused(make_model, save):  # test_hostile_index.py has more such names
    folder = save(make_model("Llama"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"not the name of a safetensors file of this folder"):
        load_partial(source(folder), 1)


def test_links_out_of_the_folder_and_missing_shards_are_refused(make_model, save, tmp_path):
    folder = save(make_model("Llama"))
    shard = sorted(folder.glob("model-*.safetensors"))[3]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load_partial(source(folder), 1)
    (tmp_path / "elsewhere.safetensors").write_bytes(content)
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="outside the model's folder"):
        load_partial(source(folder), 1)


def test_shapes_that_disagree_are_refused(make_model, save):
    folder = save(make_model("Llama"), "1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"up_proj.weight in .* has the shape \(47, 32\), but the model's parameter has \(48, 32\)"
    ):
        load_partial(source(folder), 1)


@pytest.mark.parametrize("damage", ["cut", "hole", "kind"])
def test_damaged_layouts_are_refused(damage, make_model, save):
    folder = save(make_model("Llama"), "1GB")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header, data = split_safetensors(path)
    if damage == "cut":
        content = content[:-100]
    else:
        entry = header["model.embed_tokens.weight"]
        entry.update({"hole": {"data_offsets": [0, 8]}, "kind": {"dtype": "F16"}}[damage])
        content = safetensors_bytes(header, data)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_partial(source(folder), 1)


@needs_transformers(5, "it holds experts as the files do")
def test_layers_that_are_stored_in_different_ways_are_looked_at_each(make_model, save):
    """The files of a mixture of experts name each expert's matrices; the model holds them in one tensor."""
    folder = save(make_model("Qwen3Moe", mlp_only_layers=[0, 1, 4], num_experts_per_tok=2))
    whole = load_model(source(folder)).model
    for last in (1, 2, 4):
        assert can_load_partially(source(folder), last)
        part = load_partial(source(folder), last).model
        loaded = {name: values for name, values in part.named_parameters() if values.device.type != "meta"}
        assert ("model.layers.2.mlp.experts.gate_up_proj" in loaded) == (last > 1)
        assert all(torch.equal(values, whole.get_parameter(name)) for name, values in loaded.items())
