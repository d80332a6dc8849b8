"""Prompts of a template share its beginning: the same states to rounding, with fewer tokens run."""

from dataclasses import replace

import pytest
import torch
import transformers

import rocr
from rocr import Concept, EditConfig
from rocr.architectures import find_architecture
from rocr.batches import MIN_SAVED_TOKENS, batches
from rocr.capture import run_through
from rocr.key_plan import plan_keys
from rocr.keys import read_layers, read_states
from rocr.prefix import PROBE_TOKENS, can_share, looks_ahead, with_direction
from rocr.prompts import Template, build_prompts, render_template

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDING = 5e-6  # as in test_keys.py; at most 1.6e-6 was measured
CONFIG = EditConfig(
    templates=(
        "Please answer the question: who is {}?",
        Template("Tell me all that is known about {}.", chat=True),
        "{} is it",
    )
)
PEOPLE = [
    Concept(f"{first} {last}", "Blaise Pascal")
    for first in ("Ada", "Blaise", "Robert", "the old", "Æsop", "x")
    for last in ("Byron", "Downey Jr.", "Rose", "Sun, who waters the roses", "Café")
]


def tokens_run(architecture, read):
    """What `read` returns, and how many tokens went through the embedding."""
    counts = []
    hook = architecture.embedding.register_forward_hook(lambda _m, inputs, _o: counts.append(inputs[0].numel()))
    found = read()
    hook.remove()
    return found, sum(counts)


def assert_same(states, others):
    for name in ("hidden", "keys", "outputs"):
        mine, theirs = getattr(states, name), getattr(others, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).abs().max() / theirs.abs().max() < ROUNDING, name


@pytest.mark.parametrize("window", [None, 4], ids=["whole", "sliding"])
def test_sharing_changes_nothing_in_any_family(family, window, make_model, tokenizer):
    slides = family in ("Mistral", "Phi3", "Gemma2", "Gemma3")
    if window and not slides:
        pytest.skip("this family's attention does not slide")
    architecture = find_architecture(make_model(family, **({"sliding_window": window} if window else {})))
    assert can_share(architecture)
    reading = plan_keys(tokenizer, PEOPLE, CONFIG).keys
    shared, few = tokens_run(architecture, lambda: read_states(architecture, reading, 3, 2))
    whole, many = tokens_run(architecture, lambda: read_states(architecture, reading, 3, 2, share=False))
    assert_same(shared, whole)
    assert few < 0.7 * many


def test_several_layers_are_read_in_one_pass(make_model, tokenizer):
    architecture = find_architecture(make_model("Gemma2"))
    reading = plan_keys(tokenizer, PEOPLE, CONFIG).keys
    found = read_layers(architecture, reading, 3, (1, 3), token_budget=100)
    assert sorted(found) == [1, 3]
    for layer, states in found.items():
        assert_same(states, read_states(architecture, reading, 3, layer, share=False))


def test_layers_that_remember_otherwise_share_nothing(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.Lfm2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], **sizes
    )
    architecture = find_architecture(transformers.Lfm2ForCausalLM(config).eval())
    assert not can_share(architecture)
    reading = plan_keys(tokenizer, PEOPLE, CONFIG).keys
    assert_same(read_states(architecture, reading, 2, 1), read_states(architecture, reading, 2, 1, share=False))


def test_a_prefix_is_what_no_name_changes(tokenizer):
    for template in CONFIG.templates:
        prompts = build_prompts(tokenizer, render_template(tokenizer, template), [person.name for person in PEOPLE])
        shared = prompts[0].shared
        beginnings = {prompt.tokens[:shared] for prompt in prompts}
        assert len(beginnings) == 1 and {prompt.shared for prompt in prompts} == {shared}
        assert all(position >= shared for prompt in prompts for position in prompt.name)
        longer = {prompt.tokens[: shared + 1] for prompt in prompts}
        assert len(longer) > 1 or any(prompt.name[0] == shared for prompt in prompts)
    assert build_prompts(tokenizer, render_template(tokenizer, Template("{}")), ["Ada", "Byron"])[0].shared == 0


def test_prompts_end_where_nothing_more_is_read(tokenizer):
    reading = plan_keys(tokenizer, PEOPLE, CONFIG).keys
    ends = {}
    for prompt, position in zip(reading.prompt_of, reading.position_of, strict=True):
        ends[prompt] = max(ends.get(prompt, 0), position + 1)
    found = {}
    for batch in batches(reading, 100):
        mask = torch.ones(len(batch.prompts), len(batch.prefix) + batch.tokens.shape[1])
        lengths = (mask if batch.mask is None else batch.mask).sum(dim=1).int().tolist()
        for row, prompt in enumerate(batch.prompts):
            own = batch.tokens[row, : lengths[row] - len(batch.prefix)].tolist()
            found[prompt] = (*batch.prefix, *own)
    assert found == {i: prompt.tokens[: ends[i]] for i, prompt in enumerate(reading.prompts)}


def test_a_few_prompts_run_whole(tokenizer):
    reading = plan_keys(tokenizer, PEOPLE[:3], CONFIG).keys
    assert max(prompt.shared for prompt in reading.prompts) * 2 < MIN_SAVED_TOKENS
    (batch,) = batches(reading, 10_000)
    assert batch.prefix == ()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [paligemma, gemma3_both_ways])
def test_where_attention_looks_ahead_prompts_are_run_to_their_ends(make, dtype, tokenizer, monkeypatch):
    architecture = find_architecture(make(tokenizer).to(dtype))
    assert looks_ahead(architecture, 2) and with_direction(architecture, 2).looks_ahead
    assert not can_share(with_direction(architecture, 2))
    if dtype == torch.bfloat16:
        return
    config = EditConfig(templates=("Who is {}, and what is known about rain?", "{}: it is about engines of brass."))
    reading = plan_keys(tokenizer, PEOPLE[:20], config).keys
    found = read_states(architecture, reading, 2, 1, token_budget=100)
    alone = torch.zeros_like(found.hidden)
    counts = torch.bincount(torch.tensor(reading.group_of))
    for prompt, position, group in zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True):
        with torch.no_grad():
            ids = torch.tensor([reading.prompts[prompt].tokens])
            states = architecture.model(input_ids=ids, output_hidden_states=True).hidden_states[3]
        alone[group] += states[0, position] / counts[group]
    assert (found.hidden - alone).abs().max() < ROUNDING * alone.abs().max()
    assert all(batch.mask is None and not batch.prefix for batch in batches(reading, 100, to_the_end=True))
    cut = read_states(replace(architecture, looks_ahead=False), reading, 2, 1)
    assert (cut.hidden - alone).abs().max() > 100 * ROUNDING * alone.abs().max(), "the end of a prompt matters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_causal_attention_does_not_look_ahead(family, make_model, dtype):
    architecture = find_architecture(make_model(family).to(dtype))
    assert not looks_ahead(architecture, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_experts_of_other_tokens_are_not_a_look_ahead(mixture, make_model, seed):
    architecture = find_architecture(make_model(mixture, seed=seed, num_experts_per_tok=2))
    assert not looks_ahead(architecture, 4)


def test_the_direction_is_measured_once_in_an_edit(model, tokenizer, statistics, concepts, monkeypatch):
    calls = []
    monkeypatch.setattr("rocr.prefix.run_through", lambda *a, **k: calls.append(a[2].shape) or run_through(*a, **k))
    rocr.unlearn(model, tokenizer, concepts, statistics)
    assert calls.count(torch.Size([2, PROBE_TOKENS])) == 1
