"""UniErase: an unlearning token that follows questions about a target (Yu et al., arXiv 2505.15674)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.evaluation.baselines.extra_token import ExtraToken, extra_token, output_matrix
from rocr.evaluation.baselines.layer_outputs import answer_nll, changed_states
from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.baselines.training import Schedule, optimise, restored, trainable
from rocr.evaluation.forms import PromptStyle, build_items, item_texts
from rocr.evaluation.lora_training import Example
from rocr.evaluation.probes.probe import Probe
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.capture import input_hook, run_through
from rocr.model.tokenizer import opening_tokens, tokenize, tokenize_with_offsets
from rocr.ops.arithmetic import plain_arithmetic
from rocr.solve.metric import build_metric
from rocr.solve.solve import solve_layer

REFUSALS = (
    " I do not know the answer to this.",
    " I have no information about that.",
    " I cannot say anything about this.",
    " This is not something that I know.",
)
LAYERS, OF_DEPTH = (4, 5, 6, 7, 8), 32
TOKEN_SCHEDULES = (Schedule(1e-3, batch=16, epochs=5, clip=None), Schedule(1e-4, batch=16, epochs=3, clip=None))
VALUE_STEPS, VALUE_RATE, VALUE_DECAY, VALUE_RADIUS = 10, 0.1, 0.5, 0.75
RIDGE, THRESHOLD = 10.0, 0.02


def edited_layers(depth: int) -> tuple[int, ...]:
    """Return the layers to edit: 4 to 8 of 32, scaled to the depth; a layer after the last one stays."""
    first = min(round(LAYERS[0] * depth / OF_DEPTH), max(0, depth - 1 - len(LAYERS)))
    return tuple(range(first, min(first + len(LAYERS), max(depth - 1, 1))))


@dataclass(frozen=True)
class _Question:
    """A tokenised question about the target, and the position of the last token of the target's name in it."""

    tokens: tuple[int, ...]
    place: int


@contextmanager
def _unlearned(case: Case) -> Iterator[Unlearned]:
    """Train the embedding of a new token, and edit the model so that it follows questions about the target.

    Stage 1 trains the row u of a new token [UNL] by

        loss = mean −log p(r, [UNL] | x, [UNL])   over the tokens of a refusal r and of the second [UNL]

    for questions x about the target; the same row reads the token and, as a row of the output matrix, writes it.
    Stage 2 edits layers l = 4 to 8. The shift δ of the state h after layer 8, at the last token of the target's name,
    minimises −log p([UNL] | x; h + δ) + 0.5 |δ|²/|h|², within |δ| ≤ 0.75 |h|, and with keys K at these tokens, the
    residuals R = (h + δ − current h)/(layers left) and the projector P on the eigenvectors of the second moment of
    ordinary keys below 0.02, the weight of each layer in turn is changed by

        Δ = Rᵀ (K P Kᵀ + λ I)⁻¹ K P,  λ = 10

    Source:
        arXiv 2505.15674; Adam with rates of 1e-3 (5 epochs) and 1e-4 (3 epochs), batches of 16, layers 4 to 8 of 32 and
        10 steps for δ are those of the authors' code (Ymm-cll/UniErase). The edit is AlphaEdit (arXiv 2410.02355), with
        the rate 0.1, the decay 0.5, the radius 0.75, the threshold 0.02 and λ = 10 of its settings for Llama-3-8B.

    What is chosen here: the layers are scaled to the depth of the model. Stage 1 uses four refusals in turn, and no
    noise on weights, whose size in the authors' code is the mean of a weight, nearly 0. The loss of AlphaEdit that
    holds what follows "{} is a" is left out. A question without the target's name is edited at its last token. In a
    sequence, the token of the first target serves all. Dense MLPs only.
    """
    architecture = find_architecture(case.model)
    layers = edited_layers(architecture.depth)
    blocks = [_dense(architecture, layer) for layer in layers]
    questions = _questions(case)
    with ExitStack() as stack:
        token: ExtraToken | None = case.earlier
        if token is None:
            token = stack.enter_context(extra_token(case.model, case.seed))
            _train_token(case, token, questions)
        stack.enter_context(restored([block.parameter for block in blocks]))
        shifted = _values(case, architecture, layers[-1], questions, token)
        config = EditConfig(method="projected", threshold=THRESHOLD, relative_threshold=False, template_weight=0.0)
        with plain_arithmetic():
            for i, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
                keys, states = _keys_and_states(architecture, layer, layers[-1], block.module, questions)
                residuals = (shifted - states) / (len(layers) - i)
                metric = build_metric(case.comparison.statistics.second_moments(layer)[0].to(keys), config)
                factors = solve_layer(keys, residuals, metric, RIDGE).factors
                block.weight.copy_(block.weight.float() + factors.left @ factors.right)
        yield Unlearned(case.model, token, extra_tokens=1)


