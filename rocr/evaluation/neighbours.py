"""Find the neighbours of a target: the subjects nearest to it in a model's hidden states, and hardest to retain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import check_names, folded
from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.evaluation.probes.probe import Probe, split_by_subject
from rocr.keys.name_states import cosines, read_name_states
from rocr.model.architecture import find_architecture
from rocr.model.causality import with_kind
from rocr.model.layers import layers_by_default


def nearest_subjects(
    model: nn.Module,
    tokenizer: Any,
    target: str,
    others: Sequence[str],
    count: int = 10,
    chat: ChatSettings = DEFAULT,
) -> list[tuple[str, float]]:
    """Return the neighbours of a target with their cosine similarities, the nearest first.

    A subject is represented by its state from `name_states`, minus the mean over all subjects.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        target: Name of the target.
        others: Names of other subjects, two or more; duplicates and the target itself are left out.
        count: Maximum number of neighbours.
        chat: Settings of the chat template.

    Raises:
        InputError: If there are fewer than two other subjects, or a name is invalid in a list of concepts.
    """
    others = list({folded(name): name for name in others if folded(name) != folded(target)}.values())
    check_names("subject", [target, *others])
    if len(others) < 2:
        raise InputError(
            f"{len(others)} other subjects are too few to find the neighbours of {target!r}; give probes about two or "
            "more."
        )
    found = cosines(name_states(model, tokenizer, [target, *others], chat), of=[0])[0, 1:]
    best = torch.topk(found, min(count, len(others)))
    return [(others[int(i)], float(value)) for value, i in zip(best.values, best.indices, strict=True)]


def keep_nearest(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    targets: Sequence[str],
    count: int = 10,
    chat: ChatSettings = DEFAULT,
) -> list[Probe]:
    """Split probes by target, and keep only the retain probes about the `count` neighbours of each target.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        probes: Probes about the targets and other subjects.
        targets: Names of the targets.
        count: Maximum number of neighbours of each target.
        chat: Settings of the chat template.

    Raises:
        InputError: If no probe is about a target, or there are fewer than two other subjects.
    """
    probes = split_by_subject(probes, targets)
    others = list({folded(probe.subject): probe.subject for probe in probes if probe.split == "retain"}.values())
    neighbours = {
        folded(name)
        for target in targets
        for name, _ in nearest_subjects(model, tokenizer, target, others, count, chat)
    }
    return [probe for probe in probes if probe.split == "forget" or folded(probe.subject) in neighbours]


def name_states(model: nn.Module, tokenizer: Any, names: Sequence[str], chat: ChatSettings = DEFAULT) -> Tensor:
    """Return the hidden states (names, d_out), float32, at the last token of each name.

    They are read after the last of the layers that are edited by default, and averaged over the default templates.

    Raises:
        InputError: If tokenizer or chat template fail, or a prompt is longer than the model's maximum length.
    """
    architecture = find_architecture(model)
    last = max(layers_by_default(architecture))
    return read_name_states(with_kind(architecture, last), tokenizer, names, last, EditConfig().templates, chat)
