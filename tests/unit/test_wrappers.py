import copy
import json

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import rocr
from rocr import EditConfig, InputError
from rocr.edit.lora import adapter_tensors
from rocr.model.architecture import find_architecture, text_config
from rocr.model.fingerprint import adapter_digest, down_projection_digests, model_digest
from rocr.model.wrappers import own_modules, own_parameters
from tests.support.models import same_weights

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LAYERS = (1, 3)
CONFIG = EditConfig(layers=LAYERS, templates=("Who is {}?", "It is about {}."), variants="none")
TOKENS = torch.tensor([[5, 61, 72, 83, 94]])
TARGETS = {
    "attention": ["q_proj"],
    "MLP": ["gate_proj", "down_proj"],
    "down-projection": ["down_proj"],
}


def with_adapter(model, targets="MLP", **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=3, target_modules=TARGETS[targets], init_lora_weights=False, **options)
        ).eval()


def compiled_inside(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    model.model.layers[3].mlp = torch.compile(model.model.layers[3].mlp, backend="eager")
    model.model.layers[2] = checkpoint_wrapper(model.model.layers[2])
    return model


def compiled_in_place(model):
    model.model.layers[1].compile(backend="eager")
    model.model.layers[3].mlp.compile(backend="eager")
    model(TOKENS)  # hooks that are registered after this are not in the compiled code
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled inside": compiled_inside,
    "compiled in place": compiled_in_place,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def unlearned(model, tokenizer, texts, concepts):
    return rocr.unlearn(model, tokenizer, concepts, rocr.collect_statistics(model, tokenizer, texts, LAYERS), CONFIG)


@pytest.fixture(scope="module")
def plain_edit(_llama, tokenizer, texts, concepts):
    return unlearned(copy.deepcopy(_llama), tokenizer, texts, concepts)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_edited_as_the_one_inside(wrapper, model, plain_edit, tokenizer, texts, concepts):
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain_names = list(first)
    digest = model_digest(find_architecture(model), 4)
    parameters = dict(own_parameters(model))
    wrapped = WRAPPERS[wrapper](model)
    assert [name for name, _ in own_parameters(wrapped)] == plain_names
    assert model_digest(find_architecture(wrapped), 4) == digest
    assert text_config(wrapped) is model.config
    edit = unlearned(wrapped, tokenizer, texts, concepts)
    assert [update.parameter for update in edit.updates] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS
    ]
    assert edit.fingerprint == plain_edit.fingerprint
    for mine, its in zip(edit.updates, plain_edit.updates, strict=True):
        torch.testing.assert_close(
            mine.factors.left @ mine.factors.right, its.factors.left @ its.factors.right, rtol=1e-4, atol=1e-6
        )
    assert set(adapter_tensors(edit, None)[0]) == set(adapter_tensors(plain_edit, None)[0])
    edit.revert(wrapped)
    assert all(torch.equal(parameter, first[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "peft", "compiled peft"])
def test_an_edit_goes_on_and_off_with_and_without_the_wrapper(wrapper, model, plain_edit, weights_of):
    def wrap(plain):
        if "peft" not in wrapper:
            return WRAPPERS[wrapper](plain)
        adapted = with_adapter(plain)
        return torch.compile(adapted, backend="eager") if "compiled" in wrapper else adapted

    edit = copy.copy(plain_edit)
    plain = copy.deepcopy(model)
    edit.apply(plain)
    edited = {name: weight for name, weight in weights_of(plain).items() if "down_proj" in name}
    wrapped = wrap(plain)
    edit.revert(wrapped)
    assert weights_of_base(wrapped, weights_of).keys() == weights_of(model).keys()
    assert same_weights(weights_of_base(wrapped, weights_of), weights_of(model))
    if "peft" in wrapper:
        with pytest.raises(InputError, match=r"with adapter none, but this model has adapter [0-9a-f]{8}"):
            edit.apply(wrapped)
    edit.apply(wrapped, allow_fingerprint_mismatch=True)
    found = weights_of_base(wrapped, weights_of)
    assert all(torch.equal(found[name], weight) for name, weight in edited.items())


def weights_of_base(wrapped, weights_of):
    holder = nn.Module()
    names = {name.replace(".", "-"): parameter for name, parameter in own_parameters(wrapped)}
    for name, parameter in names.items():
        holder.register_parameter(name, parameter)
    return {name.replace("-", "."): weight for name, weight in weights_of(holder).items()}


@pytest.mark.parametrize("targets", TARGETS)
def test_a_model_with_an_adapter_is_edited_in_its_base_weight(
    targets, model, tokenizer, texts, concepts, weights_of, tmp_path
):
    """The edit is computed with the adapter active: it equals the edit of the model with merged weights."""
    plain = copy.deepcopy(model)
    adapted = with_adapter(model, targets)
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    before, changed = weights_of(plain), logits(merged)
    assert (changed - logits(plain)).norm() > 0.05 * changed.norm(), "the adapter does something"
    edit = unlearned(adapted, tokenizer, texts, concepts)
    expected = unlearned(merged, tokenizer, texts, concepts)
    assert [update.parameter for update in edit.updates] == [update.parameter for update in expected.updates]
    for mine, its in zip(edit.updates, expected.updates, strict=True):
        difference = (mine.factors.left @ mine.factors.right - its.factors.left @ its.factors.right).norm()
        assert (
            difference < 1e-3 * (its.factors.left @ its.factors.right).norm()
        )  # float32 of W x + B A x against (W + B A) x
    assert (logits(adapted) - logits(merged)).norm() < 1e-3 * (logits(merged) - changed).norm()
    edit.export_lora(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == {f"model.layers.{layer}.mlp.down_proj" for layer in LAYERS}
    edit.save(tmp_path / "edit")
    edit = rocr.Edit.load(tmp_path / "edit")
    base = adapted.unload()
    edit.revert(base)
    assert same_weights(weights_of(base), before)
    with pytest.raises(InputError, match=r"with adapter [0-9a-f]{8}.* but this model has adapter none"):
        edit.apply(base)
    edit.apply(base, allow_fingerprint_mismatch=True)


def test_statistics_with_an_adapter_are_not_those_without(model, tokenizer, texts, concepts):
    plain = copy.deepcopy(model)
    adapted = with_adapter(model, "attention")
    of_both = [rocr.collect_statistics(each, tokenizer, texts, LAYERS) for each in (plain, adapted)]
    assert of_both[0].fingerprint == of_both[1].fingerprint
    for each, other in ((plain, of_both[1]), (adapted, of_both[0])):
        with pytest.raises(InputError, match="with adapter"):
            rocr.unlearn(each, tokenizer, concepts, other, CONFIG)
    with pytest.raises(InputError, match="read differently cannot be merged: adapter"):
        of_both[0].merge(of_both[1])
    with adapted.disable_adapter():
        rocr.unlearn(adapted, tokenizer, concepts, of_both[0], CONFIG)


def test_the_digest_of_adapters(model):
    assert adapter_digest(model) is None
    adapted = with_adapter(model)
    first = adapter_digest(adapted)
    assert first == adapter_digest(adapted.base_model.model), "the same layers, without the outer wrapper"
    with adapted.disable_adapter():
        assert adapter_digest(adapted) is None
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapter_digest(adapted) == first, "an adapter that is not active does nothing"
    adapted.set_adapter("other")
    assert adapter_digest(adapted) not in (None, first)
    adapted.set_adapter("default")
    layer = adapted.base_model.model.model.layers[0].mlp.down_proj
    layer.scaling["default"] *= 2
    assert adapter_digest(adapted) not in (None, first)
    layer.scaling["default"] /= 2
    adapted.merge_adapter()
    assert adapter_digest(adapted) is None
    adapted.unmerge_adapter()


def test_trained_embeddings_and_other_kinds_of_adapters_keep_the_names_of_the_base(model, tokenizer, texts, concepts):
    names = [name for name, _ in own_parameters(model)]
    digest = model_digest(find_architecture(model), 4)
    for config in (
        peft.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["embed_tokens"]),
        peft.LoraConfig(r=2, target_modules=["down_proj"], use_dora=True),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["down_proj"]),
    ):
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        assert [name for name, _ in own_parameters(adapted)] == names
        assert model_digest(find_architecture(adapted), 4) == digest
        edit = unlearned(adapted, tokenizer, texts, concepts)
        assert [update.parameter for update in edit.updates] == [
            f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS
        ]
        assert max(edit.report.distance) < 0.9


