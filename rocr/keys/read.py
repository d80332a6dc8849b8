"""Read keys and states from a model in one batched pass that stops after the last edited layer."""

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
    """Means of states over the groups of a reading: float32, on the device of the layer that they are read at.

    Attributes:
        hidden: (groups, d_out), the output of a decoder layer.
        keys: (groups, d_in), the input of a down-projection. None: not read.
        gains: (groups, d_out), the share of a small change of that down-projection's output that reaches the output
            of its decoder layer; see `rocr.model.gains`. None: not measured.
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
    """Run the prompts of a reading up to a decoder layer and average the states by group.

    Args:
        architecture: The architecture of the model.
        reading: The tokens to read.
        hidden_layer: The decoder layer whose output is read; later layers do not run.
        key_layer: The layer whose keys are also read, at most `hidden_layer`. None reads no keys.
        token_budget: Maximum number of tokens of a batch, with padding but without a shared prefix. It is halved
            after each CUDA out-of-memory error.
        progress: Called after every batch.
        stage: The name of the stage in progress reports.
        share: Whether a prefix that prompts share is run once for all of them, if the model allows it. The states
            then differ by rounding only.

    Raises:
        InputError: A module that is read runs more than once in a forward pass, or does not run at all.
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
    """Read the states of several key layers in one pass, with the gains of the `measured` layers.

    The other arguments are those of `read_states`.
    """
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
    """Return the hidden states, and for each key layer its states."""
    projections = {f"keys {layer}": architecture.down_projection(layer) for layer in key_layers}
    wanted = {"hidden": f"decoder layer {architecture.layers_name}.{hidden_layer}"}
    wanted |= {name: projection.name for name, projection in projections.items()}
    calls = {f"gains {layer}": LayerCall.of(architecture, layer) for layer in key_layers if layer in measured}
    means = {name: _GroupMeans(reading) for name in (*wanted, *calls)}
    done = 0
    prefix: tuple[int, ...] = ()
    cache = None
    cut = not architecture.kind.bidirectional
    for batch in batches(reading, token_budget, share and can_share(architecture), cut):
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
    """Running means over the groups of a reading, in memory proportional to the number of groups."""

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
        """Add the read tokens of a batch to the means, given its states (batch, tokens, features)."""
        reading, skipped = self._reading, len(batch.prefix)
        # A round contains each group at most once: the order of summation is fixed, unlike that of index_add_ on CUDA.
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
        """Return the means (groups, features)."""
        assert self._sums is not None, "a reading has at least one prompt"
        return self._sums


def _receive(found: dict[str, Tensor], name: str, shape: torch.Size, what: str, states: Tensor) -> None:
    """Store the states that a hook of a module received."""
    if name in found:
        raise InputError(f"{what} runs more than once in a forward pass: a token has several keys there.")
    found[name] = as_sequence(states, shape, f"The tensor that flows through {what}")
