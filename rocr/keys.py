"""Measure keys and states in a model: one batched, length-sorted pass that stops after the last edited layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rocr.architectures import Architecture
from rocr.capture import hidden_hook, input_hook, run_through
from rocr.key_plan import Reading
from rocr.progress import Progress, ProgressCallback, silent
from rocr.prompts import Prompt


@dataclass(frozen=True)
class States:
    """What a reading found, averaged by group; float32, on the device of the layer they come from.

    Attributes:
        hidden: (groups, d_out) output of the decoder layer that was asked for.
        keys: (groups, d_in) input of the down-projection, where one was asked for.
        outputs: (groups, d_out) input of the norm behind that down-projection, where there is one.
    """

    hidden: Tensor
    keys: Tensor | None = None
    outputs: Tensor | None = None


def read_states(
    architecture: Architecture,
    reading: Reading,
    hidden_layer: int,
    key_layer: int | None = None,
    token_budget: int = 4096,
    progress: ProgressCallback = silent,
    stage: str = "states",
) -> States:
    """Run a reading's prompts through the layers up to `hidden_layer` and average the states by group.

    Args:
        architecture: of the model to read.
        reading: what to read where.
        hidden_layer: the decoder layer whose output is read; the last to run.
        key_layer: the layer whose keys are read as well; at most `hidden_layer`.
        token_budget: tokens of a batch, padding included.
        progress: told after every batch.
        stage: what to call this in progress reports.
    """
    wanted = ["hidden"] + (["keys"] if key_layer is not None else [])
    norm = architecture.output_norm(key_layer) if key_layer is not None else None
    if norm is not None:
        wanted.append("outputs")
    means: dict[str, _GroupMeans] = {name: _GroupMeans(reading) for name in wanted}
    done = 0
    for batch in _batches(reading.prompts, token_budget):
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(hidden_hook(architecture, hidden_layer, _into(found, "hidden")))
            if key_layer is not None:
                module = architecture.down_projection(key_layer).module
                stack.enter_context(input_hook(module, _into(found, "keys")))
            if norm is not None:
                stack.enter_context(input_hook(norm, _into(found, "outputs")))
            run_through(architecture, hidden_layer, *_padded([reading.prompts[i] for i in batch]))
        for name in wanted:
            means[name].add(found[name], batch)
        done += len(batch)
        progress(Progress(stage, done, len(reading.prompts), "prompts"))
    return States(**{name: means[name].result() for name in wanted})


def before_output_norm(norm: nn.Module, outputs: Tensor, residuals: Tensor) -> Tensor:
    """What to add to a norm's input so that its output moves by `residuals`, to first order.

    Gemma 2, Gemma 3 and OLMo 2 normalise the MLP's output y before they add it: g * y / rms(y). The change of
    rms(y) is left out, since a gain has no radial part that could follow it.

    Args:
        norm: the root-mean-square norm.
        outputs: (n, d_out) its inputs y.
        residuals: (n, d_out) wanted changes of its output.
    """
    weight = next(norm.parameters())
    gain = norm(torch.ones(1, outputs.shape[1], dtype=weight.dtype, device=weight.device)).to(outputs)
    scale = outputs.square().mean(dim=1, keepdim=True).sqrt()
    floor = gain.abs().mean() * 1e-3
    return residuals * scale / torch.where(gain.abs() < floor, floor, gain)


class _GroupMeans:
    """Running means of the states of a reading's groups: memory for the groups, not for the tokens."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        counts = [0] * reading.groups
        self._tokens: dict[int, list[int]] = {}
        for token, (prompt, group) in enumerate(zip(reading.prompt_of, reading.group_of, strict=True)):
            counts[group] += 1
            self._tokens.setdefault(prompt, []).append(token)
        self._counts = counts
        self._sums: Tensor | None = None

    def add(self, states: Tensor, batch: Sequence[int]) -> None:
        """Take the read tokens of a batch from its states (batch, tokens, features)."""
        reading = self._reading
        rows, positions, groups = [], [], []
        for row, prompt in enumerate(batch):
            for token in self._tokens.get(prompt, ()):
                rows.append(row)
                positions.append(reading.position_of[token])
                groups.append(reading.group_of[token])
        taken = states[rows, positions].float()
        if self._sums is None:
            self._sums = taken.new_zeros(reading.groups, taken.shape[1])
        # A product with a selection matrix sums equal groups in a fixed order, unlike index_add_ on a GPU.
        present = sorted(set(groups))
        place = {group: i for i, group in enumerate(present)}
        selection = taken.new_zeros(len(present), len(groups))
        for column, group in enumerate(groups):
            selection[place[group], column] = 1.0 / self._counts[group]
        # Zero times infinity is not a number: what overflows must not spoil the groups of other tokens.
        finite = taken.isfinite().all(dim=1, keepdim=True)
        self._sums[present] += selection @ taken.where(finite, 0.0)
        self._sums[[group for group, fine in zip(groups, finite.flatten().tolist(), strict=True) if not fine]] = (
            torch.nan
        )

    def result(self) -> Tensor:
        assert self._sums is not None, "a reading has at least one prompt"
        return self._sums


def _into(found: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def receive(states: Tensor) -> None:
        found[name] = states

    return receive


def _batches(prompts: Sequence[Prompt], token_budget: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, at most `token_budget` tokens a batch with padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    batch: list[int] = []
    for i in order:
        # Ascending lengths: the newest prompt is the longest of its batch.
        if batch and (len(batch) + 1) * len(prompts[i].tokens) > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
    """Token ids and mask, padded on the right, where causal attention never looks back at padding."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
        mask[row, : len(prompt.tokens)] = 1
    return tokens, None if bool(mask.all()) else mask
