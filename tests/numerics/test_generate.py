"""Answers of several prompts: what they begin with runs once, and each is what the model writes after it alone."""

import pytest
import torch

from rocr.keys.continuations import log_probabilities
from rocr.model.generate import continue_greedily
from rocr.model.prefix_cache import MIN_SHARED_TOKENS, may_pad_after_prefix
from tests.support.models import FAMILIES, MIXTURES

pytestmark = pytest.mark.usefixtures("one_thread")
OPENING = [5, 6, 7, 8, 9, 10, 11, 12, 13]
PROMPTS = [[*OPENING, 20], [*OPENING, 21, 22, 23, 24], [*OPENING, 21, 25]]
STEPS = 6
ROUNDING = 1e-4


def by_hand(model, prompt, steps=STEPS):
    """The most likely tokens after a prompt and their log-probabilities, each from a pass over the whole text."""
    written, values = [], []
    for _ in range(steps):
        with torch.no_grad():
            logs = model(torch.tensor([[*prompt, *written]])).logits[0, -1].log_softmax(dim=-1)
        written.append(int(logs.argmax()))
        values.append(float(logs.max()))
    return written, values


def prompt_tokens(model, prompts):
    """What is written after the prompts, and how many tokens run before the second one is written."""
    counts = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, inputs, _o: counts.append(inputs[0].numel()))
    found = continue_greedily(model, None, prompts, STEPS)
    hook.remove()
    return found, sum(counts) - (STEPS - 1) * len(prompts)


@pytest.fixture
def without_end(make_model):
    """Make a model whose text does not end, with likely tokens."""

    def made(family, **sizes):
        model = make_model(family, **sizes)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)
        model.generation_config.eos_token_id = [0]
        return model

    return made


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
def test_prompts_with_a_common_opening_are_continued_as_each_alone(name, without_end):
    model = without_end(name)
    found, run = prompt_tokens(model, PROMPTS)
    longest = max(map(len, PROMPTS))
    assert run == len(OPENING) + len(PROMPTS) * (longest - len(OPENING))
    for prompt, written in zip(PROMPTS, found, strict=True):
        tokens, values = by_hand(model, prompt)
        assert written.tokens == tokens
        assert written.log_probabilities == pytest.approx(values, abs=ROUNDING)


def test_attention_that_does_not_reach_back_over_padding_shares_nothing(without_end):
    model = without_end("Mistral", sliding_window=12)
    assert may_pad_after_prefix(model, 12) and not may_pad_after_prefix(model, 13)
    found, run = prompt_tokens(model, PROMPTS)
    assert run == len(PROMPTS) * max(map(len, PROMPTS))
    for prompt, written in zip(PROMPTS, found, strict=True):
        assert written.tokens == by_hand(model, prompt)[0]


def test_a_short_opening_is_not_run_alone(without_end):
    model = without_end("Llama")
    for length, shares in ((MIN_SHARED_TOKENS, True), (MIN_SHARED_TOKENS - 1, False)):
        prompts = [[*OPENING[:length], 20], [*OPENING[:length], 21]]
        _, run = prompt_tokens(model, prompts)
        assert run == (length + 2 if shares else 2 * (length + 1))


def test_an_answer_ends_with_its_end_token(without_end):
    model = without_end("Llama")
    alone, others = by_hand(model, PROMPTS[0]), by_hand(model, PROMPTS[1])
    end = next(token for token in alone[0] if token not in others[0])
    length = alone[0].index(end) + 1
    model.generation_config.eos_token_id = [0, end]
    ended, whole = continue_greedily(model, None, PROMPTS[:2], STEPS)
    assert (ended.tokens, len(whole.tokens)) == (alone[0][:length], STEPS)
    assert ended.log_probabilities == pytest.approx(alone[1][:length], abs=ROUNDING)
    (single,) = continue_greedily(model, None, PROMPTS[:1], STEPS)
    assert single.tokens == ended.tokens


def test_log_probabilities_are_those_of_each_prompt_alone(without_end):
    model = without_end("Llama")
    prompts, answers = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [[3, 4], [5, 6, 7], []]
    found = log_probabilities(model, prompts, answers)
    for prompt, answer, rows in zip(prompts, answers, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(rows, logits.log_softmax(dim=-1), rtol=1e-4, atol=1e-4)
