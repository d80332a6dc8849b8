"""Text encoders and encoder-decoders are edited: BERT, T5, BART, CLIP's text model and others like them."""

import random
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models

import rocr
from rocr import Concept, EditConfig, InputError
from rocr.config import IMAGE_TEMPLATES
from rocr.keys.batches import batches
from rocr.keys.plan import plan_keys
from rocr.keys.read import read_states
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.kind import ModelKind
from rocr.model.tokenizer import closing_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["a painting of", "a photo of", "a drawing of", "an oil sketch of", "a poster showing", "a view of"]
THINGS = [
    "river",
    "hill",
    "town",
    "sea",
    "snow",
    "mill",
    "garden",
    "bean",
    "onion",
    "apple",
    "market",
    "square",
    "bread",
    "castle",
    "boat",
    "house",
    "tree",
    "cat",
]
LOOKS = ["small", "large", "red", "blue", "green", "old", "new", "bright", "dark", "quiet", "loud", "golden"]
NAMES = ["Ada Byron", "Carl Gauss", "Mona Klee", "Dora Marsh", "Viktor Hopper", "Jane Turner", "Rosa Blum"]
CONCEPT = Concept("Ada Byron", "Carl Gauss")
PROMPTS = ["a painting by {}", "an oil sketch by {}"]
OTHERS = [
    "a photo of a red castle",
    "a view of the sea",
    "a drawing of a quiet river",
    "an oil sketch of Viktor Hopper",
]


def ordinary_texts():
    draw = random.Random(0).choice
    return [
        f"{draw(KINDS)} a {draw(LOOKS)} {draw(THINGS)} {draw(['by', 'and', 'in the style of'])} {draw(NAMES)}"
        for _ in range(300)
    ]


@pytest.fixture(scope="module")
def prompts():
    return ordinary_texts()


