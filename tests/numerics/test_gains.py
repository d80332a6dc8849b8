"""How a change of a down-projection's output passes to the output of its layer."""

import copy
import sys
from contextlib import ExitStack

import pytest
import torch
import transformers

import rocr
from rocr import Concept, EditConfig, GuardError, Guards, InputError
from rocr.edit.guards import expected_movement
from rocr.model.architecture import find_architecture
from rocr.model.capture import run_through
from rocr.model.gains import LayerCall, before_output_norm, divide_by_gains, layers_with_gain, measure_gains, recording
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
WITHOUT = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "GPT-2", "GPT-J", "GPT-NeoX")
EVEN = {"ridge": 1e-6, "gamma": 0.0, "key_tokens": "last", "templates": ("Who is {}",)}


def gains_of(model, layer=1, tokens=TOKENS):
    architecture = find_architecture(model)
    call = LayerCall.of(architecture, layer)
    with ExitStack() as stack:
        recording(stack, call)
        run_through(architecture, layer, tokens)
    return measure_gains(model, call, tokens.shape), call


def multiplied(model, factor):
    """The model with its MLP's output multiplied by a factor behind the down-projection."""
    for layer in model.model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda states, plain=plain: plain(states) * factor
    return model


def folded(model, factor):
    """The same function with the factor in the weights."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= factor
    return model


def test_only_what_changes_on_its_way_is_measured(family, make_model):
    layers = layers_with_gain(find_architecture(make_model(family)), (1, 3))
    assert layers == (() if family in WITHOUT else (1, 3))


def test_a_multiplier_is_measured_exactly(model):
    gains, _ = gains_of(multiplied(model, torch.linspace(0.1, 2.0, 32)))
    torch.testing.assert_close(gains, torch.linspace(0.1, 2.0, 32).expand(2, 5, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [(1,), (1, 3)])
@pytest.mark.parametrize("factor", [0.22, 3.0])
def test_two_spellings_of_one_function_give_one_result(model, tokenizer, texts, concepts, factor, layers):
    """A factor behind the MLP, as Granite has, or the same factor in the weights: the states move alike."""
    outcomes = []
    for make in (multiplied, folded):
        spelled = make(copy.deepcopy(model), factor)
        statistics = rocr.collect_statistics(spelled, tokenizer, texts, layers)
        edit = rocr.unlearn(spelled, tokenizer, concepts, statistics, EditConfig(layers=layers, least_closed=0.0))
        outcomes.append((edit.report.distance, spelled(TOKENS).logits.detach()))
    (first, logits), (second, others) = outcomes
    assert first == pytest.approx(second, rel=1e-3)
    assert (logits - others).norm() < 1e-3 * (logits - model(TOKENS).logits.detach()).norm()


def test_gains_behind_a_norm_are_those_of_its_derivative(make_model):
    model = make_model("OLMo2")
    norm = model.model.layers[1].post_feedforward_layernorm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.2, 3.0, 32))
    gains, call = gains_of(model)
    seen = []
    handle = call.projection.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    model(TOKENS)
    handle.remove()
    scale = seen[0].double().square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(gains.double(), norm.weight.detach().double() / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gain", [0.1, 0.01, 0.002, 0.0])
def test_channels_that_a_norm_scales_away_do_not_blow_an_update_up(make_model, gain):
    norm = make_model("OLMo2", hidden_size=256).model.layers[1].post_feedforward_layernorm
    with torch.no_grad():
        norm.weight[:8] = gain
    outputs, wanted = torch.randn(4, 256), 0.3 * torch.randn(4, 256)
    with torch.no_grad():
        change = before_output_norm(norm, outputs, wanted)
        moved = norm(outputs + change) - norm(outputs)
    assert float((moved * wanted).sum() / wanted.square().sum()) > 0.85
    assert change.norm() < outputs.norm()


def test_the_damped_inverse():
    gains = torch.ones(1, 1000)
    gains[0, 0] = 0.1
    inverse = divide_by_gains(torch.ones(1, 1000), gains)[0]
    assert float(inverse[5]) == pytest.approx(1, rel=1e-3), "gains of the mean size are inverted exactly"
    assert float(gains[0, 0] * inverse[0]) == pytest.approx(0.5, rel=0.02), "a tenth of it is moved half of the way"
    gains = torch.logspace(-6, 0, 1000)[None]
    assert divide_by_gains(torch.ones(1, 1000), gains).max() < 5.1 / gains.mean()
    assert torch.allclose(divide_by_gains(torch.ones(2, 5), -3 * torch.ones(2, 5)), torch.full((2, 5), -1 / 3))
    with pytest.raises(InputError, match="does not depend on its down-projection: all gains are zero"):
        divide_by_gains(torch.ones(1, 5), torch.zeros(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Granite", {"residual_multiplier": 0.22}), ("Gemma2", {"head_dim": 8}), ("Glm4", {"head_dim": 8})],
)
def test_a_state_behind_factors_and_norms_moves_whatever_the_size_of_the_weight(
    make_model, tokenizer, texts, kind, changes, dtype
):
    """Named otherwise in each family: residual_multiplier, post_feedforward_layernorm, post_mlp_layernorm."""
    sizes = make_model("Llama").config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = getattr(transformers, f"{kind}Config")(
        **{name: sizes[name] for name in (*names, "vocab_size", "initializer_range")},
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    shares = []
    for scale in (1, 100):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight *= scale
        model.to(dtype)

        def state(text, model=model):
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            return found.hidden_states[3][0, -1].detach().double()

        start, way = state("Who is Ada Byron"), state("Who is Blaise Pascal") - state("Who is Ada Byron")
        statistics = rocr.collect_statistics(model, tokenizer, texts, layers=(2,))
        settings = EditConfig(layers=(2,), strength=0.2, **EVEN)
        rocr.unlearn(model, tokenizer, [Concept("Ada Byron", "Blaise Pascal")], statistics, settings)
        shares.append(float((state("Who is Ada Byron") - start) @ way / (way @ way)) / 0.2)
    assert shares == pytest.approx([1, 1], abs=0.15)


class WithoutDerivative(torch.autograd.Function):
    """A fused operation that offers no forward derivative."""

    @staticmethod
    def forward(_context, states):
        return states * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_without_a_forward_derivative_are_measured_by_differences(model, dtype):
    model.to(dtype)
    for layer in model.model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda states, plain=plain: WithoutDerivative.apply(plain(states))
    assert layers_with_gain(find_architecture(model), (1,)) == (1,)
    gains, _ = gains_of(model)
    error = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(gains.mean(dim=-1), torch.full((2, 5), 0.5), rtol=error, atol=error)


def test_a_weight_whose_output_goes_nowhere_is_refused(model, tokenizer, concepts, statistics, weights_of):
    before = weights_of(model)
    multiplied(model, 0.0)
    with pytest.raises(InputError, match=r"the layer model\.layers\.1 does not depend on its down-projection"):
        rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=(1,)))
    assert same_weights(weights_of(model), before)


def test_states_that_are_no_sequence_of_vectors_are_refused(model, tokenizer, concepts, statistics):
    plain = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *inputs, **options: plain(*inputs, **options)[None]
    with pytest.raises(InputError, match=r"model\.layers\.1 .*has the shape \(1, 1, \d+, 32\).* not \(batch, tokens"):
        rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=(1,)))


def test_an_edit_that_does_not_arrive_is_refused(model, tokenizer, texts, concepts, monkeypatch, weights_of):
    """Where the factor is not measured, the states move by a tenth of what the updates close."""
    multiplied(model, 0.1)
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers=(1, 2))
    before = weights_of(model)

    def edit(**limits):
        config = EditConfig(layers=(1, 2), ridge=0.1)
        return rocr.unlearn(
            model, tokenizer, concepts, statistics, config, guards=Guards(relative_norm=100, divergence=100, **limits)
        )

    found = edit()
    assert found.report.limits_passed == []
    found.revert(model)
    monkeypatch.setattr(sys.modules["rocr.unlearn"], "layers_with_gain", lambda *_: ())
    words = r"The edit does not reach the states: at the concepts' keys, the updates cover \d+% of the distance"
    with pytest.raises(GuardError, match=words):
        edit()
    assert same_weights(weights_of(model), before)
    assert any("does not reach the states" in sentence for sentence in edit(force=True).report.limits_passed)


def test_how_much_of_the_way_updates_should_cover():
    assert expected_movement([0.5], EditConfig()) == 0.5
    assert expected_movement([1.0, 1.0], EditConfig()) == 1.0
    assert expected_movement([1.0, 0.0], EditConfig()) == 0.5
    assert expected_movement([0.8, 0.8], EditConfig()) == pytest.approx(1 - 0.6 * 0.2)
    assert expected_movement([0.8, 0.4], EditConfig(measure="once")) == pytest.approx(0.6)
