"""Read one state for each of many names, and compare them: which names a model holds near to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.config import Template
from rocr.keys.plan import Reading
from rocr.keys.prompts import Prompt, build_prompts, render_template
from rocr.keys.read import read_states
from rocr.model.architecture import Architecture, positions_of
from rocr.progress import ProgressCallback, silent

TOKENS = 1024
"""Tokens of a batch: hundreds of names in one batch take more memory than the rest of an edit of a small model."""


def read_name_states(
    architecture: Architecture,
    tokenizer: Any,
    names: Sequence[str],
    layer: int,
    templates: Sequence[Template],
    chat: ChatSettings = DEFAULT,
    progress: ProgressCallback = silent,
) -> Tensor:
    """Return the hidden states (names, d_out), float32, at the last token of each name.

    Args:
        architecture: The model, with its kind.
        tokenizer: Its tokenizer.
        names: The names.
        layer: The decoder layer at whose output they are read.
        templates: The contexts over which the states are averaged.
        chat: Settings of the chat template.
        progress: Called after every batch.

    Raises:
        InputError: If tokenizer or chat template fail, or a prompt is longer than the model's maximum length.
    """
    prompts: list[Prompt] = []
    prompt_of: list[int] = []
    position_of: list[int] = []
    group_of: list[int] = []
    for template in templates:
        rendered = render_template(tokenizer, template, chat)
        for group, prompt in enumerate(build_prompts(tokenizer, rendered, names, architecture.kind)):
            if prompt.name:
                prompt_of.append(len(prompts))
                position_of.append(prompt.name[-1])
                group_of.append(group)
                prompts.append(prompt)
    reading = Reading(prompts, prompt_of, position_of, group_of, len(names))
    reading.check_positions(names, positions_of(architecture.model))
    return read_states(architecture, reading, layer, token_budget=TOKENS, progress=progress, stage="names").hidden


def cosines(states: Tensor, of: Sequence[int]) -> Tensor:
    """Return the cosines (len(of), names) of some states with all states (names, d_out), minus the mean of all."""
    centred = nn.functional.normalize(states - states.mean(dim=0), dim=1)
    return centred[list(of)] @ centred.T
