from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

import rocr
from rocr import Concept, EditConfig, GuardError, InputError
from rocr.keys.plan import plan_keys
from rocr.keys.read import read_layers, read_states
from rocr.model.architecture import find_architecture

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EditConfig(
    templates=("Who is {}?", "It is about {}.", "A longer text that tells much about {}."), variants="none"
)
ROUNDING = 5e-6  # batched float32 against unbatched, relative to the largest value; at most 1.1e-6 was measured


@contextmanager
def passes(architecture, hidden_layer, key_layer):
    """A list that each forward pass inside adds to: the tokens of its first row, and its states by name."""
    found = []

    def keep(name):
        return lambda _module, inputs, output=None: found[-1].__setitem__(name, inputs[0] if output is None else output)

    layer, projection = architecture.layers[hidden_layer], architecture.down_projection(key_layer).module
    embedding = architecture.model.get_input_embeddings()
    with ExitStack() as stack:
        for handle in (
            embedding.register_forward_pre_hook(
                lambda _, inputs: found.append({"tokens": tuple(inputs[0][0].tolist())})
            ),
            layer.register_forward_hook(keep("hidden")),
            projection.register_forward_pre_hook(keep("keys")),
        ):
            stack.callback(handle.remove)
        yield found


def means(reading, states_of):
    """The means of each group in float64, where states_of(tokens) gives the states of one prompt by their names."""
    sums, counts = {}, torch.zeros(reading.groups, dtype=torch.float64)
    for prompt, position, group in zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True):
        for name, states in states_of(tuple(reading.prompts[prompt].tokens)).items():
            if name != "tokens":
                state = (states if isinstance(states, torch.Tensor) else states[0])[0, position].double()
                sums.setdefault(name, torch.zeros(reading.groups, len(state), dtype=torch.float64))[group] += state
        counts[group] += 1
    return {name: total / counts[:, None] for name, total in sums.items()}


def reference(architecture, reading, hidden_layer, key_layer):
    """Each prompt by itself through the whole model, means in float64."""
    with passes(architecture, hidden_layer, key_layer) as found, torch.no_grad():

        def states_of(tokens):
            architecture.model(torch.tensor([tokens]))
            return found[-1]

        return means(reading, states_of)


def assert_near(states, expected):
    for name, values in expected.items():
        error = (getattr(states, name).double() - values).abs().max() / values.abs().max()
        assert error < ROUNDING, f"{name}: {error}"


def test_states_are_the_means_of_each_group(family, make_model, tokenizer, concepts):
    architecture = find_architecture(make_model(family))
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    states = read_states(architecture, reading, hidden_layer=3, key_layer=1)
    expected = reference(architecture, reading, 3, 1)
    assert set(expected) == {"hidden", "keys"}
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
    # The states of the very passes that are read: those of other passes may be rounded to other bfloat16 numbers.
    with passes(architecture, 2, 1) as found:
        states = read_states(architecture, reading, 2, 1, token_budget=1, share=False)
    assert states.keys.dtype == torch.float32

    def states_of(tokens):  # a prompt is run up to the last token that is read
        fitting = [each for each in found if tokens[: len(each["tokens"])] == each["tokens"]]
        return max(fitting, key=lambda each: len(each["tokens"]))

    assert_near(states, means(reading, states_of))


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
    assert states.keys is None and states.gains is None


def test_a_module_that_never_runs_is_named(model, tokenizer, concepts):
    """A fused kernel multiplies by the weight itself: no hook on the down-projection is called."""
    architecture = find_architecture(model)
    mlp = model.model.layers[1].mlp

    def fused(states):
        return nn.functional.linear(mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states), mlp.down_proj.weight)

    mlp.forward = fused
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    with pytest.raises(InputError, match=r"did not call model\.layers\.1\.mlp\.down_proj, .* fused kernel"):
        read_states(architecture, reading, 2, 1)
    with pytest.raises(InputError, match=r"without calling model\.layers\.1\.mlp\.down_proj"):
        rocr.collect_statistics(model, tokenizer, ["Ada Byron wrote programs."], layers=(1,))
    assert read_states(architecture, reading, 2, 2).keys.any(), "other layers can be read"


def test_a_module_that_runs_twice_has_no_single_key(model, tokenizer, concepts):
    mlp = model.model.layers[1].mlp
    once = mlp.forward
    mlp.forward = lambda states: once(states) + once(states)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj runs more than once"):
        read_states(find_architecture(model), plan_keys(tokenizer, concepts, CONFIG).keys, 2, 1)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj runs more than once"):
        rocr.collect_statistics(model, tokenizer, ["Ada Byron wrote programs."], layers=(1,))


def test_tokens_that_a_module_flattens_are_read_in_their_places(model, tokenizer, concepts, texts):
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    expected = read_states(find_architecture(model), reading, 2, 1)
    moments = rocr.collect_statistics(model, tokenizer, texts, layers=(1,)).second_moment(1)
    mlp = model.model.layers[1].mlp
    straight = mlp.forward
    mlp.forward = lambda states: straight(states.reshape(-1, states.shape[-1])).view(states.shape)
    found = read_states(find_architecture(model), reading, 2, 1)
    torch.testing.assert_close(found.keys, expected.keys, rtol=1e-4, atol=1e-5)
    again = rocr.collect_statistics(model, tokenizer, texts, layers=(1,)).second_moment(1)
    torch.testing.assert_close(again, moments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile_it", ["in place", "a layer"])
def test_compiled_models_are_read_as_they_are_written(model, tokenizer, concepts, texts, compile_it):
    architecture = find_architecture(model)
    reading = plan_keys(tokenizer, concepts, CONFIG).keys
    expected = read_layers(architecture, reading, 2, (1, 2))
    moments = rocr.collect_statistics(model, tokenizer, texts, layers=(1, 2))
    (model if compile_it == "in place" else model.model.layers[1]).compile(backend="eager")
    model(torch.tensor([[5, 6, 7]]))
    for layer, states in read_layers(architecture, reading, 2, (1, 2)).items():
        assert torch.equal(states.keys, expected[layer].keys)
    found = rocr.collect_statistics(model, tokenizer, texts, layers=(1, 2))
    assert torch.equal(found.second_moment(2), moments.second_moment(2))


def test_keys_that_are_all_zero_are_no_statistics(model, tokenizer, texts):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(GuardError, match="All keys of layer 1 are zero"):
        rocr.collect_statistics(model, tokenizer, texts, layers=(1,))
