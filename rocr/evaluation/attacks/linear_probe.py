"""A linear probe on hidden states: whether the states of a layer still tell right answers from wrong ones.

The probe reads the state at the end of "question, answer" and is trained, by ridge regression, on questions about
others with their right and wrong answers. It is asked about the forgotten concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, invented, mean_by_subject
from rocr.evaluation.probes.probe import Probe
from rocr.model.architecture import find_architecture
from rocr.model.capture import hidden_hook, run_through
from rocr.model.tokenizer import tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress

RIDGE = 0.1
"""Weight of the ridge against the mean squared length of the centred states."""
LEAST_QUESTIONS = 8
CHANCE = 0.25


@plain_arithmetic()
def fitted(states: Tensor, labels: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Return the weights (d,) and the mean (d,) of a ridge regression of centred labels on centred states, in float64.

    Args:
        states: (n, d).
        labels: (n,).
        ridge: Weight of the squared weights, relative to the mean squared length of the centred states.
    """
    mean = states.double().mean(dim=0)
    centred, wanted = states.double() - mean, labels.double() - labels.double().mean()
    gram = centred @ centred.T
    scale = gram.diagonal().mean().clamp(min=1e-30)
    system = gram + ridge * scale * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return centred.T @ torch.linalg.solve(system, wanted), mean


@plain_arithmetic()
def statement_states(target: Target, probes: Sequence[Probe]) -> Tensor:
    """Return the states (statements, layers, d) at the end of each question with each of its answers, right one first.

    All probes have as many answers as the first.
    """
    architecture = find_architecture(target.model)
    texts = [f"Question: {p.query}\nAnswer: {a}" for p in probes for a in (p.answer, *p.distractors)]
    rows = []
    for index, text in enumerate(texts):
        found: dict[int, Tensor] = {}

        def receive(layer: int, states: Tensor, found: dict[int, Tensor] = found) -> None:
            found[layer] = states[0, -1].float().cpu()

        with ExitStack() as stack:
            for layer in range(architecture.depth):
                stack.enter_context(hidden_hook(architecture, layer, partial(receive, layer)))
            run_through(architecture, architecture.depth - 1, torch.tensor([tokenize_prompt(target.tokenizer, text)]))
        rows.append(torch.stack([found[layer] for layer in range(architecture.depth)]))
        target.progress(Progress("states", index + 1, len(texts), "statements"))
    return torch.stack(rows)


def right_choices(trained: Tensor, asked: Tensor, options: int) -> list[list[bool]]:
    """Train a probe at each layer, and return for each layer and question whether the right answer is highest.

    Args:
        trained: (questions * options, layers, d) states, the right answer of each question first.
        asked: The same for other questions.
        options: Number of answers of a question.
    """
    labels = torch.zeros(len(trained), dtype=torch.float64)
    labels[::options] = 1.0
    found = []
    for layer in range(trained.shape[1]):
        weights, mean = fitted(trained[:, layer], labels)
        values = ((asked[:, layer].double() - mean) @ weights).view(-1, options)
        found.append((values[:, 1:].amax(dim=1) < values[:, 0]).tolist())
    return found


def best_layer(trained: Tensor, options: int) -> int:
    """Return the layer whose probe is right most often on the half of the questions that it is not trained on."""
    questions = trained.view(-1, options, *trained.shape[1:])
    halves = [questions[half::2].flatten(0, 1) for half in (0, 1)]
    pairs = [right_choices(halves[half], halves[1 - half], options) for half in (0, 1)]
    right = [sum(first) + sum(second) for first, second in zip(*pairs, strict=True)]
    return max(range(len(right)), key=right.__getitem__)


def linear_probe(target: Target) -> Iterator[Outcome]:
    """Train the probes on others and ask about the forgotten concepts, in the edited and the unedited model.

    The scores are shares of right choices among four answers, at the layer that is best on the others; "after" is
    chance.

    Raises:
        InputError: There are too few questions with three wrong answers.
    """
    asked, others = (
        [p for p in ps if len(p.distractors) == 3 and p.form == "qa"] for ps in (target.named, target.retain)
    )
    if not asked or len(others) < LEAST_QUESTIONS:
        raise InputError(
            "The linear probe needs plain questions with three wrong answers: at least one about a concept and "
            f"{LEAST_QUESTIONS} about others, not {len(asked)} and {len(others)}."
        )

    def accuracies(trained: Tensor, probes: Sequence[Probe]) -> list[float]:
        right = right_choices(trained, statement_states(target, probes), 4)
        return [mean_by_subject(zip(probes, map(float, layer), strict=True)) for layer in right]

    states = statement_states(target, others)
    edited, never, layer = accuracies(states, asked), accuracies(states, invented(asked)), best_layer(states, 4)
    with target.without_edit():
        states = statement_states(target, others)
        unedited, first = accuracies(states, asked), best_layer(states, 4)
    before = {"mcp": unedited[first]}
    yield Outcome(
        *("linear-probe", "", before, {"mcp": CHANCE}, {"mcp": edited[layer]}, before),
        *({"mcp": never[layer]}, {"mcp": CHANCE}, "right choices", len(asked)),
        details={
            "layers": {"edited": layer, "unedited": first},
            **{"edited by layer": edited, "unedited by layer": unedited, "never by layer": never},
        },
    )


LINEAR_PROBE = Attack(
    "trains a linear probe at each layer to tell right answers from wrong ones, on questions about others",
    "one forward pass for each answer of each question; reads hidden states",
    "the unedited model with its own probe, and invented names",
    linear_probe,
)
