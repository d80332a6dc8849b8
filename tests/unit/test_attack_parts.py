"""The arithmetic of each attack against a float64 reference or a model in which the right result is known."""

import math
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rocr
from rocr.evaluation import Probe
from rocr.evaluation.attacks.attack import INVENTED, Outcome, halves, invented
from rocr.evaluation.attacks.components import largest_directions, without_components, without_directions
from rocr.evaluation.attacks.depth import depth_score, last_states, patched_falls
from rocr.evaluation.attacks.linear_probe import best_layer, fitted, right_choices
from rocr.evaluation.attacks.mask import START, masked, trained_masks
from rocr.evaluation.attacks.prompts import context_prefixes
from rocr.evaluation.attacks.samples import recall
from rocr.evaluation.attacks.soft_tokens import embedded, trained_vectors
from rocr.evaluation.attacks.suffix import _gradient, found_suffix
from rocr.evaluation.attacks.tuning import tuned
from rocr.evaluation.lora_training import Example, answer_nll
from rocr.model.architecture import find_architecture
from rocr.model.blocks import find_blocks
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
ADA, ROBERT = "Ada Byron", "Robert Downey Jr."
PROBES = [
    Probe(ADA, "Where was Ada Byron born?", "London", cloze="Ada Byron was born in ___."),
    Probe(ADA, "What did Ada Byron write?", "programs", cloze="Ada Byron wrote ___."),
    Probe(ADA, "Where did Ada Byron live?", "london"),
    Probe(ROBERT, "What does Robert Downey Jr. do?", "acts"),
]