def test_an_adapter_that_transformers_put_into_a_model(model, plain_edit):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    assert find_architecture(model).down_projection(1).parameter_name == plain_edit.updates[0].parameter
    assert adapter_digest(model) is not None


def test_an_adapter_that_changes_the_weight_while_it_runs_is_refused(model):
    name = "model.layers.1.mlp.down_proj"
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"{name}.weight"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert find_architecture(adapted).down_projection(1).name == name
    with pytest.raises(InputError, match=r"down_proj, a Linear, is not its input times its weight"):
        find_architecture(adapted).check_down_projection(1)


def test_prompts_that_are_learned_are_refused(model, tokenizer, texts):
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(InputError, match="adds tokens or states to every text, as prompt and prefix tuning do"):
        rocr.collect_statistics(adapted, tokenizer, texts, LAYERS)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_flat_parameters_are_refused(model, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model.model.layers[2] = FullyShardedDataParallel(model.model.layers[2], device_id=torch.device("cpu"))
        for wrapped in (model, FullyShardedDataParallel(model, device_id=torch.device("cpu"))):
            with pytest.raises(InputError, match="is inside FullyShardedDataParallel"):
                find_architecture(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_digests_of_down_projections_are_those_of_the_base(model):
    digests = down_projection_digests(find_architecture(model), 4)
    assert down_projection_digests(find_architecture(with_adapter(model)), 4) == digests


def test_a_module_in_two_places_is_given_once(model):
    model.model.layers[3] = model.model.layers[1]
    assert [name for name, _ in own_parameters(model)] == [name for name, _ in model.named_parameters()]
    assert [name for name, *_ in own_modules(model)] == [name for name, _ in model.named_modules()]
