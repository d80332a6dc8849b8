"""Prompts that share the prefix of their template: equal states within rounding, with fewer tokens computed."""

import pytest
import torch
import transformers

from rocr import Concept, EditConfig
from rocr.config import Template
from rocr.keys.batches import MAX_PADDING, MIN_SAVED_TOKENS, batches
from rocr.keys.plan import plan_keys
from rocr.keys.prompts import build_prompts, render_template
from rocr.keys.read import read_layers, read_states
from rocr.model.architecture import find_architecture
from rocr.model.prefix_cache import can_share

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDING = 5e-6  # as in test_keys.py; at most 1.6e-6 was measured
CONFIG = EditConfig(
    templates=(
        "Please answer the question: who is {}?",
        Template("Tell me all that is known about {}.", chat=True),
        "{} is it",
    ),
    variants="none",
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
    for name in ("hidden", "keys", "gains"):
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


def test_a_batch_ends_where_it_would_be_padded_too_much(make_model, tokenizer, monkeypatch):
    people = [*PEOPLE, Concept("the old Byron of the roses, who waters the sun in Café Downey", "Blaise Pascal")] * 3
    people = [Concept(f"{person.name} {i}", person.redirect) for i, person in enumerate(people)]
    reading = plan_keys(tokenizer, people, CONFIG).keys

    def padding(batch):
        return 0 if batch.mask is None else int((batch.mask == 0).sum())

    found = list(batches(reading, 100_000))
    assert sorted(i for batch in found for i in batch.prompts) == list(range(len(reading.prompts)))
    assert 0 < max(map(padding, found)) <= MAX_PADDING
    architecture = find_architecture(make_model("Llama"))
    states = read_states(architecture, reading, 3, 2)
    monkeypatch.setattr("rocr.keys.batches.MAX_PADDING", 100_000)
    assert max(map(padding, batches(reading, 100_000))) > MAX_PADDING
    assert_same(states, read_states(architecture, reading, 3, 2))


def test_templates_share_an_opening_that_saves_enough_only_together(make_model, tokenizer):
    opening = "Read all of these words slowly and then answer: "
    templates = (*(Template(f"{opening}{word} {{}} and") for word in ("is", "was", "will", "has")), "{} is it")
    reading = plan_keys(tokenizer, PEOPLE[:4], EditConfig(templates=templates, variants="none")).keys
    found = list(batches(reading, 10_000))
    assert [bool(batch.prefix) for batch in found] == [True, False], "the last template begins otherwise"
    length = len(found[0].prefix)
    assert length * 3 < MIN_SAVED_TOKENS <= length * 15, "no template saves enough alone"
    assert sorted(i for batch in found for i in batch.prompts) == list(range(len(reading.prompts)))
    architecture = find_architecture(make_model("Llama"))
    shared, few = tokens_run(architecture, lambda: read_states(architecture, reading, 3, 2))
    whole, many = tokens_run(architecture, lambda: read_states(architecture, reading, 3, 2, share=False))
    assert_same(shared, whole)
    assert few < many
