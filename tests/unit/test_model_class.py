"""Which class of transformers a checkpoint is loaded as."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from rocr.errors import InputError
from rocr.model.load import find_model, load_model
from rocr.model.load_partial import empty_model
from rocr.model.model_class import auto_class_of, inner_language_model
from tests.support.models import SIZES

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
TEXT = SIZES | SMALL

NAMED = {
    "LlamaForCausalLM": (transformers.LlamaConfig, "AutoModelForCausalLM"),
    "Gemma3ForCausalLM": (transformers.Gemma3TextConfig, "AutoModelForCausalLM"),
    "LlavaForConditionalGeneration": (transformers.LlavaConfig, "AutoModelForImageTextToText"),
    "Qwen3_5ForConditionalGeneration": (transformers.Qwen3_5Config, "AutoModelForImageTextToText"),
    "Qwen3_5ForCausalLM": (transformers.Qwen3_5Config, "AutoModelForCausalLM"),
    "MllamaForConditionalGeneration": (transformers.MllamaConfig, "AutoModelForImageTextToText"),
    "Qwen2AudioForConditionalGeneration": (transformers.Qwen2AudioConfig, "AutoModelForMultimodalLM"),
    "T5ForConditionalGeneration": (transformers.T5Config, "AutoModelForSeq2SeqLM"),
    "T5EncoderModel": (transformers.T5Config, "AutoModelForTextEncoding"),
    "CLIPTextModel": (transformers.CLIPTextConfig, "AutoModelForTextEncoding"),
    "CLIPTextModelWithProjection": (transformers.CLIPTextConfig, "AutoModelForTextEncoding"),
    "CLIPModel": (transformers.CLIPConfig, "AutoModel"),
    "BertModel": (transformers.BertConfig, "AutoModelForTextEncoding"),
    "BertForMaskedLM": (transformers.BertConfig, "AutoModelForMaskedLM"),
    "BertLMHeadModel": (transformers.BertConfig, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_class_that_the_configuration_names(name):
    config_class, auto = NAMED[name]
    assert auto_class_of(config_class(architectures=[name])).__name__ == auto


@pytest.mark.parametrize(
    "named", [None, [], ["LlamaModel"], ["LlamaForSequenceClassification"], ["Trainer"], [5, {}], "LlamaModel", 7]
)
def test_without_a_known_class_it_is_the_one_that_writes_text(named):
    config = transformers.LlamaConfig()
    config.architectures = named
    assert auto_class_of(config) is transformers.AutoModelForCausalLM
    config = transformers.LlavaConfig()
    config.architectures = named
    assert auto_class_of(config) is transformers.AutoModelForImageTextToText


def test_code_of_the_model_is_preferred_only_on_request():
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    config.auto_map = {"AutoModelForImageTextToText": "modeling.Model"}
    assert auto_class_of(config) is transformers.AutoModelForCausalLM
    assert auto_class_of(config, trust_remote_code=True) is transformers.AutoModelForImageTextToText


def test_a_configuration_of_no_model_is_left_to_transformers():
    assert auto_class_of(SimpleNamespace()) is transformers.AutoModelForCausalLM


def test_the_language_model_inside():
    def inside(config_class, name):
        return inner_language_model(config_class(architectures=[name]))

    assert inside(transformers.Qwen3_5Config, "Qwen3_5ForConditionalGeneration") is not None
    assert inside(transformers.LlavaConfig, "LlavaForConditionalGeneration") is None
    assert inside(transformers.LlamaConfig, "LlamaForCausalLM") is None
    assert inside(transformers.Gemma3Config, "Gemma3ForConditionalGeneration") is None
    assert inside(transformers.BertConfig, "BertModel") is None


LOADED = {
    "CLIPTextModel": transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **SMALL
    ),
    "T5EncoderModel": transformers.T5Config(**T5),
    "BertModel": transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ),
    "LlamaForCausalLM": transformers.LlamaConfig(**TEXT),
}


@pytest.mark.parametrize("name", LOADED)
def test_a_folder_is_loaded_as_its_own_class(name, make_tokenizer, tmp_path):
    config = LOADED[name].__class__.from_dict(LOADED[name].to_dict() | {"vocab_size": 420})
    model = getattr(transformers, name)(config)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    loaded = load_model(source)
    assert type(loaded.model) is type(empty_model(source)) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_a_field_that_no_encoder_decoder_has_is_refused(make_model, tokenizer, tmp_path):
    make_model("Llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"is_encoder_decoder": True}))
    with pytest.raises(InputError, match="is_encoder_decoder of its configuration is true"):
        load_model(find_model(str(tmp_path)))
