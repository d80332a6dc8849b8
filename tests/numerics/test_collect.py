import hashlib

import pytest
import torch

import rocr
from rocr import CollectOptions, InputError
from rocr.model.architecture import find_architecture
from rocr.ops.wide_products import wide_products
from rocr.statistics.corpus import pack_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDING = 2e-6  # float32 sums against float64, relative to the largest entry; at most 3e-7 was measured
CUT = CollectOptions(length=32, batch_tokens=256)


def second_moments(model, sequences, layers):
    """The definition: every sequence by itself through the whole model, all tokens but the first, in float64.

    The model multiplies as it does for rocr, in float32 where the CPU has no instructions for its dtype.
    """
    architecture, keys = find_architecture(model), {layer: [] for layer in layers}
    handles = [
        architecture.down_projection(layer).module.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: keys[layer].append(inputs[0][0].double())
        )
        for layer in layers
    ]
    with torch.no_grad(), wide_products():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    rows = {layer: torch.cat([states[1:] for states in keys[layer]]) for layer in layers}
    return {layer: found.T @ found / len(found) for layer, found in rows.items()}, len(rows[layers[0]])


def assert_near(statistics, expected, bound=ROUNDING):
    for layer, moment in expected.items():
        error = (statistics.second_moment(layer).double() - moment).abs().max() / moment.abs().max()
        assert error < bound, f"layer {layer}: {error}"


def test_the_second_moment_is_its_definition(family, make_model, tokenizer, texts):
    model = make_model(family)
    statistics = rocr.collect_statistics(model, tokenizer, iter(texts), [3, 1], CUT)
    expected, tokens = second_moments(model, pack_tokens(texts, tokenizer, 32), [1, 3])
    assert statistics.layers == (1, 3)
    assert statistics.tokens == tokens
    assert_near(statistics, expected)
    assert all(torch.equal(moment, moment.T) for moment in statistics.moments.values())


def test_the_first_token_is_left_out(model, tokenizer, texts):
    sequences = list(pack_tokens(texts, tokenizer, 32))
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1], CUT)
    assert statistics.tokens == sum(len(sequence) - 1 for sequence in sequences)
    with torch.no_grad():
        model.model.embed_tokens.weight[sequences[0][0]] *= 30.0  # an attention sink, which no other token is
    beginning = [sequences[0][0]]
    assert all(beginning != sequence[1:2] for sequence in sequences)
    expected, _ = second_moments(model, sequences, [1])
    assert_near(rocr.collect_statistics(model, tokenizer, texts, [1], CUT), expected)


def test_no_later_layer_runs_and_every_batch_runs_once(model, tokenizer, texts):
    def refuse(*_):
        raise AssertionError("this must not run")

    sequences = list(pack_tokens(texts, tokenizer, 32))
    read = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, inputs: read.append(len(inputs[0])))
    for module in (model.model.layers[3], model.model.layers[4], model.model.norm, model.lm_head):
        module.register_forward_pre_hook(refuse)
    statistics = rocr.collect_statistics(model, tokenizer, texts, [0, 1, 2], CUT)
    assert read.pop(0) == 2, "two texts that tell whether attention looks ahead"
    assert sum(read) == len(sequences), "one pass for all layers"
    assert statistics.layers == (0, 1, 2)
    with pytest.raises(AssertionError, match="must not run"):
        model(torch.tensor([[5, 6]]))


@pytest.mark.parametrize("batch_tokens", [1, 33, 100, 10_000])
def test_the_batch_size_changes_nothing_beyond_rounding(model, tokenizer, texts, batch_tokens):
    options = CollectOptions(length=32, batch_tokens=batch_tokens)
    statistics = rocr.collect_statistics(model, tokenizer, texts, [0, 2], options)
    expected, tokens = second_moments(model, pack_tokens(texts, tokenizer, 32), [0, 2])
    assert statistics.tokens == tokens
    assert_near(statistics, expected)


def test_half_precision_keys_are_summed_in_float32(make_model, tokenizer, texts):
    model = make_model("Llama").bfloat16()
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1], CollectOptions(length=32, batch_tokens=1))
    expected, _ = second_moments(model, pack_tokens(texts, tokenizer, 32), [1])
    assert statistics.second_moment(1).dtype == torch.float32
    assert_near(statistics, expected)


@pytest.mark.parametrize("tokens", [1, 31, 32, 100, 255])
def test_the_token_limit_is_exact(model, tokenizer, texts, tokens):
    read = []
    stream = (read.append(text) or text for text in texts * 200)
    options = CollectOptions(tokens=tokens, length=32, batch_tokens=64)
    statistics = rocr.collect_statistics(model, tokenizer, stream, [1], options)
    assert statistics.tokens == tokens
    rows = []
    projection = find_architecture(model).down_projection(1).module
    projection.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0][0, 1:].double()))
    for sequence in list(pack_tokens(texts, tokenizer, 32))[:16]:
        model(torch.tensor([sequence]))
    first = torch.cat(rows)[:tokens]
    assert_near(statistics, {1: first.T @ first / tokens})
    assert len(read) < len(texts) * 200, "a stream is not read to its end"


