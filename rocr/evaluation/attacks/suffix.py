"""A suffix after the question, found by greedy coordinate gradient (arXiv 2307.15043) within bounded steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Scores, Target, invented, mean_by_subject
from rocr.evaluation.attacks.restoring import trainable
from rocr.evaluation.attacks.soft_tokens import embedded
from rocr.evaluation.forms import Item, build_items, item_texts
from rocr.evaluation.lora_training import answer_nll
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scoring import tokenize_questions
from rocr.io.boundary import calling
from rocr.keys.continuations import log_probabilities
from rocr.model.forward import input_embedding
from rocr.model.hooks import evaluating
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress

TOP = 64
"""Tokens of each place from which replacements are drawn: those that the gradient holds best."""


@plain_arithmetic()
def found_suffix(
    model: nn.Module,
    prompt: tuple[Sequence[int], Sequence[int]],
    answer: Sequence[int],
    count: int,
    steps: int,
    candidates: int,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    """Search tokens between the two parts of a prompt so that the answer becomes likely.

    Each step draws replacements of one token among those with the best gradients, and takes the best of them if it is
    better than the suffix so far.

    Args:
        model: Causal language model of transformers; it does not change.
        prompt: Token ids before and after the suffix.
        answer: Token ids.
        count: Number of tokens of the suffix. It starts as random tokens.
        steps: Number of steps.
        candidates: Replacements that are tried in each step.
        seed: Seed of all draws.

    Returns:
        The suffix, and the mean log-probability of the answer with the suffix before each step and after the last.

    Raises:
        InputError: `count` or `candidates` is not at least 1, or the model was loaded in inference mode or fails.
    """
    if count < 1 or candidates < 1:
        raise InputError(f"A suffix needs at least 1 token and 1 candidate, not {count} and {candidates}.")
    weight = input_embedding(model).weight.detach()
    draw = torch.Generator().manual_seed(seed)
    suffix = torch.randint(len(weight), (count,), generator=draw).tolist()
    first, last = prompt

    def scores(rows: Sequence[Sequence[int]]) -> list[float]:
        texts = [(*first, *row, *last) for row in rows]
        found = log_probabilities(model, texts, [tuple(answer)] * len(rows))
        wanted = torch.tensor(answer)
        return [float(each[torch.arange(len(answer)), wanted.to(each.device)].mean()) for each in found]

    curve = scores([suffix])
    for _ in range(steps):
        best = _gradient(model, (*first, *suffix, *last), len(first), count, answer, weight).topk(TOP).indices
        rows = []
        for _ in range(candidates):
            place = int(torch.randint(count, (1,), generator=draw))
            token = int(best[place, int(torch.randint(best.shape[1], (1,), generator=draw))])
            rows.append([*suffix[:place], token, *suffix[place + 1 :]])
        values = scores(rows)
        top = max(range(candidates), key=values.__getitem__)
        if values[top] > curve[-1]:
            suffix = rows[top]
        curve.append(max(values[top], curve[-1]))
    return suffix, curve


def _gradient(
    model: nn.Module, tokens: Sequence[int], start: int, count: int, answer: Sequence[int], weight: Tensor
) -> Tensor:
    """Return how much each token in each place would raise the log-probability of an answer, to first order.

    Returns:
        (count, vocabulary), float32.
    """
    places = torch.tensor(list(tokens[start : start + count]), device=weight.device)
    vectors = weight[places].float().clone().requires_grad_()
    with trainable(model), evaluating(model), torch.enable_grad():
        with embedded(model, start, vectors):
            loss = answer_nll(model, tokens, answer) / len(answer)
        with calling("The model's backward pass"):
            loss.backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    return -vectors.grad @ weight.float().T


def suffix(target: Target) -> Iterator[Outcome]:
    """Search a suffix for each question by itself; the controls get suffixes of their own."""
    limits, probes = target.limits, target.few(target.named)

    def elicit(asked: Sequence[Probe]) -> tuple[Scores, Scores]:
        items = build_items(asked, ["qa"], target.style)
        texts = item_texts(target.tokenizer, items, limits.evaluate.chat)
        plain, found = [], []
        for index, (item, text) in enumerate(zip(items, texts, strict=True)):
            cut = _end_of_message(text, item)
            (start,) = tokenize_questions(target.tokenizer, [text[:cut]], [(item.answers[0],)])
            (end,) = tokenize_questions(target.tokenizer, [text[:cut]], [(text[cut:],)])
            answer, probe = start.answers[0], asked[item.probe]
            given = (limits.suffix_tokens, limits.suffix_steps, limits.suffix_candidates, limits.seed)
            _, curve = found_suffix(target.model, (start.prompt, end.answers[0]), answer, *given)
            rows = log_probabilities(target.model, [(*start.prompt, *end.answers[0])], [answer])[0]
            alone = float(rows[torch.arange(len(answer)), torch.tensor(answer).to(rows.device)].mean())
            plain.append((probe, torch.tensor(alone).exp().item()))
            found.append((probe, torch.tensor(max(curve[-1], alone)).exp().item()))
            target.progress(Progress("suffix", index + 1, len(items), "questions"))
        return {"qa": mean_by_subject(plain)}, {"qa": mean_by_subject(found)}

    after, attacked = elicit(probes)
    never_plain, luck = elicit(invented(probes))
    with target.without_edit():
        before, control = elicit(probes)
    name = f"{limits.suffix_tokens} tokens, {limits.suffix_steps} steps"
    yield Outcome("suffix", name, before, after, attacked, control, luck, never_plain, questions=len(probes))


def _end_of_message(text: str, item: Item) -> int:
    """Return where the user's message ends in a rendered prompt; where the reply begins if a template rewrites it."""
    message = item.message.rstrip()
    found = text.rfind(message)
    return found + len(message) if found >= 0 else len(text) - len(item.suffix)


SUFFIX = Attack(
    "searches tokens after each question so that the right answer becomes likely",
    "a gradient and a batch of candidates in each step of each question; the attacker knows the answer",
    "invented names with suffixes of their own, and the unedited model",
    suffix,
)
