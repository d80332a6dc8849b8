"""A layer that is run again to measure it: with the state of the first pass and its hooks, and not compiled."""

import copy
from contextlib import ExitStack
from functools import partial

import pytest
import torch

import rocr
from rocr import EditConfig, InputError
from rocr.model.architecture import find_architecture
from rocr.model.capture import run_through
from rocr.model.gains import LayerCall, layers_with_gain, measure_gains, recording

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
LAYERS = (1, 3)
HALF = torch.linspace(0.2, 0.8, 32)


def edited(model, tokenizer, texts, concepts):
    """The share of the residual that remains after an edit."""
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers=LAYERS)
    return rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=LAYERS)).report.distance


@pytest.fixture
def normed(make_model):
    """Layers whose MLP a norm follows, whose gains depend on the state."""
    return make_model("OLMo2")


def adds_in_place(layer, hidden, in_place=True, **options):
    attended, _ = layer.self_attn(hidden_states=hidden, **options)
    hidden = hidden.add_(attended) if in_place else hidden + attended
    passed = layer.post_feedforward_layernorm(layer.mlp(hidden))
    return hidden.add_(passed) if in_place else hidden + passed


def test_layers_that_add_to_their_input_in_place(normed, tokenizer, texts, concepts):
    found = []
    for in_place in (False, True):
        model = copy.deepcopy(normed)
        for layer in model.model.layers:
            layer.forward = partial(adds_in_place, layer, in_place=in_place)
        found.append(edited(model, tokenizer, texts, concepts))
    assert found[1] == found[0]


def test_a_hook_that_scales_a_layer_output_is_measured(model, tokenizer, texts, concepts):
    """The same as this factor in the layer's own code."""
    found = []
    for spelling in ("hook", "code"):
        spelled = copy.deepcopy(model)
        for layer in spelled.model.layers:
            if spelling == "hook":
                layer.register_forward_hook(lambda _module, _inputs, output: output * HALF)
            else:
                plain = layer.forward
                layer.forward = lambda *inputs, plain=plain, **options: plain(*inputs, **options) * HALF
        assert layers_with_gain(find_architecture(spelled), LAYERS) == LAYERS
        found.append(edited(spelled, tokenizer, texts, concepts))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_hook_that_changes_a_layer_input_runs_once(model):
    architecture = find_architecture(model)
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2, *inputs[1:]))
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    layers_with_gain(architecture, (1,))
    assert len(seen) == 2, "the pass, and the layer by itself"
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)


def test_modules_compiled_in_place(model, tokenizer, texts, concepts):
    expected = edited(copy.deepcopy(model), tokenizer, texts, concepts)
    for module in (model.model.layers[1], model.model.layers[3].mlp, model.model.layers[3].mlp.down_proj):
        module.compile(backend="eager")
    model(torch.tensor([[5, 6, 7]]))  # compiles them
    assert edited(model, tokenizer, texts, concepts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("detached", [torch.Tensor.detach, lambda states: torch.from_numpy(states.detach().numpy())])
def test_code_that_detaches_its_tensors_is_measured_by_differences(model, tokenizer, texts, concepts, detached):
    expected, found = copy.deepcopy(model), copy.deepcopy(model)
    for spelled, step in ((expected, lambda states: states), (found, detached)):
        for layer in spelled.model.layers:
            plain = layer.forward
            layer.forward = lambda *inputs, plain=plain, step=step, **options: step(plain(*inputs, **options)) * 0.5
    assert edited(found, tokenizer, texts, concepts) == pytest.approx(
        edited(expected, tokenizer, texts, concepts), rel=1e-2
    )


def test_a_layer_that_leaves_its_down_projection_out_is_named(model):
    call = LayerCall(
        "model.layers.1", torch.nn.Identity(), model.model.layers[1].mlp.down_proj, (torch.ones(1, 2, 32),)
    )
    with pytest.raises(InputError, match=r"did not call the down-projection of model\.layers\.1"):
        call.run(lambda output: output)


def test_keys_of_a_module_that_gets_its_input_by_name(model, tokenizer, texts, concepts):
    expected = edited(copy.deepcopy(model), tokenizer, texts, concepts)
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda states, mlp=mlp: mlp.down_proj(
            input=mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
        )
    assert edited(model, tokenizer, texts, concepts) == pytest.approx(expected, rel=1e-5)


def test_a_model_without_values_is_named(model, tokenizer, texts):
    with pytest.raises(InputError, match="is on the meta device"):
        rocr.collect_statistics(model.to("meta"), tokenizer, texts, layers=LAYERS)


@pytest.mark.parametrize("mix", [lambda states: states.flip(-1), lambda states: states @ torch.randn(32, 32)])
def test_layers_that_mix_channels_are_refused(model, tokenizer, texts, concepts, mix):
    """The same as another matrix after the MLP."""
    torch.manual_seed(0)
    for layer in model.model.layers:
        plain = layer.forward
        layer.forward = lambda states, plain=plain, **options: states + mix(plain(states, **options) - states)
    statistics = rocr.collect_statistics(model, tokenizer, texts, layers=LAYERS)
    sentence = r"layer model\.layers\.1 mixes the channels of its down-projection.*: .* of the change of a channel"
    with pytest.raises(InputError, match=sentence):
        rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=LAYERS))


class WithoutDerivative(torch.autograd.Function):
    """A fused operation that offers no forward derivative."""

    @staticmethod
    def forward(_context, states):
        return states * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differences_are_large_enough_beside_a_long_residual_stream(model, dtype):
    """The stream is some thirty times as long as what the MLP adds to it."""
    architecture = find_architecture(model.to(dtype))
    with torch.no_grad():
        architecture.embedding.weight.mul_(100)
    for layer in architecture.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda states, plain=plain: WithoutDerivative.apply(plain(states))
    call = LayerCall.of(architecture, 1)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with ExitStack() as stack:
        recording(stack, call)
        run_through(architecture, 1, tokens)
    stream, added = call.arguments[0].float(), []
    handle = call.projection.register_forward_hook(lambda _module, _inputs, output: added.append(output.float()))
    gains = measure_gains(model, call, tokens.shape)
    handle.remove()
    eps = torch.finfo(dtype).eps
    noise = eps ** (2 / 3) * float(stream.norm() / added[0].norm())  # of a rounding, over the step
    assert float((gains - 0.5).square().mean().sqrt()) < max(noise, 4 * eps)
