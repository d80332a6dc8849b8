"""The losses and the parts of compared methods, against formulas in float64 and against other ways to compute them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation import Probe
from rocr.evaluation.baselines import advnpo, jensun, mrp, rmu, unierase
from rocr.evaluation.baselines.extra_token import extra_token
from rocr.evaluation.baselines.layer_outputs import answer_log_probabilities, answer_nll, changed_states, states_after
from rocr.evaluation.baselines.low_rank import low_rank_adapter
from rocr.evaluation.baselines.method import Case, MethodComparison
from rocr.evaluation.baselines.methods import METHOD
from rocr.evaluation.baselines.training import Schedule, float32_weights, in_turn, optimise, restored, trainable
from rocr.evaluation.lora_training import Example
from rocr.evaluation.probes.probe import split_by_subject
from rocr.model.architecture import find_architecture

PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London"),
    Probe("Ada Byron", "What did Ada Byron write?", "programs"),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air"),
    Probe("Blaise Pascal", "What did Blaise Pascal build?", "machines"),
]
EXAMPLE = Example((10, 20, 30, 40), (50, 60, 70))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case(model, tokenizer, statistics):
    comparison = MethodComparison(model, tokenizer, PROBES, statistics, "a gardener", forms=["qa"])
    return Case(comparison, model, "Ada Byron", split_by_subject(PROBES, ["Ada Byron"]))


def divergence_by_hand(one, other):
    total = 0.0
    for p, q in zip(one, other, strict=True):
        m = (p + q) / 2
        total += 0.5 * (p * math.log(p / m) if p else 0.0) + 0.5 * (q * math.log(q / m) if q else 0.0)
    return total


def test_jensen_shannon_divergence():
    logits = torch.randn(2, 3, 11)
    one, other = logits.log_softmax(-1)
    exact = [divergence_by_hand(p, q) for p, q in zip(*logits.double().softmax(-1).tolist(), strict=True)]
    assert jensun.jensen_shannon(one, other).tolist() == pytest.approx(exact, rel=1e-5)
    assert jensun.jensen_shannon(one, one).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_the_divergence_from_a_refusal_is_that_of_its_one_hot_distributions(scale):
    logits = (torch.randn(5, 7) * scale).requires_grad_()
    refusal = [2, 6]
    exact = 0.0
    for t, p in enumerate(logits.detach().double().softmax(-1).tolist()):
        exact += divergence_by_hand(p, [float(v == refusal[t % 2]) for v in range(7)]) / 5
    loss = jensun.refusal_divergence(logits.log_softmax(-1), refusal)
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    assert loss.item() <= math.log(2) + 1e-6
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_log_probabilities_of_an_answer_are_those_of_the_whole_text(model):
    whole = model(torch.tensor([[*EXAMPLE.prompt, *EXAMPLE.answer]])).logits[0].double().log_softmax(-1)
    found = answer_log_probabilities(model, EXAMPLE)
    torch.testing.assert_close(found.double(), whole[3:6], rtol=0, atol=1e-5)
    exact = -sum(whole[3 + i, token].item() for i, token in enumerate(EXAMPLE.answer)) / 3
    assert answer_nll(model, EXAMPLE).item() == pytest.approx(exact, rel=1e-5)


def test_jensun_trains_the_adapter_on_both_losses(case, monkeypatch):
    monkeypatch.setattr(jensun, "SCHEDULE", Schedule(2e-2, batch=2, epochs=1, steps=15))
    refusal = case.comparison.tokenizer(jensun.REFUSAL, add_special_tokens=False)["input_ids"]
    forget, retain = case.forget(), case.retain()

    def lost_and_moved():
        with torch.no_grad():
            before = [answer_log_probabilities(case.model, e) for e in (*forget, *retain)]
            with METHOD["JensUn"].unlearned(case):
                after = [answer_log_probabilities(case.model, e) for e in (*forget, *retain)]
        lost = [sum(float(jensun.refusal_divergence(each, refusal)) for each in each[:2]) for each in (before, after)]
        moved = [float(jensun.jensen_shannon(*pair).mean()) for pair in zip(before[2:], after[2:], strict=True)]
        return lost[1] / lost[0], sum(moved)

    lost, moved = lost_and_moved()
    monkeypatch.setattr(jensun, "RETAIN_WEIGHT", 0.0)
    _, moved_freely = lost_and_moved()
    assert lost < 0.9
    assert 0 < moved < 0.6 * moved_freely


def test_states_after_a_layer_have_gradients(model):
    tokens = [5, 6, 7, 8]
    with torch.no_grad():
        exact = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[3][0]
    found = states_after(find_architecture(model), 2, tokens)
    assert torch.equal(found, exact)
    found.sum().backward()
    assert model.model.layers[2].mlp.down_proj.weight.grad is not None
    assert model.model.layers[3].mlp.down_proj.weight.grad is None
    assert not [hook for hook in model.model.layers[2]._forward_hooks.values() if "changed_output" in hook.__qualname__]


def test_rmu_moves_states_of_the_target_to_one_vector_and_changes_three_matrices(case, weights_of, monkeypatch):
    monkeypatch.setattr(rmu, "SCHEDULE", replace(rmu.SCHEDULE, learning_rate=3e-2, steps=60))
    monkeypatch.setattr(rmu, "RETAIN_WEIGHT", 10.0)
    architecture, layer = find_architecture(case.model), rmu.steered_layer(5)
    before = weights_of(case.model)
    direction = torch.rand(32, generator=torch.Generator().manual_seed(42))
    control = rmu.STEERING * direction / direction.norm()

    def errors(examples):
        with torch.no_grad():
            return [states_after(architecture, layer, [*e.prompt, *e.answer]) - control for e in examples]

    def squares(examples):
        return sum(float(error.double().square().sum() / error.numel()) for error in errors(examples))

    first, first_others = squares(case.forget()), errors(case.retain())
    with METHOD["RMU"].unlearned(case):
        changed = {name for name, weight in weights_of(case.model).items() if not torch.equal(weight, before[name])}
        last, last_others = squares(case.forget()), errors(case.retain())
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(layer - 2, layer + 1)}
    assert last < 0.7 * first
    moved = max(float((a - b).square().mean()) for a, b in zip(first_others, last_others, strict=True))
    assert moved < 0.1 * first / 2
    states = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert float(rmu.mean_square(states, torch.tensor([1.0, 1.0]))) == pytest.approx((0 + 1 + 4 + 16) / 4)
    assert [rmu.steered_layer(depth) for depth in (32, 28, 5, 2, 1)] == [7, 6, 2, 1, 0]


def test_small_changes_of_a_bfloat16_weight_add_up(make_model):
    """Added to the weight itself, each of them would be rounded away."""
    model = make_model("Llama").bfloat16()
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().float().clone()
    with restored([weight]):
        with trainable(model), float32_weights([weight]) as (copies, write):
            schedule = Schedule(1e-5, batch=1, epochs=1, steps=50, optimizer="sgd", clip=None)
            optimise(copies, 1, lambda _: iter([weight.float().sum()]), schedule, rocr.progress.silent, write)
            torch.testing.assert_close(copies[0], before - 50 * 1e-5, rtol=0, atol=1e-6)
        assert not torch.equal(weight.float(), before)
        assert torch.equal(weight, copies[0].bfloat16())
    assert torch.equal(weight.float(), before)


def test_a_step_follows_the_mean_gradient_of_its_examples():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    seen = []

    def terms(index):
        seen.append(index)
        yield (rows[index] * weight).sum()
        yield weight.square().sum()

    schedule = Schedule(0.1, batch=2, epochs=1, optimizer="sgd", clip=None, seed=3)
    assert [schedule.count(3), replace(schedule, least_steps=5).count(3), replace(schedule, steps=1).count(3)] == [
        2,
        6,
        1,
    ]
    optimise([weight], 3, terms, replace(schedule, steps=1), rocr.progress.silent)
    mean = (rows[seen[0]] + rows[seen[1]]) / 2
    torch.testing.assert_close(weight.data, torch.tensor([1.0, 2.0]) - 0.1 * (mean + torch.tensor([2.0, 4.0])))
    seen.clear()
    optimise([weight], 3, terms, schedule, rocr.progress.silent)
    assert sorted(seen) == [0, 1, 2]
    numbers = in_turn(3, seed=1)
    assert sorted(next(numbers) for _ in range(3)) == sorted(next(numbers) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(rocr.RocrError, match=r"not a finite number; lower the learning rate, which is 0\.1"):
        optimise([weight], 1, lambda _: iter([weight.sum() / 0]), schedule, rocr.progress.silent)


def test_one_term_is_differentiated_before_the_next_is_made():
    """So that the memory of one forward pass is held at a time."""
    weight = nn.Parameter(torch.ones(3))
    freed = []

    def terms(_):
        first = (weight * 2).exp().sum()
        yield first
        with pytest.raises(RuntimeError, match="second time"):
            first.backward()
        freed.append(True)
        yield weight.sum()

    schedule = Schedule(0.1, batch=1, epochs=1, steps=1)
    optimise([weight], 1, terms, schedule, rocr.progress.silent)
    assert freed == [True]


def test_an_adapter_is_two_factors_beside_each_projection(model, make_model):
    tokens = torch.tensor([[3, 4, 5, 6]])
    plain = model(tokens).logits
    with low_rank_adapter(model, seed=0) as parameters:
        assert len(parameters) == 5 * 2 * 2
        assert torch.equal(model(tokens).logits, plain), "B is zero at first"
        with torch.no_grad():
            for up in parameters[1::2]:
                up.normal_(std=0.1)
        found = model(tokens).logits
        merged = make_model("Llama")
        factors = iter(parameters)
        for name, module in merged.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                down, up = next(factors), next(factors)
                module.weight.data += 2 * up @ down
        torch.testing.assert_close(found, merged(tokens).logits, rtol=0, atol=1e-5)
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)
    assert torch.equal(model(tokens).logits, plain)
    other = low_rank_adapter(make_model("GPT-2"), seed=0)
    with pytest.raises(rocr.InputError, match="no linear modules named q_proj and v_proj"), other:
        pass


def test_directions_are_projected_out_with_those_before():
    states, old, new = torch.randn(3, 4, 12), torch.randn(2, 12), torch.randn(2, 12)
    rows = torch.cat([old, new]).double()
    projector = rows.T @ torch.linalg.inv(rows @ rows.T) @ rows
    found = mrp.project_out(states, old, new)
    torch.testing.assert_close(found.double(), states.double() - states.double() @ projector, rtol=0, atol=1e-5)
    assert (found @ old.T).abs().max() < 1e-4
    torch.testing.assert_close(mrp.project_out(mrp.project_out(states, old[:0], old), old, new), found)
    assert mrp.project_out(states.bfloat16(), old, new).dtype == torch.bfloat16


def test_directions_start_outside_the_target_s_states():
    forget, retain = torch.randn(4, 10), torch.randn(30, 10) * torch.linspace(3, 1, 10)
    basis = torch.linalg.qr(forget.double().T)[0]
    left = retain.double() @ (torch.eye(10, dtype=torch.float64) - basis @ basis.T)
    exact = torch.linalg.eigh(left.T @ left)[1][:, -2:].T.flip(0)
    found = mrp.outside_directions(forget, retain, seed=0)
    assert (found.double() @ exact.T).abs().diagonal().tolist() == pytest.approx([1, 1], abs=1e-4)
    assert (found @ forget.T).abs().max() < 1e-4
    everywhere = mrp.outside_directions(torch.randn(20, 10), retain, seed=0)
    torch.testing.assert_close(everywhere @ everywhere.T, torch.eye(2), rtol=0, atol=1e-5)


def test_a_step_of_mrp_follows_the_gradient_of_its_loss(case, monkeypatch):
    """By central differences of the loss in two entries of W."""
    schedule = replace(mrp.SCHEDULE, batch=1, steps=1, learning_rate=1.0)
    monkeypatch.setattr(mrp, "SCHEDULE", schedule)
    forget, retain = case.forget(), case.retain()
    monkeypatch.setattr(Case, "forget", lambda *_: forget[:1])
    monkeypatch.setattr(Case, "retain", lambda *_: retain[:1])
    with METHOD["MRP"].unlearned(case) as unlearned:
        layers, after = unlearned.state
    monkeypatch.setattr(mrp, "SCHEDULE", replace(schedule, learning_rate=0.0))
    with METHOD["MRP"].unlearned(case) as unlearned:
        start = unlearned.state[1]
    architecture = find_architecture(case.model)

    def loss(first):
        changes = [
            changed_states(architecture, layer, lambda states, row=row: mrp.project_out(states, row[:0], row))
            for layer, row in zip(layers, (first, start[1]), strict=True)
        ]
        with torch.no_grad(), changes[0], changes[1]:
            return float(-answer_nll(case.model, forget[0]) + 1.2 * answer_nll(case.model, retain[0]))

    for place in ((0, 3), (1, 7)):
        step = torch.zeros_like(start[0])
        step[place] = 1e-2
        slope = (loss(start[0] + step) - loss(start[0] - step)) / 2e-2
        assert float((start[0] - after[0])[place]) == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_an_attack_lowers_the_loss_within_its_radius(model):
    architecture = find_architecture(model)
    seen = []
    with torch.no_grad(), changed_states(architecture, 2, lambda states: seen.append(states) or states):
        plain = float(answer_nll(model, EXAMPLE))
    with trainable(model):
        shift = advnpo.attack(architecture, model, 2, EXAMPLE, radius=2.0, steps=3)
    assert shift.norm() <= 2.0 + 1e-4
    shifted = seen[0] + shift
    assert shifted.min() >= seen[0].min() - 1e-5 and shifted.max() <= seen[0].max() + 1e-5
    with torch.no_grad(), changed_states(architecture, 2, lambda states: states + shift):
        assert float(answer_nll(model, EXAMPLE)) < plain - 0.1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_step_of_an_attack_is_along_the_gradient(model):
    architecture = find_architecture(model)
    leaf = torch.zeros(1, 7, 32, requires_grad=True)
    tokens = torch.tensor([[*EXAMPLE.prompt, *EXAMPLE.answer]])
    handle = model.model.layers[2].register_forward_hook(
        lambda _module, _inputs, output: (output[0] + leaf, *output[1:]) if isinstance(output, tuple) else output + leaf
    )
    logits = model(tokens).logits[0, 3:6].double().log_softmax(-1)
    (-sum(logits[i, token] for i, token in enumerate(EXAMPLE.answer)) / 3).backward()
    handle.remove()
    model.zero_grad()
    with trainable(model):
        found = advnpo.attack(architecture, model, 2, EXAMPLE, radius=1e-3, steps=1)
    expected = -1e-3 * leaf.grad / leaf.grad.norm()
    inside = (found - expected).abs() < 1e-6
    assert inside.float().mean() > 0.98, "all but the entries that are clamped"


def test_the_loss_of_negative_preference():
    for change in (-30.0, 0.0, 5.0):
        exact = -2 / 0.0275 * math.log(1 / (1 + math.exp(-0.0275 * change)))
        assert float(advnpo.preference_loss(torch.tensor(change))) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_extra_token_is_a_row_of_both_matrices(tied, make_model):
    model = make_model("Llama", tie_word_embeddings=tied)
    rows = model.config.vocab_size
    plain = torch.tensor([[5, 6, 7]])
    before = model(plain).logits
    resized = make_model("Llama", tie_word_embeddings=tied)
    resized.resize_token_embeddings(rows + 1, mean_resizing=False)
    with extra_token(model, seed=0) as token, torch.no_grad():
        assert token.index == rows
        assert torch.equal(model(plain).logits[..., :-1], before)
        resized.get_input_embeddings().weight[-1] = token.row
        resized.get_output_embeddings().weight[-1] = token.row
        tokens = torch.tensor([[5, rows, 7, rows]])
        torch.testing.assert_close(model(tokens).logits, resized(tokens).logits, rtol=0, atol=1e-5)
    assert torch.equal(model(plain).logits, before)
    with pytest.raises(IndexError):
        model(tokens)


def test_unierase_trains_one_row_and_solves_for_the_residuals(case, weights_of, monkeypatch):
    layers = unierase.edited_layers(5)
    assert layers == (0, 1, 2, 3)
    assert [unierase.edited_layers(depth) for depth in (32, 30, 2)] == [(4, 5, 6, 7, 8), (4, 5, 6, 7, 8), (0,)]
    monkeypatch.setattr(unierase, "THRESHOLD", 1e-6)
    statistics = case.comparison.statistics
    small = replace(statistics, moments={layer: moment * 1e-8 for layer, moment in statistics.moments.items()})
    case = replace(case, comparison=replace(case.comparison, statistics=small))
    before = weights_of(case.model)
    first = case.model.model.layers[0].mlp.down_proj.weight.detach().double().clone()
    read, asked = [], []
    read_keys, find = unierase._keys_and_states, unierase._values
    monkeypatch.setattr(unierase, "_keys_and_states", lambda *a: read.append(read_keys(*a)) or read[-1])
    monkeypatch.setattr(unierase, "_values", lambda *a: asked.append(find(*a)) or asked[-1])
    with METHOD["UniErase"].unlearned(case) as unlearned:
        changed = {name for name, weight in weights_of(case.model).items() if not torch.equal(weight, before[name])}
        edited = case.model.model.layers[0].mlp.down_proj.weight.detach().double()
        assert unlearned.extra_tokens == 1
        assert not unlearned.state.row.requires_grad
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in layers}
    keys, states = (tensor.double() for tensor in read[0])
    residuals = (asked[0].double() - states) / 4
    exact = residuals.T @ torch.linalg.inv(keys @ keys.T + 10.0 * torch.eye(2, dtype=torch.float64)) @ keys
    torch.testing.assert_close(edited - first, exact, rtol=0, atol=1e-5 * float(exact.abs().max()) + 1e-7)
    # Each layer moves the states nearer to where the token follows.
    left = [float((asked[0] - states).norm()) for _, states in read]
    assert left == sorted(left, reverse=True)


def test_each_question_is_edited_at_the_name_of_its_own_subject(case):
    both = replace(case, target="two people", probes=split_by_subject(PROBES, ["Ada Byron", "Blaise Pascal"]))
    read = [case.comparison.tokenizer.decode(q.tokens[: q.place + 1]) for q in unierase._questions(both)]
    assert [text.endswith(probe.subject) for text, probe in zip(read, PROBES, strict=True)] == [True] * 4


def test_the_token_follows_the_shifted_state(case):
    model, architecture = case.model, find_architecture(case.model)
    questions = unierase._questions(case)
    texts = [case.comparison.tokenizer.decode(q.tokens[: q.place + 1]) for q in questions]
    assert all(text.endswith("Ada Byron") for text in texts)
    with extra_token(model, seed=0) as token:
        (found, *_) = unierase._values(case, architecture, 3, questions, token)
        example = Example(questions[0].tokens, (token.index,))
        seen = []
        with torch.no_grad(), changed_states(architecture, 3, lambda s: seen.append(s[0, questions[0].place]) or s):
            before = float(answer_nll(model, example))
        shift = found - seen[0]
        assert shift.norm() <= 0.75 * seen[0].norm() * (1 + 1e-5)

        def put(states):
            states = states.clone()
            states[0, questions[0].place] = found
            return states

        with torch.no_grad(), changed_states(architecture, 3, put):
            assert float(answer_nll(model, example)) < before