def test_a_limit_beyond_the_text_is_no_limit(model, tokenizer, texts):
    unlimited = rocr.collect_statistics(model, tokenizer, texts, [1], CUT)
    limited = rocr.collect_statistics(
        model, tokenizer, texts, [1], CollectOptions(tokens=10**9, length=32, batch_tokens=256)
    )
    assert limited.tokens == unlimited.tokens
    assert torch.equal(limited.second_moment(1), unlimited.second_moment(1))


def test_same_inputs_give_the_same_bytes(model, tokenizer, texts):
    first, second = (rocr.collect_statistics(model, tokenizer, texts, [1, 2], CUT) for _ in range(2))
    assert all(torch.equal(first.second_moment(layer), second.second_moment(layer)) for layer in (1, 2))


def test_the_text_is_named_by_its_contents(model, tokenizer):
    def name(texts, **options):
        return rocr.collect_statistics(model, tokenizer, texts, [0], CollectOptions(length=8, **options)).text

    assert name(["Ada Byron wrote."]) == name(iter(["Ada Byron wrote."]))
    assert name(["Ada Byron wrote."]) != name(["Ada", " Byron wrote."]), "documents are told apart"
    expected = hashlib.sha256((5).to_bytes(8, "little") + "né n".encode()).hexdigest()
    assert name(["né n"]) == expected
    assert name(["Ada Byron wrote."], text_sha256="given") == "given"


def test_without_text_the_model_writes_it_reproducibly(model, tokenizer):
    def collect(seed):
        return rocr.collect_statistics(model, tokenizer, None, [1], CollectOptions(tokens=500, seed=seed))

    state = torch.get_rng_state()
    first, again, other = collect(1), collect(1), collect(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.second_moment(1), again.second_moment(1))
    assert not torch.equal(first.second_moment(1), other.second_moment(1))
    assert (first.tokens, first.text) == (500, "written by the model, seed 1")


def test_layers_are_chosen_from_the_depth(model, tokenizer, texts):
    assert rocr.collect_statistics(model, tokenizer, texts, options=CUT).layers == (1, 3)


@pytest.mark.parametrize("family", ["GPT-2", "Llama"], indirect=True)
def test_sequences_fit_into_the_models_positions(family, make_model, tokenizer, texts):
    short = {"GPT-2": "n_positions", "Llama": "max_position_embeddings"}[family]
    model = make_model(family, **{short: 16})
    longest = []
    find_architecture(model).layers[0].register_forward_pre_hook(
        lambda _module, inputs: longest.append(inputs[0].shape[1])
    )
    rocr.collect_statistics(model, tokenizer, texts, [1])
    assert max(longest) == 16


def test_progress_counts_tokens_and_knows_the_total(model, tokenizer, texts):
    steps = []
    size = sum(len(text.encode()) for text in texts)
    options = CollectOptions(length=32, batch_tokens=128, text_bytes=size)
    statistics = rocr.collect_statistics(model, tokenizer, texts, [1], options, progress=steps.append)
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert steps[-1].done == steps[-1].total == statistics.tokens
    # All texts are tokenised before the first batch is read.
    assert all(step.total == pytest.approx(statistics.tokens, rel=0.05) for step in steps)
    assert {(step.stage, step.unit) for step in steps} == {("statistics", "tokens")}


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [([], "layers is empty"), ([5], "Layer 5 is out of range"), ([1, -1], "Layer -1 is out of range")],
)
def test_layers_that_are_not_there(model, tokenizer, texts, layers, sentence):
    with pytest.raises(InputError, match=sentence):
        rocr.collect_statistics(model, tokenizer, texts, layers)


@pytest.mark.parametrize("texts", [[], [""], ["x"]])
def test_text_without_tokens(model, tokenizer, texts):
    with pytest.raises(InputError, match=f"gave no tokens to collect: {len(texts)} documents"):
        rocr.collect_statistics(model, tokenizer, texts, [1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"length": 1}, "length must be at least 2"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"checkpoint": "somewhere"}, "needs text_sha256"),
    ],
)
def test_options_out_of_range(options, sentence):
    with pytest.raises(InputError, match=sentence):
        CollectOptions(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_stop_the_collection(model, tokenizer, texts, value):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(rocr.GuardError, match="keys of layer 1 are not finite"):
        rocr.collect_statistics(model, tokenizer, texts, [0, 1])
