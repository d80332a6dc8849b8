"""Subjects that a model holds to be alike: the hardest ones to keep when one of them is to be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rocr.concepts import check_names, folded
from rocr.config import DEFAULT, ChatSettings, EditConfig
from rocr.errors import InputError
from rocr.evaluation.probes.probe import Probe, split_by_subject
from rocr.keys.plan import Reading
from rocr.keys.prompts import Prompt, build_prompts, render_template
from rocr.keys.read import read_states
from rocr.model.architecture import default_layers, find_architecture, positions_of


def nearest_subjects(
    model: nn.Module,
    tokenizer: Any,
    target: str,
    others: Sequence[str],
    count: int = 10,
    chat: ChatSettings = DEFAULT,
) -> list[tuple[str, float]]:
    """The subjects nearest to a target, with the cosine of the angle to it, the nearest first.

    A subject is the hidden state at the last token of its name after the layers that are edited by default,
    averaged over the default templates, less the mean over all subjects.

    Raises:
        InputError: there are fewer than two other subjects, or one is no name as a list of concepts may have it.
    """
    others = list({folded(name): name for name in others if folded(name) != folded(target)}.values())
    check_names("subject", [target, *others])
    if len(others) < 2:
        raise InputError(f"{len(others)} other subjects are too few to find the nearest to {target!r}.")
    states = name_states(model, tokenizer, [target, *others], chat)
    centred = nn.functional.normalize(states - states.mean(dim=0), dim=1)
    cosines = centred[1:] @ centred[0]
    best = torch.topk(cosines, min(count, len(others)))
    return [(others[int(i)], float(value)) for value, i in zip(best.values, best.indices, strict=True)]


def keep_nearest(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    targets: Sequence[str],
    count: int = 10,
    chat: ChatSettings = DEFAULT,
) -> list[Probe]:
    """Probes split by target, with only the `count` subjects nearest to each target to be kept: the hardest ones.

    Raises:
        InputError: no probe is about a target, or there are fewer than two other subjects.
    """
    probes = split_by_subject(probes, targets)
    others = list({folded(probe.subject): probe.subject for probe in probes if probe.split == "retain"}.values())
    kept = {
        folded(name)
        for target in targets
        for name, _ in nearest_subjects(model, tokenizer, target, others, count, chat)
    }
    return [probe for probe in probes if probe.split == "forget" or folded(probe.subject) in kept]


def name_states(model: nn.Module, tokenizer: Any, names: Sequence[str], chat: ChatSettings = DEFAULT) -> Tensor:
    """Hidden states (names, d_out) float32 at the last token of names, averaged over the default templates.

    Raises:
        InputError: tokenizer or chat template fail, or a name is longer than the model's positions.
    """
    architecture = find_architecture(model)
    prompts: list[Prompt] = []
    prompt_of: list[int] = []
    position_of: list[int] = []
    group_of: list[int] = []
    for template in EditConfig().templates:
        rendered = render_template(tokenizer, template, chat)
        for group, prompt in enumerate(build_prompts(tokenizer, rendered, names)):
            if prompt.name:
                prompt_of.append(len(prompts))
                position_of.append(prompt.name[-1])
                group_of.append(group)
                prompts.append(prompt)
    reading = Reading(prompts, prompt_of, position_of, group_of, len(names))
    reading.check_positions(names, positions_of(model))
    return read_states(architecture, reading, max(default_layers(architecture.depth))).hidden
