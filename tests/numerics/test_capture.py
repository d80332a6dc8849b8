import linecache
import sys

import pytest
import torch
from torch import nn

from rocr.errors import InputError
from rocr.model.architecture import find_architecture
from rocr.model.capture import hidden_hook, input_hook, run_through
from rocr.model.hooks import evaluating

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_only_the_wanted_layers_run(family, make_model):
    model = make_model(family)
    architecture = find_architecture(model)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or module in architecture.layers:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    run_through(architecture, 2, TOKENS)
    layers = [f"{architecture.layers_name}.{layer}" for layer in range(5)]
    assert [name for name in ran if name in layers] == layers[:3]
    assert not [name for name in ran if name.startswith((layers[3], layers[4], "lm_head", "embed_out"))]
    model(TOKENS)
    assert [name for name in ran if name in layers] == layers[:3] + layers, "the hooks do see every layer"


def test_what_is_recorded_is_what_flows_through_the_whole_model(family, make_model):
    model = make_model(family)
    architecture = find_architecture(model)
    expected = model(TOKENS, output_hidden_states=True).hidden_states
    hidden, keys, outputs = [], [], []
    projection = architecture.down_projection(1)
    with (
        hidden_hook(architecture, 2, hidden.append),
        input_hook(projection.module, keys.append),
        torch.no_grad(),
    ):
        projection.module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        run_through(architecture, 2, TOKENS)
    assert torch.equal(hidden[0], expected[3])
    torch.testing.assert_close(projection.module(keys[0]), outputs[0])
    assert keys[0].shape == (2, 5, projection.weight.shape[1])


def test_padding_on_the_right_changes_no_state(family, make_model):
    architecture = find_architecture(make_model(family))
    alone, padded = [], []
    with hidden_hook(architecture, 3, alone.append):
        run_through(architecture, 3, TOKENS[:1, :3])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with hidden_hook(architecture, 3, padded.append):
        run_through(architecture, 3, TOKENS, mask)
    torch.testing.assert_close(padded[0][:1, :3], alone[0], rtol=1e-4, atol=1e-4)


def test_dropout_is_off_and_the_modes_come_back(make_model):
    model = make_model("GPT-2", resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    architecture = find_architecture(model)
    states = []
    with hidden_hook(architecture, 1, states.append):
        run_through(architecture, 1, TOKENS)
        run_through(architecture, 1, TOKENS)
    assert torch.equal(*states)
    assert model.training and model.lm_head.training
    assert not any(module.training for module in model.transformer.h[1].modules())


def test_nothing_is_left_behind_when_a_pass_fails(model):
    architecture = find_architecture(model.train())

    def refuse(_states):
        raise ArithmeticError

    with (
        pytest.raises(InputError, match="LlamaForCausalLM failed: ArithmeticError"),
        hidden_hook(architecture, 1, refuse),
    ):
        run_through(architecture, 3, TOKENS)
    with pytest.raises(InputError, match="LlamaForCausalLM failed: IndexError"), hidden_hook(architecture, 1, refuse):
        run_through(architecture, 3, torch.tensor([[100_000]]))
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert hooks_left(model) == 0
    assert all(module.training for module in model.modules())


def test_no_graph_is_kept(model):
    states = []
    with hidden_hook(find_architecture(model), 1, states.append):
        run_through(find_architecture(model), 1, TOKENS)
    assert not states[0].requires_grad
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_an_interruption_at_any_line_leaves_the_model_as_it_was(model):
    """A trace function raises where a signal could: before each line of capture.py and hooks.py, one by one."""
    architecture, tokens = find_architecture(model), torch.tensor([[5, 6, 7]])
    expected = model(tokens).logits

    def run(stop_at):
        lines = []

        def trace(frame, event, _argument):
            inside = frame.f_code.co_filename.endswith(("rocr/model/capture.py", "rocr/model/hooks.py"))
            # Signals are handled behind calls and jumps: none comes between the context's end and this first call.
            is_first = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() == "active.clear()"
            if event == "line" and inside and not is_first:
                lines.append(frame.f_lineno)
                if len(lines) == stop_at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace if inside else None

        found = []
        sys.settrace(trace)
        try:
            with hidden_hook(architecture, 1, found.append):
                run_through(architecture, 1, tokens)
        finally:
            sys.settrace(None)
        return len(lines), found

    total, (first,) = run(stop_at=0)
    assert total > 30
    for stop_at in range(1, total + 1):
        with pytest.raises(KeyboardInterrupt):
            run(stop_at)
        assert torch.equal(model(tokens).logits, expected), f"line event {stop_at} of {total}"
        _, (again,) = run(stop_at=0)
        assert torch.equal(again, first)