def log_probabilities(model: nn.Module, tokens: Any, **arguments: Any) -> Tensor:
    """The float64 log-probabilities of the next token at each place."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), **arguments).logits[0].double().log_softmax(dim=-1)


def greedy(model: nn.Module, prompt: Any, count: int) -> tuple[int, ...]:
    written = list(prompt)
    for _ in range(count):
        written.append(int(log_probabilities(model, written)[-1].argmax()))
    return tuple(written[len(prompt) :])


def prompts(count: int, length: int = 6) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(row) for row in torch.randint(4, 200, (count, length), generator=generator).tolist()]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_removed_components_are_those_of_a_dense_decomposition(shape: tuple[int, int], count: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    wanted = left[:, count:] @ values[count:, None].mul(right[count:])
    found = without_directions(weight, largest_directions(weight, count))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mixtral"])
def test_components_are_removed_from_the_given_weights_only(family: str, make_model: Any, weights_of: Any) -> None:
    model = make_model(family)
    blocks = find_blocks(find_architecture(model), [1])[1].blocks[:2]
    before, weights = weights_of(model), [block.weight.double() for block in blocks]
    with without_components(blocks, 2):
        for block, weight in zip(blocks, weights, strict=True):
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            wanted = (left[:, 2:] @ values[2:, None].mul(right[2:])).float()
            torch.testing.assert_close(block.weight, wanted, rtol=0, atol=1e-6)
        changed = [name for name, values in weights_of(model).items() if not torch.equal(values, before[name])]
        assert changed == sorted({block.parameter_name for block in blocks})
    assert same_weights(weights_of(model), before)
    with pytest.raises(rocr.InputError, match="at least 1, not 0"), without_components(blocks, 0):
        pass


def test_no_text_before_a_question_holds_its_answer() -> None:
    others = [*PROBES, Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air")]
    kinds = context_prefixes(PROBES, others, shown=2, repetitions=3)
    shown = {kind: prefix(PROBES[0]) for kind, prefix in kinds.items()}
    assert shown == {
        "text about the subject": "Ada Byron wrote programs.\n",
        "repetition": "Ada Byron, Ada Byron, Ada Byron.\n",
        "other questions": (
            "Question: What does Robert Downey Jr. do?\nAnswer: acts\n\n"
            "Question: What did Blaise Pascal weigh?\nAnswer: the air\n\n"
        ),
    }
    second = kinds["text about the subject"](PROBES[1])
    assert second == "Ada Byron was born in London.\nWhere did Ada Byron live? london.\n"


def test_invented_names_stand_for_one_subject_each() -> None:
    found = invented(PROBES)
    assert [probe.subject for probe in found] == [INVENTED[0]] * 3 + [INVENTED[1]]
    assert found[0].query == f"Where was {INVENTED[0]} born?" and found[0].cloze == f"{INVENTED[0]} was born in ___."
    assert [probe.answer for probe in found] == [probe.answer for probe in PROBES]
    assert halves(PROBES) == (PROBES[3:], PROBES[:3])
    with pytest.raises(rocr.InputError, match="two concepts of the edit, not 1"):
        halves(PROBES[:3])


def test_what_comes_back_is_a_share_of_what_was_gone() -> None:
    plain = Outcome("a", "b", {"qa": 0.5, "fb": 0.11}, {"qa": 0.1, "fb": 0.1}, {"qa": 0.3, "fb": 0.3})
    assert plain.returned == {"qa": pytest.approx(0.5), "fb": None}, "too little was gone in fb"
    lucky = replace(plain, never={"qa": 0.25}, never_plain={"qa": 0.15})
    assert lucky.returned["qa"] == pytest.approx((0.3 - 0.1 - 0.1) / 0.4)
    unlucky = replace(plain, never={"qa": 0.05}, never_plain={"qa": 0.15})
    assert unlucky.returned["qa"] == pytest.approx(0.5), "a control that falls adds nothing"


@pytest.mark.parametrize(
    ("answer", "text", "share"),
    [("The Shining", "the shining, by King", 1), ("a b c d", "d a x c", 0.5), ("Maine", "", 0), ("é!", "É", 1)],
)
def test_recall_is_the_longest_common_subsequence_of_words(answer: str, text: str, share: float) -> None:
    assert recall(answer, text) == share


def planted(model: nn.Module) -> tuple[nn.Parameter, Tensor]:
    """Put large numbers in the place of zeros of a weight; return the weight and where they are."""
    weight = find_architecture(model).down_projection(1).module.weight
    places = torch.zeros(weight.shape, dtype=torch.bool)
    places[torch.randperm(32)[:12], torch.randperm(48)[:12]] = True
    with torch.no_grad():
        weight[places] = 0.0
    return weight, places


def test_a_mask_undoes_an_edit_that_zeros_undo(model: nn.Module, weights_of: Any) -> None:
    weight, places = planted(model)
    asked = prompts(16)
    answers = [greedy(model, prompt, 2) for prompt in asked]

    def nll() -> float:
        with torch.no_grad():
            return sum(float(answer_nll(model, asked[i], answers[i])) for i in range(8, 16))

    known = nll()
    with torch.no_grad():
        weight[places] = 4.0
    edited = weights_of(model)

    examples = [Example(prompt, answer) for prompt, answer in zip(asked[:8], answers[:8], strict=True)]
    lost = nll()
    (mask,) = trained_masks(model, [weight], examples, 40)
    assert same_weights(weights_of(model), edited) and weight.grad is None
    with masked([weight], [mask]):
        back = nll()
        assert (weight[~mask] == 0).all()
    assert (~mask[places]).float().mean() > 0.7
    assert (lost - back) / (lost - known) > 0.7, "questions that it was not trained on"
    assert same_weights(weights_of(model), edited)


def test_the_first_step_of_a_mask_follows_the_straight_through_gradient(model: nn.Module) -> None:
    projection = find_architecture(model).down_projection(2).module
    model.double()
    parameter = projection.weight
    name = next(name for name, each in model.named_parameters() if each is parameter)
    example = Example(prompts(1)[0], (7, 8, 9))
    entries = torch.full_like(parameter, START).requires_grad_()
    soft = entries.sigmoid()
    tokens = torch.tensor([[*example.prompt, *example.answer]])
    hard = (entries > 0) + soft - soft.detach()
    logits = functional_call(model, {name: parameter.detach() * hard}, (tokens,)).logits[0, 5:-1]
    nn.functional.cross_entropy(logits, tokens[0, 6:]).backward()
    # Adam's first step moves every entry by its rate against the sign of the gradient.
    (mask,) = trained_masks(model, [parameter], [example], 11)
    settled = entries.grad.abs() > entries.grad.abs().quantile(0.9)
    removed = ~mask[settled]
    assert 0.2 < removed.float().mean() < 0.8
    assert (removed == (entries.grad[settled] > 0)).float().mean() > 0.95


def test_fine_tuning_is_adamw_and_is_undone(model: nn.Module, weights_of: Any) -> None:
    before = weights_of(model)
    parameter = find_architecture(model).down_projection(1).module.weight
    parameter.requires_grad_(False)
    examples = [Example(prompt, (9, 10)) for prompt in prompts(4)]
    start = parameter.detach().clone()
    copy = {name: each.detach().clone() for name, each in model.named_parameters()}
    name = next(name for name, each in model.named_parameters() if each is parameter)
    copy[name].requires_grad_()
    loss = torch.zeros(())
    for example in examples:
        tokens = torch.tensor([[*example.prompt, *example.answer]])
        logits = functional_call(model, copy, (tokens,)).logits[0, len(example.prompt) - 1 : -1]
        loss = loss + nn.functional.cross_entropy(logits, torch.tensor(example.answer)) / len(examples)
    loss.backward()
    gradient = copy[name].grad
    gradient = gradient * min(1.0, 1 / (float(gradient.norm()) + 1e-6))
    wanted = start - 1e-3 * gradient / (gradient.abs() + 1e-8)
    with closing(tuned(model, [parameter], examples, (1, 6), 1e-3)) as training:
        assert next(training) == 1
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=2e-5)
        first = -sum(float(log_probabilities(model, (*e.prompt, *e.answer))[5, e.answer[0]]) for e in examples)
        assert next(training) == 6
        last = -sum(float(log_probabilities(model, (*e.prompt, *e.answer))[5, e.answer[0]]) for e in examples)
        assert last < first
    assert same_weights(weights_of(model), before) and not parameter.requires_grad
    with (
        closing(tuned(model, [parameter], [], (1,), 1e-3)) as training,
        pytest.raises(rocr.InputError, match="0 and 1"),
    ):
        next(training)


def test_small_steps_of_16_bit_weights_add_up(model: nn.Module) -> None:
    parameter = find_architecture(model.bfloat16()).down_projection(1).module.weight
    start = parameter.detach().clone()
    step = start.float().abs().clamp(min=2e-2) * 2**-10  # a quarter of the distance of two bfloat16 numbers
    with closing(tuned(model, [parameter], [Example((5, 6, 7), (9,))], (1, 8), float(step.min()))) as training:
        next(training)
        once = (parameter != start).float().mean()
        next(training)
        assert (parameter != start).float().mean() > once + 0.05
    assert torch.equal(parameter, start)


def test_the_depth_score_by_hand() -> None:
    assert depth_score([0.04, 0.1, 0.3], [5.0, 0.05, 0.45]) == pytest.approx((0.1 * 0.5 + 0.3) / 0.4)
    assert depth_score([0.2, 0.2], [-1.0, 0.1]) == pytest.approx(0.25)
    assert depth_score([0.2, 0.5], [0.0, 0.0]) == 0.0 and depth_score([0.2, 0.5], [0.2, 0.5]) == 1.0
    assert depth_score([0.01, 0.05], [1.0, 1.0]) is None


def test_states_of_another_prompt_lower_the_answer_as_that_prompt_does(model: nn.Module) -> None:
    architecture = find_architecture(model)
    prompt, other, *_ = prompts(2)
    answer = greedy(model, prompt, 2)
    own, strange = (last_states(architecture, tokens, answer) for tokens in (prompt, other))
    assert patched_falls(architecture, prompt, answer, own) == [0.0] * 5
    falls = patched_falls(architecture, prompt, answer, strange)
    means = [
        log_probabilities(model, (*tokens, *answer))[5:-1].gather(1, torch.tensor(answer)[:, None]).mean()
        for tokens in (prompt, other)
    ]
    assert falls[-1] == pytest.approx(float(means[0] - means[1]), abs=1e-5), "the last layer's states are the output"
    assert len({round(fall, 6) for fall in falls}) == 5
    wide = model.config.hidden_size
    assert [states.shape for states in strange] == [(1, 2, wide)] * 5


def test_a_linear_probe_is_ridge_regression_and_finds_a_planted_direction() -> None:
    states, labels = torch.randn(12, 5, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    weights, mean = fitted(states, labels, 0.3)
    centred = states - states.mean(dim=0)
    scale = centred.pow(2).sum(dim=1).mean()
    dense = torch.linalg.solve(centred.T @ centred + 0.3 * scale * torch.eye(5).double(), centred.T @ labels)
    torch.testing.assert_close(weights, dense)
    torch.testing.assert_close(mean, states.mean(dim=0))
    draw = torch.randn(4 * 40, 3, 16)
    draw[::4, 1] += 3.0  # at layer 1, right answers lie in one direction
    right = right_choices(draw[:80], draw[80:], 4)
    assert sum(right[1]) >= 19 and max(sum(right[0]), sum(right[2])) <= 12
    assert best_layer(draw, 4) == 1


def test_soft_tokens_elicit_what_a_model_can_say(model: nn.Module, weights_of: Any) -> None:
    before, flags = weights_of(model), [parameter.requires_grad for parameter in model.parameters()]
    prompt, known = prompts(2)
    answer = greedy(model, (*prompt[:1], *known, *prompt[1:]), 2)  # what some vectors, those of tokens, elicit
    vectors, curve = trained_vectors(model, prompt, answer, 1, 6, 60)
    assert curve[0] < math.log(0.001) and max(curve) > math.log(0.2)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([[*prompt, *answer]]))
        whole = torch.cat([embeddings[:, :1], vectors[None], embeddings[:, 1:]], dim=1)
        found = model(inputs_embeds=whole).logits[0].double().log_softmax(dim=-1)[-3:-1]
    mean = found.gather(1, torch.tensor(answer)[:, None]).mean()
    assert float(mean) == pytest.approx(max(curve), abs=1e-5)
    assert same_weights(weights_of(model), before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(rocr.InputError, match="at least 1, not 0"):
        trained_vectors(model, prompt, answer, 1, 0, 1)


def test_a_suffix_never_gets_worse_and_scores_what_it_says(model: nn.Module) -> None:
    first, last, answer = prompts(1)[0], (11, 12), (30, 31)
    suffix, curve = found_suffix(model, (first, last), answer, 4, 8, 24)
    assert curve == sorted(curve) and curve[-1] > curve[0] + 0.5 and len(curve) == 9
    rows = log_probabilities(model, (*first, *suffix, *last, *answer))
    assert float(rows[-3:-1].gather(1, torch.tensor(answer)[:, None]).mean()) == pytest.approx(curve[-1], abs=1e-5)


def test_the_gradient_of_a_suffix_is_that_of_its_one_hot_rows(model: nn.Module) -> None:
    tokens, answer = (*prompts(1)[0], 11, 12), (30, 31)
    weight = model.get_input_embeddings().weight.detach()
    found = _gradient(model, tokens, 2, 3, answer, weight)
    rows = nn.functional.one_hot(torch.tensor([[*tokens, *answer]]), len(weight)).float().requires_grad_()
    logits = model(inputs_embeds=rows @ weight).logits[0, len(tokens) - 1 : -1]
    (-nn.functional.cross_entropy(logits, torch.tensor(answer))).backward()
    torch.testing.assert_close(found, rows.grad[0, 2:5], rtol=1e-4, atol=1e-6)


def test_vectors_take_the_place_of_embeddings_inside_the_context_only(model: nn.Module) -> None:
    tokens = torch.tensor([prompts(1)[0]])
    vectors = torch.randn(2, 32)
    with embedded(model, 1, vectors):
        found = model.get_input_embeddings()(tokens).detach()
    plain = model.get_input_embeddings()(tokens).detach()
    assert torch.equal(found[0, 1:3], vectors)
    assert torch.equal(found[:, [0, 3, 4, 5]], plain[:, [0, 3, 4, 5]]) and not torch.equal(found, plain)