@pytest.fixture(scope="module")
def closing(prompts):
    """A tokenizer that puts a token before and one after a text, as CLIP's and BERT's do."""
    raw = Tokenizer(tokenizer_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<start>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        prompts, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<start>", eos_token="<end>", pad_token="<end>", model_max_length=77
    )


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
BERT = SIZES | {"initializer_range": 0.2, "pad_token_id": 1}
BART = {
    "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4,
      "pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}  # fmt: skip
CLIP = SIZES | {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 77}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
ENCODERS = {
    "CLIPTextModel": ("CLIPTextConfig", CLIP, "encoder.layers.{}.mlp.fc2"),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", CLIP, "text_model.encoder.layers.{}.mlp.fc2"),
    "T5EncoderModel": ("T5Config", T5, "encoder.block.{}.layer.1.DenseReluDense.wo"),
    "T5ForConditionalGeneration": ("T5Config", T5, "encoder.block.{}.layer.1.DenseReluDense.wo"),
    "BartForConditionalGeneration": ("BartConfig", BART, "model.encoder.layers.{}.fc2"),
    "MBartForConditionalGeneration": ("MBartConfig", BART, "model.encoder.layers.{}.fc2"),
    "PegasusForConditionalGeneration": ("PegasusConfig", BART, "model.encoder.layers.{}.fc2"),
    "BertModel": ("BertConfig", BERT, "encoder.layer.{}.output.dense"),
    "BertForMaskedLM": ("BertConfig", BERT, "bert.encoder.layer.{}.output.dense"),
    "XLMRobertaModel": ("XLMRobertaConfig", BERT, "encoder.layer.{}.output.dense"),
    "ModernBertModel": (
        "ModernBertConfig", BERT | {"bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1},
        "layers.{}.mlp.Wo",
    ),
    "T5GemmaForConditionalGeneration": (
        "T5GemmaConfig", {"encoder": GEMMA, "decoder": GEMMA | {"num_hidden_layers": 3}},
        "model.encoder.layers.{}.mlp.down_proj",
    ),
}  # fmt: skip
ALIKE = {
    "CLIPTextModelWithProjection",
    "T5EncoderModel",
    "MBartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "BertForMaskedLM",
    "XLMRobertaModel",
}
"""Encoders whose layers are those of another class of the table, which is in every run."""


def build(kind, vocabulary, **changes):
    config_class, sizes, _ = ENCODERS[kind]
    values = sizes | changes
    if "encoder" in values:
        values = values | {part: values[part] | {"vocab_size": vocabulary} for part in ("encoder", "decoder")}
    config = getattr(transformers, config_class)(vocab_size=vocabulary, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in ALIKE else ()) for kind in ENCODERS]
)
def test_an_encoder_is_edited_at_its_own_layers_and_restored(kind, closing, prompts, tmp_path):
    encoder = build(kind, len(closing))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    collected = rocr.collect_statistics(encoder, closing, prompts[:80], [1, 2])
    edit = rocr.unlearn(encoder, closing, [CONCEPT], collected, EditConfig(layers=[1, 2], templates=IMAGE_TEMPLATES),
                        guards=rocr.Guards(force=True))  # fmt: skip
    changed = [name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{ENCODERS[kind][2].format(layer)}.weight" for layer in (1, 2)]
    assert edit.report.distance[0] < 0.9
    assert edit.report.divergence is None
    assert edit.report.drift > 0
    edit.save(tmp_path / "edit")
    edit.revert(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    again = rocr.Edit.load(tmp_path / "edit")
    assert again.report.drift == edit.report.drift
    again.apply(encoder)


@pytest.mark.parametrize(("kind", "both"), [("CLIPTextModel", False), ("T5EncoderModel", True), ("BertModel", True)])
def test_prompts_are_run_whole_where_a_model_reads_both_ways(kind, both, closing):
    architecture = with_kind(find_architecture(build(kind, len(closing))), 2)
    assert architecture.kind == ModelKind(bidirectional=both, writes_text=False)
    config = EditConfig(templates=["a painting by {} and a very small red house", "a photo of {}"], closing_keys=False)
    reading = plan_keys(closing, [CONCEPT], config, architecture.kind).keys
    lengths = {batch.tokens.shape[1] for batch in batches(reading, 1, cut=not both)}
    whole = {len(prompt.tokens) for prompt in reading.prompts}
    assert (lengths == whole) is both
    together, alone = (read_states(architecture, reading, 2, 2, token_budget=budget) for budget in (4096, 1))
    torch.testing.assert_close(together.hidden, alone.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.keys, alone.keys, rtol=1e-4, atol=1e-5)


def test_closing_tokens_become_keys_of_an_encoder_alone(closing):
    assert closing_tokens(closing) == [1]
    encoder, language_model = ModelKind(True, False), ModelKind()
    config = EditConfig(templates=IMAGE_TEMPLATES, variants="none")
    plan = plan_keys(closing, [CONCEPT], config, encoder)
    last = [plan.keys.prompts[i].tokens[p] for i, p in zip(plan.keys.prompt_of, plan.keys.position_of, strict=True)]
    assert last.count(1) == len(IMAGE_TEMPLATES)
    without = plan_keys(closing, [CONCEPT], replace(config, closing_keys=False), encoder)
    assert without.keys.groups == plan.keys.groups - 1
    assert all(1 not in prompt.tokens for prompt in plan_keys(closing, [CONCEPT], config, language_model).keys.prompts)


def test_what_an_encoder_cannot_do_is_refused(closing):
    encoder = build("T5EncoderModel", len(closing))
    with pytest.raises(
        InputError, match=r"T5EncoderModel is edited as a text encoder, which cannot write .* Give texts"
    ):
        rocr.unlearn(encoder, closing, [CONCEPT])
    sizes = {name: value for name, value in BART.items() if name != "num_hidden_layers"}
    speech = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(vocab_size=len(closing), **sizes))
    with pytest.raises(InputError, match="encoder reads input_features, not text"):
        find_architecture(speech)
