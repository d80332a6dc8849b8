import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import rocr
from rocr import Concept, EditConfig, InputError
from rocr.edit.lora import thin_factors, truncate, vllm_rank
from rocr.solve.factors import Factors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(layers=[1, 2], templates=("Who is {}?", "It is about {}."))
TOKENS = torch.tensor([[5, 61, 72, 83, 94], [300, 301, 302, 11, 12]])
ROUNDING = 2e-5  # of the change of the logits: (W + BA) x against W x + B (A x); at most 2.2e-6 was measured


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def exported(family, make_model, tokenizer, texts, concepts, tmp_path):
    """The model before, its logits after the edit, and the adapter's folder."""
    model = make_model(family)
    original = copy.deepcopy(model)
    statistics = rocr.collect_statistics(model, tokenizer, texts, CONFIG.layers)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    edit.export_lora(tmp_path / "adapter")
    return original, model, tmp_path / "adapter"


def test_peft_loads_the_adapter_and_merges_it(exported):
    original, edited, folder = exported
    before, after = logits(original), logits(edited)
    changed = (after - before).norm()
    assert changed > 0.01 * before.norm()
    adapted = peft.PeftModel.from_pretrained(original, folder)
    assert (logits(adapted) - after).norm() < ROUNDING * changed
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before)
    merged = adapted.merge_and_unload()
    assert (logits(merged) - after).norm() < ROUNDING * changed
    for (name, weight), (_, wanted) in zip(merged.named_parameters(), edited.named_parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_the_folder_holds_what_peft_needs_and_nothing_else(model, tokenizer, statistics, concepts, tmp_path):
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    edit.export_lora(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    assert config["lora_alpha"] == config["r"] == len(edit.concept_of)
    assert config["fan_in_fan_out"] is False
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for update in edit.updates:
        prefix = f"base_model.model.{update.parameter.removesuffix('.weight')}"
        product = tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double()
        torch.testing.assert_close(
            product, update.factors.left.double() @ update.factors.right.double(), rtol=1e-5, atol=1e-7
        )


def test_layers_whose_numbers_begin_alike(make_model, tokenizer, texts, concepts, tmp_path):
    model = make_model("Llama", num_hidden_layers=12)
    original = copy.deepcopy(model)
    config = EditConfig(layers=[1], key_tokens="last", templates=("Who is {}?",))
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
    rocr.unlearn(model, tokenizer, concepts, statistics, config).export_lora(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(original, tmp_path / "adapter").merge_and_unload()
    for (name, weight), (_, wanted) in zip(merged.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_more_keys_than_the_weight_has_rows(model, tokenizer, statistics, tmp_path):
    original = copy.deepcopy(model)
    concepts = [Concept(f"name {letter} of many", "a gardener") for letter in "abcdefgh"]
    config = EditConfig(layers=[1, 2], keys_per_concept="all", ridge=5.0)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config)
    assert len(edit.concept_of) > 48
    edit.export_lora(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 32
    adapted = peft.PeftModel.from_pretrained(original, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("d_out", "d_in", "inner"), [(13, 63, 9), (63, 13, 9), (40, 40, 30)])
def test_a_smaller_rank_is_the_best_at_the_keys_and_says_what_it_loses(d_out, d_in, inner):
    left, right, keys = torch.randn(d_out, inner), torch.randn(inner, d_in), torch.randn(inner, d_in)
    whole, at_keys = left.double() @ right.double(), keys.double().T
    values = torch.linalg.svdvals(whole @ at_keys)
    for rank in (1, 5, inner - 1):
        small_left, small_right, relative_error, key_error = truncate(left, right, keys, rank)
        lost = whole - small_left.double() @ small_right.double()
        assert small_left.shape[1] == small_right.shape[0] == rank
        assert relative_error == pytest.approx(float(lost.norm() / whole.norm()), rel=1e-5)
        assert key_error == pytest.approx(float((lost @ at_keys).norm() / (whole @ at_keys).norm()), rel=1e-4)
        # Eckart and Young: no matrix of this rank comes nearer at the keys.
        assert key_error == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4)
        # What is kept never moves an input further than the whole update does.
        inputs = torch.randn(d_in, 50, dtype=torch.float64)
        moved = (small_left.double() @ small_right.double() @ inputs).norm(dim=0)
        assert (moved <= (whole @ inputs).norm(dim=0) * (1 + 1e-5)).all()


def test_an_adapter_of_smaller_rank_loads_and_a_larger_one_changes_nothing(
    model, tokenizer, statistics, concepts, tmp_path
):
    original = copy.deepcopy(model)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    full = len(edit.concept_of)
    cut = edit.export_lora(tmp_path / "cut", rank=4)
    whole = edit.export_lora(tmp_path / "whole", rank=full + 5)
    assert [(layer.rank, layer.full_rank) for layer in cut] == [(4, full)] * 2
    assert all(0 < layer.key_error < 1 and 0 < layer.relative_error < 1 for layer in cut)
    assert [(layer.rank, layer.relative_error, layer.key_error) for layer in whole] == [(full, 0.0, 0.0)] * 2
    assert edit.export_lora(tmp_path / "same") == whole
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 4
    before, after = logits(original), logits(model)
    adapted = logits(peft.PeftModel.from_pretrained(original, tmp_path / "cut"))
    assert ROUNDING < (adapted - after).norm() / (after - before).norm() < 1


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "16"])
def test_what_is_no_rank_is_refused(rank, loaded_edit, tmp_path):
    with pytest.raises(InputError, match="whole number of at least 1"):
        loaded_edit.export_lora(tmp_path / "adapter", rank=rank)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)]
)
def test_merging_equals_the_edited_weights(dtype, exact, make_model, tokenizer, texts, concepts, tmp_path):
    """With the adapter in float32, as peft loads it, to one rounding of the weight; in half precision to its own.

    peft rounds a product of r terms in float32 before it adds it, within r / 2 roundings of the sum of its terms'
    magnitudes, and rocr sums it in an order of its own, within as many.
    """
    model = make_model("Llama").to(dtype)
    original = copy.deepcopy(model)
    statistics = rocr.collect_statistics(model, tokenizer, texts, CONFIG.layers)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    edit.export_lora(tmp_path / "adapter")
    firsts = [original.get_parameter(update.parameter).double() for update in edit.updates]
    adapted = peft.PeftModel.from_pretrained(original, tmp_path / "adapter", autocast_adapter_dtype=exact)
    merged = adapted.merge_and_unload()
    for update, first in zip(edit.updates, firsts, strict=True):
        mine, theirs = (each.get_parameter(update.parameter).detach().double() for each in (model, merged))
        difference, step = (mine - theirs).abs(), torch.finfo(dtype).eps * torch.maximum(mine.abs(), first.abs())
        terms = update.factors.left.double().abs() @ update.factors.right.double().abs()
        if exact:
            assert (difference <= step + torch.finfo(torch.float32).eps * update.factors.left.shape[1] * terms).all()
            # In 16 bits a sum in float32 is seldom on the other side of a halfway case.
            assert dtype == torch.float32 or (difference == 0).double().mean() > 0.99
        else:
            assert (difference <= step + torch.finfo(dtype).eps * terms).all()
            assert (difference == 0).double().mean() > 0.5


