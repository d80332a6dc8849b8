import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rocr
from rocr.evaluation.forms import Item, item_texts
from rocr.evaluation.scoring import (
    AnswerScore,
    Question,
    extraction_strength,
    score_answers,
    tokenize_questions,
)

ROUNDING = 2e-5
"""Batched against unbatched in float32; measured: 1.1e-6 for the tiny Llama."""


def alone(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[float, float]:
    """Mean NLL and accuracy from one forward pass in float64 arithmetic, token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    losses, hits = [], []
    for i, token in enumerate(answer):
        row = logits[len(prompt) + i - 1]
        losses.append(math.log(float(row.exp().sum())) - float(row[token]))
        hits.append(int(row.argmax()) == token)
    return sum(losses) / len(losses), sum(hits) / len(hits)


def scored(model: nn.Module, questions: list[Question], budget: int) -> list[list[AnswerScore]]:
    found: dict[int, list[AnswerScore]] = {}
    score_answers(model, questions, found.__setitem__, budget)
    return [found[i] for i in range(len(questions))]


def some_questions(size: int) -> list[Question]:
    generator = torch.Generator().manual_seed(1)
    start = tuple(torch.randint(2, size, (20,), generator=generator).tolist())
    draw = lambda n: tuple(torch.randint(2, size, (n,), generator=generator).tolist())  # noqa: E731
    shapes = ((1, (1,)), (63, (5, 1, 1)), (5, (4, 4, 1)), (5, (1, 1, 1, 1)), (30, (17,)), (2, (3, 2)), (123, (2,)))
    return [Question(start + draw(n), tuple(map(draw, answers))) for n, answers in shapes]


@pytest.mark.parametrize("family_name", ["Llama", "Gemma2", "GPT-2"])
@pytest.mark.parametrize("budget", [1, 150, 4096])
def test_every_answer_scores_as_it_does_alone(
    family_name: str, budget: int, make_model: Callable[..., nn.Module], tokenizer: Any, one_thread: None
) -> None:
    longer = {"n_positions": 256} if family_name == "GPT-2" else {"max_position_embeddings": 256}
    model = make_model(family_name, **longer)
    questions = some_questions(len(tokenizer))
    for question, scores in zip(questions, scored(model, questions, budget), strict=True):
        assert len(scores) == len(question.answers)
        for answer, score in zip(question.answers, scores, strict=True):
            nll, accuracy = alone(model, question.prompt, answer)
            assert score.nll == pytest.approx(nll, abs=ROUNDING * max(1, nll))
            assert score.accuracy == accuracy


@pytest.mark.parametrize("family_name", ["Llama", "GPT-2", "Mistral", "Gemma3", "Phi3"])
def test_a_window_that_the_prompt_is_longer_than(
    family_name: str, make_model: Callable[..., nn.Module], tokenizer: Any, one_thread: None
) -> None:
    """Llama and GPT-2 ignore the setting; in the others, attention slides."""
    longer = {"n_positions": 256} if family_name == "GPT-2" else {"max_position_embeddings": 256}
    model = make_model(family_name, sliding_window=8, **longer)
    questions = some_questions(len(tokenizer))
    for question, scores in zip(questions, scored(model, questions, 4096), strict=True):
        for answer, score in zip(question.answers, scores, strict=True):
            assert score.nll == pytest.approx(
                alone(model, question.prompt, answer)[0], abs=ROUNDING * max(1, score.nll)
            )


def test_answers_of_one_token_share_one_run_of_the_prompt(model: nn.Module, tokenizer: Any) -> None:
    sizes = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, i, _o: sizes.append(tuple(i[0].shape)))  # type: ignore[operator]
    scored(model, [Question((5, 6, 7, 8), ((9,), (10,), (11,), (12,)))], 4096)
    assert sizes == [(1, 4)]
    sizes.clear()
    prompt = tuple(range(5, 35))
    scored(model, [Question(prompt, ((9, 8, 7), (10, 11), (12, 13, 14)))], 4096)
    assert sizes == [(1, 29), (3, 3)], "all but the prompt's last token runs once for three answers"
    handle.remove()


def test_the_training_mode_is_left_as_it_was(model: nn.Module) -> None:
    model.train()
    scored(model, [Question((5, 6), ((7,),))], 64)
    assert model.training


def test_a_score_that_is_not_a_number_is_an_error(model: nn.Module) -> None:
    with torch.no_grad():
        next(iter(model.parameters()))[7] = float("nan")
    scored(model, [Question((5, 6), ((8,),))], 64)
    with pytest.raises(rocr.RocrError, match="not a finite number"):
        scored(model, [Question((5, 7), ((8,),))], 64)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_no_prompt_begins_with_two_starts(make_tokenizer: Callable[..., Any], start: bool, written: bool) -> None:
    template = "{% if true %}" + ("{{ bos_token }}" if written else "") + "{{ messages[0]['content'] }}{% endif %}"
    tokenizer = make_tokenizer(start=start, chat=template)
    item = Item(0, "qa", "Who is Ada Byron?", (" a countess",))
    question = tokenize_questions(tokenizer, item_texts(tokenizer, [item]), [item.answers])[0]
    begin = tokenizer.bos_token_id
    assert question.prompt.count(begin) == int(start or written)
    assert begin not in question.answers[0] and tokenizer.decode(question.answers[0]) == " a countess"


def test_an_answer_without_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(rocr.InputError, match="gives no token"):
        tokenize_questions(tokenizer, ["a"], [("",)])


@pytest.mark.parametrize(
    ("right", "strength"),
    [([0], 0), ([1], 1), ([0, 0, 0], 0), ([1, 1, 0], 0), ([0, 1], 0.5), ([1, 0, 1, 1], 0.5), ([1, 1], 1)],
)
def test_extraction_strength_is_the_share_that_follows_by_itself(right: list[int], strength: float) -> None:
    assert extraction_strength([bool(ok) for ok in right]) == strength


@pytest.mark.parametrize("answer", [(9_999,), (5, 9_999), (9_999, 5)])
def test_a_token_that_the_model_does_not_know_is_a_sentence(model: nn.Module, answer: tuple[int, ...]) -> None:
    with pytest.raises(rocr.InputError, match=r"9,999, but the model has|LlamaForCausalLM failed: IndexError"):
        score_answers(model, [Question((3, 4), (answer,))], lambda _, __: None)


def test_a_model_without_logits_is_a_sentence(model: nn.Module) -> None:
    class Bare(nn.Module):
        def forward(self, **inputs: Any) -> tuple[torch.Tensor]:
            return (torch.zeros(1, 1),)

    bare = Bare()
    bare.get_input_embeddings = model.get_input_embeddings  # type: ignore[operator]
    with pytest.raises(rocr.InputError, match="search for logits in a model's output failed: TypeError"):
        score_answers(bare, [Question((3, 4), ((5,),))], lambda _, __: None)
