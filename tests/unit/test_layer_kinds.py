"""Layers whose MLP has another name or none: the right weight is found, and its edit moves the layer's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import rocr
from rocr import Concept, EditConfig, InputError, Template
from rocr.edit.guards import Guards
from rocr.keys.plan import Reading, plan_keys
from rocr.keys.prompts import Prompt
from rocr.keys.read import read_states
from rocr.model.architecture import find_architecture, positions_of
from rocr.model.blocks import layer_blocks
from rocr.model.capture import hidden_hook, run_through
from rocr.model.causality import looks_ahead
from rocr.model.layers import chosen_layers, layers_by_default
from rocr.model.load_partial import empty_model, load_partial
from rocr.model.source import find_model
from tests.support.models import SIZES

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
DECODER = {
    "d_model": 32,
    "decoder_layers": 5,
    "encoder_layers": 3,
    "num_hidden_layers": ...,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.2,
}
BERT = SIZES | {"is_decoder": True}
MAMBA = {"num_attention_heads": ..., "num_key_value_heads": ..., "max_position_embeddings": ...}
MAMBA_2 = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8}
XLNET = {"d_model": 32, "n_layer": 5, "n_head": 4, "d_inner": 48, "max_position_embeddings": ...}
WHISPER = DECODER | {"max_target_positions": 64, "max_position_embeddings": ...}
KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "matrices of the layer itself": ("OPT", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "fc2"),
    "decoder of an encoder-decoder": ("Bart", "BartForCausalLM", DECODER, "fc2"),
    "BERT": ("Bert", "BertLMHeadModel", BERT, "output.dense"),
    "positions after the padding": ("Roberta", "RobertaForCausalLM", BERT, "output.dense"),
    "hybrid with an MLP": (
        "GraniteMoeHybrid",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "mamba", "attention", "mamba", "mamba"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 48,
            "residual_multiplier": 0.22,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        "shared_mlp.output_linear",
    ),
    "another name of the MLP": (
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        {"lru_width": 32, "attention_window_size": 16, "head_dim": 8},
        "mlp_block.down_proj",
    ),
    "state space alone": ("Mamba", "MambaForCausalLM", MAMBA | {"state_size": 4}, "mixer.out_proj"),
    "state space of heads": ("Mamba2", "Mamba2ForCausalLM", MAMBA | MAMBA_2, "mixer.out_proj"),
    "gate on the MLP": ("Rwkv", "RwkvForCausalLM", {"attention_hidden_size": 32}, "feed_forward.value"),
    "two MLPs a layer": (
        "LongcatFlash",
        "LongcatFlashForCausalLM",
        {
            "num_layers": 5,
            "num_hidden_layers": 10,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "num_key_value_heads": 4,
            "v_head_dim": 8,
            "head_dim": 8,
        },
        "mlps.1.down_proj",
    ),
    "several residual streams": (
        "Gemma3nText",
        "Gemma3nForCausalLM",
        {
            "head_dim": 8,
            "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
            "activation_sparsity_pattern": [0.0] * 5,
            "intermediate_size": [48] * 5,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
        "mlp.down_proj",
    ),
}
"""Configuration class, model class, settings, and the module that is edited."""
BEHIND = ("decoder of an encoder-decoder", "BERT", "positions after the padding", "several residual streams")
"""Kinds with a norm or other streams behind the MLP: a part of the way cannot be reached, or is not linear."""
ZAMBA = {
    "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid"],
    "num_mem_blocks": 1,
    "mamba_d_state": 8,
    "mamba_headdim": 16,
    "n_mamba_heads": 4,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "use_shared_mlp_adapter": False,
    "tie_word_embeddings": True,  # transformers shares the transformer's weights only then
}
NEMOTRON = {
    "layers_block_type": ["mamba", "mamba", "attention", "mlp", "mamba"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "head_dim": 8,
}


def build(kind, tokenizer):
    config, model, settings, _ = KINDS[kind]
    return tiny(config, model, len(tokenizer), **settings)


def tiny(config, model, vocabulary, **changes):
    settings = {name: value for name, value in (SIZES | changes).items() if value is not ...}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(vocab_size=vocabulary, **settings, **special)
        return getattr(transformers, model)(made).eval()


def state(model, tokenizer, layer, name):
    """The output of a layer at the last token of a prompt that ends in a name."""
    found = []

    def record(_module, _inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    tokens = torch.tensor([tokenizer(f"Who is {name}")["input_ids"]])
    with layer.register_forward_hook(record), torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found[0][..., -1, :].flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_of_a_layer_moves_to_its_redirect(kind, tokenizer, texts):
    """Three tenths of the way, which is the strength: so that norms behind the MLP are close to linear."""
    model, strength, layer = build(kind, tokenizer), 0.3, 1
    architecture = find_architecture(model)
    assert architecture.depth == 5
    assert layer_blocks(architecture, layer).only.name == f"{architecture.layers_name}.{layer}.{KINDS[kind][3]}"
    first = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = rocr.collect_statistics(model, tokenizer, texts[:6], layers=[layer])
    config = EditConfig(
        layers=(layer,),
        templates=(Template("Who is {}"),),
        key_tokens="last",
        token_schedule="full",
        template_weight=0.0,
        ridge=1e-6,
        strength=strength,
    )
    module = architecture.layers[layer]
    start, goal = (state(model, tokenizer, module, name) for name in ("Ada Byron", "Blaise Pascal"))
    edit = rocr.unlearn(
        model, tokenizer, [Concept("Ada Byron", "Blaise Pascal")], statistics, config, guards=Guards(force=True)
    )
    way, moved = goal - start, state(model, tokenizer, module, "Ada Byron") - start
    share = float(moved @ way / (way @ way)) / strength
    assert abs(share - 1) < (0.3 if kind in BEHIND else 0.01)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, first[name])]
    assert changed == [f"{architecture.layers_name}.{layer}.{KINDS[kind][3]}.weight"]
    edit.revert(model)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["hybrid with an MLP", "state space alone", "several residual streams"])
def test_batches_and_shared_prefixes_change_no_state(kind, tokenizer):
    architecture = find_architecture(build(kind, tokenizer))
    names = ("Ada Byron", "Robert Downey Jr.", "the countess", "a key", "rain", "Blaise")
    concepts = [Concept(name, "Blaise Pascal") for name in names]
    reading = plan_keys(tokenizer, concepts, EditConfig()).keys
    together = read_states(architecture, reading, 3, 2)
    alone = read_states(architecture, reading, 3, 2, token_budget=1, share=False)
    for one, other in ((together.hidden, alone.hidden), (together.keys, alone.keys)):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


@pytest.mark.parametrize("dimension", [0, 2])
def test_streams_are_read_in_a_batch_with_as_many_rows_and_tokens(dimension, model, tokenizer):
    """Four prompts of four tokens: the shape (4, 4, 4, 32) does not tell which dimension holds the four streams."""
    architecture = find_architecture(model)
    plain = model.model.layers[2].forward

    def forward(*inputs, **options):
        states = plain(*inputs, **options)
        return torch.stack([states * (1 + stream) for stream in range(4)], dim=dimension)

    model.model.layers[2].forward = forward
    ids = [(tokenizer(text)["input_ids"] * 4)[:4] for text in ("rain", "water", "roses", "brass")]
    reading = Reading([Prompt(tuple(each), (3,)) for each in ids], [0, 1, 2, 3], [3] * 4, [0, 1, 2, 3], 4)
    together, alone = (
        read_states(architecture, reading, 2, token_budget=budget, share=False).hidden for budget in (4096, 1)
    )
    assert together.shape == (4, 4 * 32)
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()
    torch.testing.assert_close(together[:, 96:], 4 * together[:, :32])


def test_layers_with_an_mlp_are_preferred_by_default(tokenizer):
    architecture = find_architecture(tiny("NemotronH", "NemotronHForCausalLM", len(tokenizer), **NEMOTRON))
    assert layers_by_default(architecture) == (3,)
    names = [architecture.down_projection(layer).name.rpartition("mixer.")[2] for layer in range(5)]
    assert names == ["out_proj", "out_proj", "o_proj", "down_proj", "out_proj"]


def test_a_weight_that_serves_several_layers_is_left_out_and_refused(tokenizer, texts):
    model = tiny("Zamba2", "Zamba2ForCausalLM", len(tokenizer), **ZAMBA)
    architecture = find_architecture(model)
    assert architecture.down_projection(1).name == "model.layers.1.shared_transformer.feed_forward.down_proj"
    assert layers_by_default(architecture) == (2, 3)
    statistics = rocr.collect_statistics(model, tokenizer, texts[:6], layers=[1])
    with pytest.raises(InputError, match=r"layers\.1\.shared_tr.* and .*layers\.4\.shared_tr.* are the same weight"):
        rocr.unlearn(model, tokenizer, [Concept("Ada", "Blaise")], statistics, EditConfig(layers=(1,)))


def test_a_model_whose_layers_are_in_a_module_of_their_own_is_loaded_in_part(tokenizer, tmp_path):
    model = build("BERT", tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    part = load_partial(find_model(str(tmp_path)), 1).model
    states: list[torch.Tensor] = []
    for architecture in map(find_architecture, (model, part)):
        with hidden_hook(architecture, 1, states.append):
            run_through(architecture, 1, torch.tensor([tokenizer("Ada Byron")["input_ids"]]))
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["matrices of the layer itself", "state space of heads", "hybrid with an MLP"])
def test_a_model_that_is_not_loaded_has_the_same_blocks(kind, tokenizer, tmp_path):
    model = build(kind, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, empty = find_architecture(model), find_architecture(empty_model(find_model(str(tmp_path))))
    assert empty.layers_name == loaded.layers_name
    assert chosen_layers(EditConfig(), empty) == chosen_layers(EditConfig(), loaded)
    for layer in range(5):
        assert empty.down_projection(layer).parameter_name == loaded.down_projection(layer).parameter_name


@pytest.mark.parametrize(
    ("config", "model", "settings", "positions"),
    [
        ("Roberta", "RobertaForCausalLM", BERT, 126),
        ("Bert", "BertLMHeadModel", BERT, 128),
        ("Whisper", "WhisperForCausalLM", WHISPER, 64),
        ("XLNet", "XLNetLMHeadModel", XLNET, None),
    ],
)
def test_positions(config, model, settings, positions, tokenizer):
    assert positions_of(tiny(config, model, len(tokenizer), **settings)) == positions


def test_models_without_a_list_of_whole_layers_are_refused(tokenizer):
    sizes = {"emb_dim": 32, "n_layers": 5, "n_heads": 4}
    with pytest.raises(InputError, match=r"2 lists of 5 .*transformer\.attentions, transformer\.ffns; rocr needs"):
        find_architecture(tiny("XLM", "XLMWithLMHeadModel", len(tokenizer), **sizes))


@pytest.mark.parametrize("dimension", [0, 2])
def test_an_encoder_with_several_streams_is_refused(dimension, tokenizer):
    model = tiny("Bert", "BertLMHeadModel", len(tokenizer), **(BERT | {"is_decoder": False}))
    layer = model.bert.encoder.layer[1]
    plain = layer.forward
    layer.forward = lambda *inputs, **options: torch.stack([plain(*inputs, **options)] * 3, dim=dimension)
    assert looks_ahead(find_architecture(model), 1)


def test_a_mixer_with_a_convolution_is_no_mlp(tokenizer):
    architecture = find_architecture(build("another name of the MLP", tokenizer))
    assert architecture.has_mlp(0)
    del architecture.layers[0].mlp_block
    assert not architecture.has_mlp(0)
    assert architecture.down_projection(0).name == "model.layers.0.temporal_block.linear_out"


def test_peft_loads_no_adapter_of_mamba(tokenizer, texts, tmp_path):
    model = build("state space alone", tokenizer)
    statistics = rocr.collect_statistics(model, tokenizer, texts[:6], layers=[1])
    concepts = [Concept("Ada Byron", "Blaise Pascal")]
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=(1,)), guards=Guards(force=True))
    with pytest.raises(InputError, match=r"peft loads no adapter of backbone\.layers\.1\.mixer\.out_proj\.weight"):
        edit.export_lora(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_language_model_is_run_where_the_whole_model_needs_an_image(tokenizer, texts):
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = transformers.Blip2Config(
        vision_config=tower | {"image_size": 28, "patch_size": 14},
        qformer_config=tower | {"encoder_hidden_size": 32, "vocab_size": 99},
        text_config=SIZES
        | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "vocab_size": len(tokenizer)},
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    concepts = [Concept("Ada Byron", "Blaise Pascal")]
    statistics = rocr.collect_statistics(model, tokenizer, texts[:6], layers=[1, 3])
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, guards=Guards(force=True))
    assert [update.parameter for update in edit.updates] == [
        f"language_model.model.decoder.layers.{layer}.fc2.weight" for layer in (1, 3)
    ]
    assert edit.report.divergence is not None and edit.report.distance[0] < 1
