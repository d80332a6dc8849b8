"""Whether a model reads from left to right or both ways is found by running it."""

import pytest
import torch
import transformers

import rocr
from rocr import EditConfig, Guards, InputError
from rocr.model.architecture import find_architecture
from rocr.model.causality import looks_ahead, with_kind
from rocr.model.kind import ModelKind
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def paligemma(tokenizer):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "projection_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.PaliGemmaConfig(
            text_config=text | {"model_type": "gemma"},
            vision_config=vision | {"model_type": "siglip_vision_model"},
            image_token_index=len(tokenizer) - 1,
            projection_dim=32,
        )
        return transformers.PaliGemmaForConditionalGeneration(config).eval()


def gemma3_both_ways(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
            use_bidirectional_attention=True,
        )  # fmt: skip
        return transformers.Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [paligemma, gemma3_both_ways])
def test_a_model_that_looks_ahead_is_read_both_ways(make, dtype, tokenizer, texts, concepts, weights_of):
    other = make(tokenizer).to(dtype)
    assert looks_ahead(find_architecture(other), 2)
    assert with_kind(find_architecture(other), 2).kind == ModelKind(bidirectional=True, writes_text=False)
    with pytest.raises(InputError, match=r"\w+ is edited as a text encoder, which cannot write the text of its own"):
        rocr.collect_statistics(other, tokenizer, None, [1, 2])
    collected = rocr.collect_statistics(other, tokenizer, texts, [1, 2])
    before = weights_of(other)
    edit = rocr.unlearn(other, tokenizer, concepts, collected, EditConfig(layers=[1, 2]), guards=Guards(force=True))
    assert edit.report.divergence is None
    assert edit.report.drift > 0
    edit.revert(other)
    assert same_weights(weights_of(other), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_causal_attention_does_not_look_ahead(family, make_model, dtype):
    architecture = find_architecture(make_model(family).to(dtype))
    assert not looks_ahead(architecture, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_experts_of_other_tokens_are_not_a_look_ahead(mixture, make_model, seed):
    architecture = find_architecture(make_model(mixture, seed=seed, num_experts_per_tok=2))
    assert not looks_ahead(architecture, 4)
