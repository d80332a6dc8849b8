import pytest
import torch

from rocr import Concept, EditConfig
from rocr.architectures import find_architecture
from rocr.key_plan import plan_keys
from rocr.keys import before_output_norm, read_states

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(templates=("Who is {}?", "It is about {}.", "A longer text that tells much about {}."))
ROUNDING = 5e-6  # batched float32 against unbatched, relative to the largest value; at most 1.1e-6 was measured


def reference(architecture, reading, hidden_layer, key_layer):
    """Each prompt by itself through the whole model, means in float64."""
    found = {}

    def keep(name):
        return lambda _module, inputs, output=None: found.__setitem__(name, inputs[0] if output is None else output)

    layer, projection = architecture.layers[hidden_layer], architecture.down_projection(key_layer).module
    norm = architecture.output_norm(key_layer)
    handles = [layer.register_forward_hook(keep("hidden")), projection.register_forward_pre_hook(keep("keys"))]
    if norm is not None:
        handles.append(norm.register_forward_pre_hook(keep("outputs")))
    sums, counts = {}, torch.zeros(reading.groups, dtype=torch.float64)
    for prompt, position, group in zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True):
        with torch.no_grad():
            architecture.model(torch.tensor([reading.prompts[prompt].tokens]))
        for name, states in found.items():
            state = (states if isinstance(states, torch.Tensor) else states[0])[0, position].double()
            sums.setdefault(name, torch.zeros(reading.groups, len(state), dtype=torch.float64))[group] += state
        counts[group] += 1
    for handle in handles:
        handle.remove()
    return {name: total / counts[:, None] for name, total in sums.items()}


def assert_near(states, expected):
    for name, values in expected.items():
        error = (getattr(states, name).double() - values).abs().max() / values.abs().max()
        assert error < ROUNDING, f"{name}: {error}"


def test_states_are_the_means_of_each_group(family, make_model, tokenizer, concepts):
    architecture = find_architecture(make_model(family))
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    states = read_states(architecture, reading, hidden_layer=3, key_layer=1)
    expected = reference(architecture, reading, 3, 1)
    assert set(expected) == {"hidden", "keys"} | ({"outputs"} if architecture.output_norm(1) else set())
    assert_near(states, expected)
    assert states.hidden.dtype == states.keys.dtype == torch.float32


@pytest.mark.parametrize("keys_per_concept", ["mean", "all"])
@pytest.mark.parametrize("key_tokens", ["last", "all"])
def test_states_of_every_choice(model, tokenizer, concepts, key_tokens, keys_per_concept):
    config = EditConfig(templates=CONFIG.templates, key_tokens=key_tokens, keys_per_concept=keys_per_concept)
    architecture = find_architecture(model)
    for reading in (plan_keys(tokenizer, concepts, config).keys, plan_keys(tokenizer, concepts, config).targets):
        assert_near(read_states(architecture, reading, 2, 2), reference(architecture, reading, 2, 2))


@pytest.mark.parametrize("token_budget", [1, 13, 40, 100_000])
def test_the_token_budget_changes_nothing(model, tokenizer, concepts, token_budget):
    architecture = find_architecture(model)
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    batches, expected = [], reference(architecture, reading, 2, 1)
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: batches.append(inputs[0].shape))
    assert_near(read_states(architecture, reading, 2, 1, token_budget=token_budget), expected)
    hook.remove()
    assert sum(rows for rows, _ in batches) == len(reading.prompts)
    assert all(rows * longest <= token_budget or rows == 1 for rows, longest in batches)
    assert len(batches) == {1: len(reading.prompts), 100_000: 1}.get(token_budget, len(batches))


def test_states_in_half_precision_are_summed_in_float32(make_model, tokenizer, concepts):
    architecture = find_architecture(make_model("Llama").bfloat16())
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    states = read_states(architecture, reading, 2, 1, token_budget=1)
    assert states.keys.dtype == torch.float32
    assert_near(states, reference(architecture, reading, 2, 1))


def test_progress_counts_prompts(model, tokenizer, concepts):
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    steps = []
    read_states(find_architecture(model), reading, 2, token_budget=40, progress=steps.append, stage="keys")
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert steps[-1].done == steps[-1].total == len(reading.prompts)
    assert {(step.stage, step.unit) for step in steps} == {("keys", "prompts")}


def test_only_what_was_asked_for_is_read(model, tokenizer):
    reading = plan_keys(tokenizer, [Concept("Ada Byron", "Blaise Pascal")], CONFIG).targets
    states = read_states(find_architecture(model), reading, 2)
    assert states.keys is None and states.outputs is None


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "OLMo2"], indirect=True)
def test_residuals_before_a_norm_move_its_output_as_wanted(family, make_model):
    norm = find_architecture(make_model(family)).output_norm(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    outputs = torch.randn(9, 32, dtype=torch.float32) * 3
    wanted = norm(outputs + 1e-3 * torch.randn_like(outputs)) - norm(outputs)
    moved = norm(outputs + before_output_norm(norm, outputs, wanted)) - norm(outputs)
    # The change of the root mean square is left out: about a share 1 / sqrt(32) of a move in a random direction.
    assert ((moved - wanted).norm() / wanted.norm()) < 0.35
    along = (moved * wanted).sum(dim=1) / wanted.square().sum(dim=1)
    torch.testing.assert_close(along, torch.ones(9), rtol=0.1, atol=0.1)


def test_a_gain_of_nearly_zero_does_not_blow_a_residual_up(make_model):
    norm = find_architecture(make_model("OLMo2")).output_norm(1)
    with torch.no_grad():
        next(norm.parameters())[3] = 0.0
    residuals = before_output_norm(norm, torch.randn(4, 32), torch.ones(4, 32))
    assert residuals.isfinite().all()
    assert residuals[:, 3].abs().max() < 2e3 * residuals[:, 4].abs().max()
