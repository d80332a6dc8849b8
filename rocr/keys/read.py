"""Measure keys and states in a model: one batched pass that stops after the last edited layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.keys.batches import Batch, batches
from rocr.keys.plan import Reading
from rocr.keys.prefix_cache import can_share, run_prefix
from rocr.model.architecture import Architecture
from rocr.model.capture import as_sequence, check_called, hidden_hook, input_hook, run_through
from rocr.model.gains import LayerCall, measure_gains, recording
from rocr.model.smaller_batches import retry_with_smaller_batch
from rocr.progress import Progress, ProgressCallback, silent


@dataclass(frozen=True)
class States:
    """What a reading found, averaged by group; float32, on the device of the layer they come from.

    Attributes:
        hidden: (groups, d_out) output of the decoder layer that was asked for.
        keys: (groups, d_in) input of the down-projection, where one was asked for.
        gains: (groups, d_out) share of a small change of that down-projection's output that arrives at its layer's
            output, where it was measured; see `rocr.model.gains`.
    """

    hidden: Tensor
    keys: Tensor | None = None
    gains: Tensor | None = None


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
            each time the memory of a GPU runs out.
        progress: told after every batch.
        stage: what to call this in progress reports.
        share: whether a prefix that prompts share may be run once for all of them, where the model can; the states
            are the same but for rounding.
    """
    layers = [] if key_layer is None else [key_layer]
    hidden, found = retry_with_smaller_batch(
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
    measured: Collection[int] = (),
) -> dict[int, States]:
    """The states of several key layers from one pass, with the gains of the `measured` ones; see `read_states`."""
    return retry_with_smaller_batch(
        lambda budget: _read(
            architecture, reading, hidden_layer, key_layers, budget, progress, stage, True, set(measured)
        )[1],
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
    measured: Collection[int] = (),
) -> tuple[Tensor, dict[int, States]]:
    """The hidden states, and for each key layer its states with them."""
    projections = {f"keys {layer}": architecture.down_projection(layer) for layer in key_layers}
    wanted = {"hidden": f"decoder layer {architecture.layers_name}.{hidden_layer}"}
    wanted |= {name: projection.name for name, projection in projections.items()}
    calls = {f"gains {layer}": LayerCall.of(architecture, layer) for layer in key_layers if layer in measured}
    means = {name: _GroupMeans(reading) for name in (*wanted, *calls)}
    done = 0
    prefix: tuple[int, ...] = ()
    cache = None
    for batch in batches(reading, token_budget, share and can_share(architecture)):
        if batch.prefix != prefix:
            prefix = batch.prefix
            cache = run_prefix(architecture, hidden_layer, prefix) if prefix else None
        found: dict[str, Tensor] = {}
        shape = batch.tokens.shape
        with ExitStack() as stack:
            into = {name: partial(_receive, found, name, shape, what) for name, what in wanted.items()}
            stack.enter_context(hidden_hook(architecture, hidden_layer, into["hidden"]))
            for name, projection in projections.items():
                stack.enter_context(input_hook(projection.module, into[name]))
            for call in calls.values():
                recording(stack, call)
            run_through(architecture, hidden_layer, batch.tokens, batch.mask, cache)
        check_called(found, wanted)
        for name, call in calls.items():
            found[name] = measure_gains(architecture.model, call, shape)
            call.forget()
        for name, mean in means.items():
            mean.add(found.pop(name), batch)
        done += len(batch.prompts)
        progress(Progress(stage, done, len(reading.prompts), "prompts"))
    results = {name: mean.result() for name, mean in means.items()}
    hidden = results["hidden"]
    return hidden, {n: States(hidden, results[f"keys {n}"], results.get(f"gains {n}")) for n in key_layers}


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


def _receive(found: dict[str, Tensor], name: str, shape: torch.Size, what: str, states: Tensor) -> None:
    if name in found:
        raise InputError(f"{what} runs more than once in a forward pass, so that a token has several keys there.")
    found[name] = as_sequence(states, shape, f"What flows through {what}")
