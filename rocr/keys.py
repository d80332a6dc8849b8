"""Measure keys and states in a model: one batched pass that stops after the last edited layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rocr.architectures import Architecture
from rocr.batches import Batch, batches
from rocr.capture import hidden_hook, input_hook, run_through
from rocr.key_plan import Reading
from rocr.less_memory import halving
from rocr.prefix import can_share, run_prefix
from rocr.progress import Progress, ProgressCallback, silent


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
    share: bool = True,
) -> States:
    """Run a reading's prompts through the layers up to `hidden_layer` and average the states by group.

    Args:
        architecture: of the model to read.
        reading: what to read where.
        hidden_layer: the decoder layer whose output is read; the last to run.
        key_layer: the layer whose keys are read as well; at most `hidden_layer`.
        token_budget: tokens of a batch, padding included; a prefix that prompts share does not count. Half as many
            as often as the memory of a GPU does not do.
        progress: told after every batch.
        stage: what to call this in progress reports.
        share: whether a prefix that prompts share may be run once for all of them, where the model can; the states
            are the same but for rounding.
    """
    layers = [] if key_layer is None else [key_layer]
    hidden, found = halving(
        lambda budget: _read(architecture, reading, hidden_layer, layers, budget, progress, stage, share), token_budget
    )
    return States(hidden) if key_layer is None else found[key_layer]


def read_layers(
    architecture: Architecture,
    reading: Reading,
    hidden_layer: int,
    key_layers: Sequence[int],
    token_budget: int = 4096,
    progress: ProgressCallback = silent,
    stage: str = "states",
) -> dict[int, States]:
    """The states of several key layers from one pass; see `read_states`."""
    return halving(
        lambda budget: _read(architecture, reading, hidden_layer, key_layers, budget, progress, stage, share=True)[1],
        token_budget,
    )


def _read(
    architecture: Architecture,
    reading: Reading,
    hidden_layer: int,
    key_layers: Sequence[int],
    token_budget: int,
    progress: ProgressCallback,
    stage: str,
    share: bool,
) -> tuple[Tensor, dict[int, States]]:
    """The hidden states, and for each key layer its states with them."""
    modules = {f"keys {layer}": architecture.down_projection(layer).module for layer in key_layers}
    norms = {f"outputs {layer}": architecture.output_norm(layer) for layer in key_layers}
    modules |= {name: norm for name, norm in norms.items() if norm is not None}
    means = {name: _GroupMeans(reading) for name in ("hidden", *modules)}
    done = 0
    prefix: tuple[int, ...] = ()
    cache = None
    for batch in batches(reading, token_budget, share and can_share(architecture)):
        if batch.prefix != prefix:
            prefix = batch.prefix
            cache = run_prefix(architecture, hidden_layer, prefix) if prefix else None
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(hidden_hook(architecture, hidden_layer, _into(found, "hidden")))
            for name, module in modules.items():
                stack.enter_context(input_hook(module, _into(found, name)))
            run_through(architecture, hidden_layer, batch.tokens, batch.mask, cache)
        for name, mean in means.items():
            mean.add(found.pop(name), batch)
        done += len(batch.prompts)
        progress(Progress(stage, done, len(reading.prompts), "prompts"))
    results = {name: mean.result() for name, mean in means.items()}
    hidden = results["hidden"]
    return hidden, {n: States(hidden, results[f"keys {n}"], results.get(f"outputs {n}")) for n in key_layers}


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
        self._counts = torch.tensor(counts)
        self._sums: Tensor | None = None

    def add(self, states: Tensor, batch: Batch) -> None:
        """Take the read tokens of a batch from its states (batch, tokens, features)."""
        reading, skipped = self._reading, len(batch.prefix)
        # Each round holds a group at most once, so that it is summed in a fixed order, unlike index_add_ on a GPU.
        rounds: list[tuple[list[int], list[int], list[int]]] = []
        seen: dict[int, int] = {}
        for row, prompt in enumerate(batch.prompts):
            for token in self._tokens.get(prompt, ()):
                group = reading.group_of[token]
                number = seen[group] = seen.get(group, -1) + 1
                if number == len(rounds):
                    rounds.append(([], [], []))
                for column, value in zip(
                    rounds[number], (row, reading.position_of[token] - skipped, group), strict=True
                ):
                    column.append(value)
        if self._sums is None:
            self._sums = torch.zeros(reading.groups, states.shape[-1], device=states.device)
        for rows, positions, groups in rounds:
            shares = states[rows, positions].float() / self._counts[groups].to(states.device)[:, None]
            self._sums[groups] += shares

    def result(self) -> Tensor:
        assert self._sums is not None, "a reading has at least one prompt"
        return self._sums


def _into(found: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def receive(states: Tensor) -> None:
        found[name] = states

    return receive