def test_vllms_limits():
    assert [vllm_rank(rank) for rank in (1, 2, 16, 17, 320, 512, 513)] == [1, 8, 16, 32, 320, 512, None]


def test_a_disk_too_small_is_refused_before_an_adapter_is_written(loaded_edit, tmp_path, monkeypatch):
    monkeypatch.setattr("rocr.io.disk_space.SPARE_BYTES", 2**60)
    for write in (loaded_edit.export_lora, loaded_edit.save):
        with pytest.raises(InputError, match="MiB are needed; nothing was written"):
            write(tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("d_out", "d_in"), [(13, 63), (63, 13), (1, 5), (5, 1)])
@pytest.mark.parametrize("inner", [1, 5, 200])
def test_thin_factors_have_the_same_product(d_out, d_in, inner):
    left, right = torch.randn(d_out, inner), torch.randn(inner, d_in)
    thin_left, thin_right = thin_factors(Factors(left, right))
    assert thin_left.shape[1] == thin_right.shape[0] == min(inner, d_out, d_in)
    torch.testing.assert_close(
        thin_left.double() @ thin_right.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5
    )


def test_an_output_that_exists_is_kept(model, tokenizer, statistics, concepts, tmp_path):
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match="exists"):
        edit.export_lora(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())
    edit.export_lora(tmp_path / "adapter", overwrite=True)
    assert len(list((tmp_path / "adapter").iterdir())) == 2


@pytest.mark.filterwarnings("error:.*adapter keys:UserWarning", "error:.*pattern keys:UserWarning")
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("changes", [{"keys_per_concept": "all"}, {}], ids=["all keys", "mean keys"])
def test_an_adapter_of_dense_layers_of_a_mixture(make_model, tokenizer, texts, concepts, tmp_path, changes, rank):
    """peft takes modules named down_proj for the experts', and would put the adapter nowhere."""
    model = make_model("Qwen3Moe", mlp_only_layers=[0, 1, 2], num_experts_per_tok=2)
    original = copy.deepcopy(model)
    config = EditConfig(layers=[1, 2], templates=CONFIG.templates, **changes)
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1, 2])
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, config)
    layers = edit.export_lora(tmp_path / "adapter", rank=rank)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_parameters"] == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    before, after = logits(original), logits(model)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
    if rank is None:
        assert (logits(adapted) - after).norm() < ROUNDING * (after - before).norm()
        assert (logits(adapted.merge_and_unload()) - after).norm() < ROUNDING * (after - before).norm()
    else:
        assert all(0 < layer.key_error < 1 for layer in layers)
        assert (logits(adapted) - after).norm() < (after - before).norm()


def test_ranks_that_differ_by_layer_are_filled_up_in_a_mixture(loaded_edit):
    from rocr.edit.lora import adapter_tensors

    first, second = loaded_edit.updates
    uneven = dataclasses.replace(second, factors=Factors(second.factors.left[:, :1], second.factors.right[:1]))
    edit = dataclasses.replace(loaded_edit, updates=[first, uneven], computed_with={"num_experts_per_tok": 2})
    own = {second.parameter: f"language_model.{second.parameter}"}  # of a vision-language checkpoint
    tensors, settings, _ = adapter_tensors(edit.with_own_names(own), None)
    assert (
        {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {settings["r"]} == {first.factors.right.shape[0]}
    )
    for parameter in (second.parameter, own[second.parameter]):
        name = f"base_model.model.{parameter.removesuffix('.weight')}"
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert torch.equal(product, uneven.factors.left @ uneven.factors.right)


@pytest.mark.parametrize("named", ["a_function", "nonesuch", "", 5, {}, None])
def test_what_is_no_class_of_a_model_is_never_called(named, files, concept, command, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("transformers.a_function", called.append, raising=False)
    shutil.copytree(files.model, tmp_path / "model")
    place = tmp_path / "model" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"architectures": [named]}))
    given = ("--statistics", files.statistics, "--save", "lora", "--out", tmp_path / "out")
    done = command("unlearn", tmp_path / "model", *concept, *given, "--json")
    assert "Traceback" not in done.errors and done.code in (0, 2) and not called
    if done.code == 0:
        assert all(layer["own"] is None for layer in json.loads(done.output)["lora"])
