"""Checks at loading: bad fields of the files of a model are refused by name, or ignored."""

import json
import os

import pytest
import torch

import rocr
from rocr import InputError
from rocr.model.check_tokenizer import MAX_GROWTH, check_tokenizer_file
from rocr.model.generate import ask
from rocr.model.load import find_model, load_model, save_model
from rocr.model.load_partial import empty_model, load_partial

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
FP8 = {"quant_method": "fp8"}


@pytest.fixture
def bad(hostile_folder, within_limits):
    """bad(file, **fields): load a model whose JSON file was changed, within limits of time and memory."""

    def load(name, by=load_model, **fields):
        if not (hostile_folder.path / name).exists():
            hostile_folder.write(name, "{}")
        hostile_folder.change(name, **fields)
        with within_limits():
            return by(find_model(str(hostile_folder.path)))

    return load


def partly(source):
    return load_partial(source, 1)


REFUSED = {
    "labels": ({"num_labels": 10**9}, "num_labels 1000000000"),
    "names of labels": ({"id2label": {str(i): "x" for i in range(100_001)}}, "id2label"),
    "numbers of labels": ({"label2id": ["x"]}, r'label2id \["x"\]'),
    "heads": ({"num_attention_heads": 10**9}, "num_attention_heads 1000000000, .* at most 420"),
    "experts": ({"num_experts": 10**9}, "num_experts"),
    "a wide middle": ({"intermediate_size": 10**9}, "intermediate_size"),
    "a text part": ({"text_config": {"hidden_size": 10**9}}, "text_config.hidden_size 1000000000"),
    "a deep vision part": ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers"),
    "a part of a part": ({"a_config": {"b_config": {"n_embd": 10**9}}}, "a_config.b_config.n_embd"),
    "dropout as a text": ({"attention_dropout": "0.1"}, 'attention_dropout "0.1", but a dropout is a number'),
    "dropout above 1": ({"resid_pdrop": 7}, "resid_pdrop 7"),
    "float8": ({"dtype": "float8_e4m3fn"}, 'dtype "float8_e4m3fn"'),
    "float64": ({"torch_dtype": "float64"}, 'torch_dtype "float64"'),
    "no dtype": ({"dtype": "nonsense"}, 'dtype "nonsense"'),
    "a list as dtype": ({"dtype": ["float32"]}, "dtype"),
    "plain weights said to be quantised": ({"quantization_config": FP8}, "quantization_config .*plain float32"),
    "plain text weights": ({"text_config": {"quantization_config": FP8}}, "text_config.quantization_config"),
    "a quantisation that is none": ({"quantization_config": [1]}, "quantization_config"),
    "a quantisation without a name": (
        {"quantization_config": {"quant_method": 5}},
        "quantization_config .*quant_method",
    ),
    "attention from a repository": ({"attn_implementation": "owner/repo"}, "attn_implementation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_is_refused_by_the_name_of_its_field(name, bad):
    fields, sentence = REFUSED[name]
    with pytest.raises(InputError, match=rf"config\.json says {sentence}"):
        bad("config.json", **fields)


DIAGNOSED = {
    "a padding token": ({"pad_token_id": 10**9}, r"can be built without the field pad_token_id \(1000000000\)"),
    "rotations": ({"rope_scaling": {"rope_type": "none"}}, "can be built without the field rope_scaling"),
    "labels without numbers": ({"id2label": {"a": "b"}}, "can be built without the field id2label"),
    "a cache": ({"use_cache": "x"}, "field 'use_cache': .* expected bool"),
    "heads of another size": ({"head_dim": 16}, r"q_proj.weight has the shape \(32, 32\) in the files, .* \(64, 32\)"),
    "an encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder"),
}


@pytest.mark.parametrize("name", DIAGNOSED)
def test_what_transformers_does_not_name_is_named(name, bad):
    fields, sentence = DIAGNOSED[name]
    with pytest.raises(InputError, match=sentence):
        bad("config.json", **fields)


@pytest.mark.parametrize("by", [load_model, empty_model, partly])
def test_a_buffer_that_the_weights_cannot_fill_is_refused_before_it_is_made(by, make_model, tokenizer, tmp_path):
    make_model("GPT-J").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_positions": 10**9}))
    with pytest.raises(InputError, match=r"makes .* a tensor of 16,000,000,000 bytes"):
        by(find_model(str(tmp_path)))


PUT_ASIDE = [
    {"return_dict": False}, {"torchscript": True}, {"output_hidden_states": True}, {"output_attentions": True},
    {"return_dict": "x"},
]  # fmt: skip


@pytest.mark.parametrize("fields", PUT_ASIDE, ids=lambda fields: next(iter(fields)))
def test_settings_that_change_what_a_pass_returns_have_no_effect(fields, bad, tokenizer, concepts, statistics):
    loaded = bad("config.json", **fields)
    config = rocr.EditConfig(layers=(1, 2))
    edit = rocr.unlearn(loaded.model, loaded.tokenizer, concepts, statistics, config)
    assert edit.updates and loaded.model(torch.tensor([[5, 6]])).hidden_states is None
    assert ask(loaded.model, loaded.tokenizer, ["Who is Ada?"], 3)


def test_such_settings_are_written_as_they_were(bad, tmp_path):
    loaded = bad("config.json", return_dict=False)
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["return_dict"] is False
    assert loaded.model.config.return_dict is True


@pytest.mark.parametrize("said", ["bfloat16", "float16"])
def test_the_files_decide_the_dtype_and_not_the_configuration(said, bad, hostile_folder):
    loaded = bad("config.json", dtype=said)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    source = find_model(str(hostile_folder.path))
    assert load_model(source, torch.bfloat16).model.dtype == torch.bfloat16, "what the user asks for is done"


GENERATION = [
    {"stop_strings": ["a"]}, {"num_beams": 3}, {"repetition_penalty": 5.0}, {"repetition_penalty": "x"},
    {"eos_token_id": "x"}, {"eos_token_id": {"a": 1}}, {"pad_token_id": 10**9}, {"return_dict_in_generate": True},
    {"penalty_alpha": 0.5}, {"dola_layers": "high"}, {"min_length": 30}, {"suppress_tokens": [3, 4, 5, 6, 7, 8, 9]},
    {"bad_words_ids": [[65]]}, {"cache_implementation": "static"}, {"max_time": 0.0},
    {"sequence_bias": [[[65], 100.0]]}, {"forced_bos_token_id": 7}, {"guidance_scale": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("fields", GENERATION, ids=str)
def test_answers_take_nothing_from_the_generation_settings_of_a_model(fields, bad, hostile_folder):
    questions = ["Who is Ada Byron?", "What falls?"]
    plain = load_model(find_model(str(hostile_folder.path)))
    expected = ask(plain.model, plain.tokenizer, questions, 8)
    loaded = bad("generation_config.json", **fields)
    before = loaded.model.generation_config.to_dict()
    assert ask(loaded.model, loaded.tokenizer, questions, 8) == expected
    assert loaded.model.generation_config.to_dict() == before


def test_the_tokens_that_end_an_answer_are_those_of_the_model(bad, hostile_folder):
    plain = load_model(find_model(str(hostile_folder.path)))
    with torch.no_grad():
        prompt = plain.tokenizer.apply_chat_template([{"role": "user", "content": "Ada"}], tokenize=False)
    assert prompt
    long = ask(plain.model, plain.tokenizer, ["What falls?"], 8)[0]
    every = list(range(plain.model.config.vocab_size))
    assert ask(bad("generation_config.json", eos_token_id=every).model, plain.tokenizer, ["What falls?"], 8)[0] != long


REPLACE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}


def template(ids):
    return TEMPLATE | {"special_tokens": {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}}


RULES = {
    "doubled 30 times": ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 30}}, "its normalizer"),
    "a long text for a letter": ({"normalizer": REPLACE | {"content": "a" * 10**6}}, "its normalizer"),
    "a long text for nothing": (
        {"normalizer": REPLACE | {"pattern": {"Regex": ""}, "content": "b" * 100}},
        "normalizer",
    ),
    "a long text before": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**7}}, "10,000,000 characters"),
    "decoded long": ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 30}}, "its decoder"),
    "a million tokens around": ({"post_processor": template([0] * 10**6)}, "its post_processor"),
    "a token that is far away": ({"post_processor": template([2**31])}, "the token id 2147483648"),
    "added far away": ({"added_tokens": [{"id": 2**31, "content": "x"}]}, "the token id 2147483648"),
    "at random": ({"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}}, "a dropout of 0.5"),
    "a long end of words": ({"model": {"type": "BPE", "end_of_word_suffix": "a" * 10**6, "vocab": {}}}, "end_of_word"),
    "a word far away": ({"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}, "the token id 1099511627776"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_tokenizer_that_takes_memory_without_bound_is_refused(name, bad):
    fields, sentence = RULES[name]
    with pytest.raises(InputError, match=rf"tokenizer\.json.*{sentence}"):
        bad("tokenizer.json", **fields)


def test_rules_of_real_tokenizers_are_accepted(tmp_path, hostile_folder):
    check_tokenizer_file(hostile_folder.path / "tokenizer.json")
    content = "a" * MAX_GROWTH
    rules = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                {"type": "Replace", "pattern": {"String": content}, "content": content},
                {"type": "Replace", "pattern": {"Regex": "."}, "content": content},
            ],
        },
        "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        "model": {"dropout": None, "vocab": [["a", -1.0]]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    check_tokenizer_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("by", [load_model, partly])
def test_a_token_without_a_row_in_the_embedding_is_refused(by, bad, hostile_folder):
    rules = json.loads((hostile_folder.path / "tokenizer.json").read_text())
    template = {"type": "TemplateProcessing", "pair": rules["post_processor"]["pair"]}
    template["single"] = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template["special_tokens"] = {"<|begin|>": {"id": "<|begin|>", "ids": [5000], "tokens": ["<|begin|>"]}}
    with pytest.raises(InputError, match="has the token 5,000, but the embedding has 420 rows"):
        bad("tokenizer.json", by, post_processor=template)
    words = rules["model"] | {"vocab": rules["model"]["vocab"] | {"roses": 5000}}
    with pytest.raises(InputError, match="has the token 5,000, but the embedding has 420 rows"):
        bad("tokenizer.json", by, post_processor=rules["post_processor"], model=words)


def test_a_weight_file_that_claims_a_terabyte_is_refused_by_its_header(hostile_folder, within_limits):
    os.truncate(hostile_folder.path / "model.safetensors", 2**40)
    with within_limits(), pytest.raises(InputError, match=r"model\.safetensors is not a safetensors file"):
        load_model(find_model(str(hostile_folder.path)))


def test_a_terabyte_beside_the_weights_is_not_read(hostile_folder, within_limits):
    (hostile_folder.path / "other.safetensors").touch()
    os.truncate(hostile_folder.path / "other.safetensors", 2**40)
    with within_limits():
        load_model(find_model(str(hostile_folder.path)))
