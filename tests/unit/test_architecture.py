import pytest
import torch
import transformers
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import rocr
from rocr.errors import InputError
from rocr.model.architecture import authors_layers, default_layers, find_architecture, positions_of
from tests.support.models import same_weights

NAMES = {
    "GPT-2": ("transformer.h", "mlp.c_proj"),
    "GPT-J": ("transformer.h", "mlp.fc_out"),
    "GPT-NeoX": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
}
LLAMA_LIKE = ("model.layers", "mlp.down_proj")


def test_every_family_is_found_by_its_structure(family, make_model):
    model = make_model(family)
    architecture = find_architecture(model)
    assert architecture.depth == 5
    layers, projection = NAMES.get(family, LLAMA_LIKE)
    found = architecture.down_projection(2)
    assert found.parameter_name == f"{layers}.2.{projection}.weight"
    assert found.transposed == (family == "GPT-2")
    stored = model.state_dict()[found.parameter_name]
    assert found.weight.data_ptr() == stored.data_ptr(), "the weight is a view, not a copy"
    assert torch.equal(found.weight.T if found.transposed else found.weight, stored)


def test_a_down_projection_multiplies_keys_by_its_weight(family, make_model):
    projection = find_architecture(make_model(family)).down_projection(1)
    keys = torch.randn(7, projection.weight.shape[1])
    bias = getattr(projection.module, "bias", None)
    expected = keys.double() @ projection.weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(projection.module(keys).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_mixture_has_no_single_down_projection(mixture, make_model):
    architecture = find_architecture(make_model(mixture))
    with pytest.raises(InputError, match=r"layers\.1\.\w+ is a mixture of experts, which has no single dense"):
        architecture.down_projection(1)


def test_the_dense_layers_of_a_mixture_can_be_edited(make_model):
    architecture = find_architecture(make_model("Qwen3Moe", mlp_only_layers=[0, 1]))
    assert architecture.down_projection(1).name == "model.layers.1.mlp.down_proj"
    with pytest.raises(InputError, match="mixture of experts"):
        architecture.down_projection(2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_refused(model):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj.* holds no plain weight: .* not quantised ones"):
        find_architecture(quantised).down_projection(1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_dtypes_that_cannot_be_edited_are_refused(model, dtype):
    module = model.model.layers[1].mlp.down_proj
    module.weight = nn.Parameter(module.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(InputError, match=f"holds {dtype} of shape .* only dense float32, bfloat16 and float16"):
        find_architecture(model).down_projection(1)


@pytest.mark.parametrize("layer", [-1, 5, 99])
def test_layers_out_of_range(model, layer):
    with pytest.raises(InputError, match=rf"Layer {layer} is out of range: the model has 5 decoder layers, 0 to 4"):
        find_architecture(model).down_projection(layer)


def test_what_is_no_language_model_is_refused(model):
    with pytest.raises(InputError, match="Sequential has no `config`"):
        find_architecture(nn.Sequential(nn.Linear(3, 3)))
    model.model.layers = nn.ModuleList(list(model.model.layers)[:4])
    with pytest.raises(InputError, match="LlamaForCausalLM has 0 lists of 5 decoder layers"):
        find_architecture(model)


@pytest.mark.parametrize("absent, words", [(("down_proj",), "returns 48 features"), ((), "has no dense matrix")])
def test_an_mlp_without_a_down_projection_is_refused(model, absent, words):
    mlp = model.model.layers[1].mlp
    for name in absent or [name for name, child in mlp.named_children() if isinstance(child, nn.Linear)]:
        setattr(mlp, name, nn.Identity())
    with pytest.raises(InputError, match=words):
        find_architecture(model).down_projection(1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_down_projection_that_two_layers_share_is_refused(model, tokenizer, statistics, concepts, whole, weights_of):
    first, second = (model.model.layers[layer].mlp for layer in (1, 3))
    if whole:
        second.down_proj = first.down_proj
    else:
        second.down_proj.weight = first.down_proj.weight
    before = weights_of(model)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight and .*layers\.3.* are the same weight"):
        rocr.unlearn(model, tokenizer, concepts, statistics, rocr.EditConfig(layers=[1]))
    assert same_weights(weights_of(model), before)


def test_an_mlp_that_does_not_return_to_the_residual_stream_is_refused(model):
    model.model.layers[1].mlp.down_proj = nn.Linear(48, 31)
    with pytest.raises(InputError, match="returns 31 features, but the hidden size is 32"):
        find_architecture(model).down_projection(1)


def test_default_layers_are_early_and_leave_a_layer_after_them():
    for depth in range(1, 130):
        layers = default_layers(depth)
        assert layers == tuple(sorted(set(layers))) and len(layers) == min(2, max(depth - 1, 1))
        assert layers[-1] < max(depth - 1, 1) and layers[-1] - layers[0] <= 2
        assert layers[0] > 0 or depth < 4
        assert layers[-1] <= max(3, depth // 7), "later, the tokens after a name have read it"


@pytest.mark.parametrize(
    ("depth", "layers"), [(28, (2, 4)), (32, (2, 4)), (12, (1, 3)), (5, (1, 3)), (4, (1, 2)), (2, (0,)), (80, (5, 7))]
)
def test_default_layers_of_known_depths(depth, layers):
    assert default_layers(depth) == layers


@pytest.mark.parametrize(("depth", "layers"), [(28, (4, 5, 6)), (32, (4, 5, 6)), (5, (0, 1, 2)), (80, (11, 12, 13))])
def test_the_authors_layers_of_known_depths(depth, layers):
    assert authors_layers(depth) == layers


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = TOWER | {"num_key_value_heads": 2, "vocab_size": 99}


def of_two_towers(kind):
    if kind == "Llava":
        config = transformers.LlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            image_token_index=98,
        )
        return transformers.LlavaForConditionalGeneration(config)
    config = transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 8},
        vision_config=TOWER | {"image_size": 28, "patch_size": 14},
        image_token_index=98,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["Llava", "Gemma 3"])
def test_of_towers_of_one_depth_the_language_model_is_found(kind):
    model = of_two_towers(kind)
    architecture = find_architecture(model)
    assert architecture.layers_name == "model.language_model.layers"
    architecture.check_down_projection(1)
    architecture.model.model.language_model.layers = nn.ModuleList(list(architecture.layers)[:3])
    with pytest.raises(
        InputError, match=r"has 1 lists of 4 decoder layers .*vision_.*that belongs to the language model"
    ):
        find_architecture(model)


def test_of_an_encoder_decoder_the_encoder_is_found():
    module = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for decoder_layers in (3, 4):
        config = transformers.T5GemmaConfig(
            encoder=module | {"num_hidden_layers": 3},
            decoder=module | {"num_hidden_layers": decoder_layers},
            vocab_size=99,
        )
        found = find_architecture(transformers.T5GemmaForConditionalGeneration(config))
        assert found.layers_name == "model.encoder.layers"
        assert found.depth == 3


def test_layers_that_attend_to_images_alone_are_refused(make_model, tokenizer, texts, concepts):
    config = MllamaTextConfig(
        **TEXT | {"vocab_size": len(tokenizer), "initializer_range": 0.2}, cross_attention_layers=[2], pad_token_id=1,
        rope_scaling={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = transformers.MllamaForCausalLM(config).eval()
    with pytest.raises(InputError, match=r"layers\.2 attends to images only and is skipped for text"):
        rocr.collect_statistics(model, tokenizer, texts, [1, 2])
    rocr.unlearn(
        model, tokenizer, concepts, rocr.collect_statistics(model, tokenizer, texts, [1]), rocr.EditConfig(layers=[1])
    )


@pytest.mark.parametrize(
    ("value", "positions"),
    [(128, 128), (128.0, 128), (99.9, 99), ("256", 256), (None, None), ([128], None), ("many", None),
     (float("inf"), None), (float("nan"), None), (0, 1)],
)  # fmt: skip
def test_positions_of_a_model(model, tokenizer, texts, concepts, value, positions):
    model.config.__dict__["max_position_embeddings"] = value
    assert positions_of(model) == positions
    if positions in (99, 256) or value == "many":
        statistics = rocr.collect_statistics(model, tokenizer, texts, [1])
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, rocr.EditConfig(layers=[1]))
        assert edit.report.divergence is not None
    if positions == 99:
        assert statistics.provenance.length == 99
        with pytest.raises(InputError, match="the model has 99 positions"):
            rocr.unlearn(
                model, tokenizer, concepts, statistics, rocr.EditConfig(layers=[1], templates=("rain " * 99 + "{}",))
            )


def test_settings_that_raise_are_left_out(model):
    from rocr.statistics.provenance import computed_with

    class PerLayer(type(model.config)):
        @property
        def rope_theta(self):
            raise ValueError("it is another one in each layer")

    before = computed_with(model)
    model.config.__class__ = PerLayer
    # transformers 4 keeps this setting in the configuration itself.
    assert computed_with(model) == {name: value for name, value in before.items() if name != "rope_theta"}