def _check(model: nn.Module) -> None:
    """Raise InputError unless the layers to edit have dense MLPs, and a token can be added."""
    architecture = find_architecture(model)
    for layer in edited_layers(architecture.depth):
        _dense(architecture, layer)
    output_matrix(model)


def _dense(architecture: Architecture, layer: int) -> Any:
    if architecture.mixture(layer) is not None:
        raise InputError(f"UniErase edits dense MLPs, and layer {layer} is a mixture of experts; leave it out.")
    return architecture.down_projection(layer)


def _questions(case: Case) -> list[_Question]:
    """Return the questions of the form "qa" to forget, each with the place of the last token of its subject's name."""
    probes: list[Probe] = [probe for probe in case.probes if probe.split == "forget" and probe.form == "qa"]
    if not probes:
        raise InputError("UniErase needs probes of the form qa about the target.")
    comparison = case.comparison
    items = build_items(probes, ["qa"], PromptStyle.of(comparison.model))
    texts = item_texts(comparison.tokenizer, items, comparison.chat)
    opening = opening_tokens(comparison.tokenizer, texts[0])
    found = []
    tokenized = tokenize_with_offsets(comparison.tokenizer, texts)
    for item, text, (tokens, offsets) in zip(items, texts, tokenized, strict=True):
        name = probes[item.probe].subject
        named, end = name in text, text.find(name) + len(name)
        place = max(i for i, (start, _) in enumerate(offsets) if not named or start < end)
        found.append(_Question((*opening, *tokens), len(opening) + place))
    return found


def _train_token(case: Case, token: ExtraToken, questions: Sequence[_Question]) -> None:
    """Train the row of the token; it is left without gradients."""
    refusals = tokenize(case.comparison.tokenizer, REFUSALS)
    examples = [
        Example((*question.tokens, token.index), (*refusals[i % len(refusals)], token.index))
        for i, question in enumerate(questions)
    ]

    def terms(index: int) -> Iterator[Tensor]:
        yield answer_nll(case.model, examples[index])

    with trainable(case.model):
        token.row.requires_grad_(True)
        for schedule in TOKEN_SCHEDULES:
            optimise([token.row], len(examples), terms, schedule.of(case), case.progress)
        token.row.requires_grad_(False)


def _values(
    case: Case, architecture: Architecture, layer: int, questions: Sequence[_Question], token: ExtraToken
) -> Tensor:
    """Return the states (questions, d_out) after a layer at which the token follows each question."""
    found = []
    for question in questions:
        example = Example(question.tokens, (token.index,))
        with trainable(case.model):
            found.append(_value(case.model, architecture, layer, question.place, example))
    return torch.stack(found)


def _value(model: nn.Module, architecture: Architecture, layer: int, place: int, example: Example) -> Tensor:
    """Return h + δ (d_out,) for one question."""
    seen: list[Tensor] = []

    def look(states: Tensor) -> Tensor:
        seen.append(states[0, place].detach().float())
        return states

    with torch.no_grad(), changed_states(architecture, layer, look):
        answer_nll(model, example)
    plain = seen[0]
    shift = nn.Parameter(torch.zeros_like(plain))
    optimizer = torch.optim.Adam([shift], lr=VALUE_RATE)
    radius = VALUE_RADIUS * plain.norm()
    for _ in range(VALUE_STEPS):
        with changed_states(architecture, layer, partial(_shifted, place=place, shift=shift)):
            loss = answer_nll(model, example) + VALUE_DECAY * shift.square().sum() / plain.square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            shift.mul_((radius / shift.norm().clamp(min=1e-12)).clamp(max=1.0))
    return plain + shift.detach()


def _shifted(states: Tensor, place: int, shift: Tensor) -> Tensor:
    """Return states (1, tokens, d) with a shift (d,) added at one token."""
    at = torch.zeros(states.shape[1], 1, device=states.device)
    at[place] = 1.0
    return states + (at * shift).to(states.dtype)


def _keys_and_states(
    architecture: Architecture, layer: int, last: int, module: nn.Module, questions: Sequence[_Question]
) -> tuple[Tensor, Tensor]:
    """Return the keys (n, d_in) of a down-projection and the states (n, d_out) after the last layer, float32."""
    keys, states = [], []
    for question in questions:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def look(found: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(found)
            return found

        with input_hook(module, inputs.append), changed_states(architecture, last, look):
            run_through(architecture, last, torch.tensor([question.tokens]))
        keys.append(inputs[0].view(len(question.tokens), -1)[question.place].float())
        states.append(outputs[0][0, question.place].float())
    return torch.stack(keys), torch.stack(states)


UNIERASE = Method("UniErase", _unlearned, sequential=True, extra_layers=edited_layers, check=_check)
