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
from rocr.keys.routed import RoutedMeans, Routing
from rocr.model.architecture import Architecture
from rocr.model.blocks import find_blocks
from rocr.model.capture import (
    as_sequence,
    as_states,
    check_called,
    hidden_hook,
    input_hook,
    puts_streams_first,
    run_through,
)
from rocr.model.gains import LayerCall, measure_gains, recording
from rocr.model.gated_keys import GatedKeys, gated_keys_hook
from rocr.model.prefix_cache import can_share, run_prefix
from rocr.model.smaller_batches import retry_with_smaller_batch
from rocr.progress import Progress, ProgressCallback, silent


@dataclass(frozen=True)
class States:
    """Means of states over the groups of a reading: float32, on the device of the layer that they are read at.

    Attributes:
        hidden: (groups, d_out), the output of a decoder layer.
        keys: (groups, d_in), the input of a down-projection. For a mixture of experts, the wide key: the gated inputs
            of the blocks in `routing`, side by side. None: not read.
        gains: (groups, d_out), the share of a small change of that down-projection's output that reaches the output
            of its decoder layer; see `rocr.model.gains`. None: not measured.
        routing: The blocks that the keys are routed to. None for a dense layer.
    """

    hidden: Tensor
    keys: Tensor | None = None
    gains: Tensor | None = None
    routing: Routing | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks of the layer that `keys` covers."""
        return (0,) if self.routing is None else self.routing.blocks


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
    found_blocks = find_blocks(architecture, key_layers)
    blocks = {f"keys {layer}": found_blocks[layer] for layer in key_layers}
    wanted = {"hidden": f"decoder layer {architecture.layers_name}.{hidden_layer}"}
    wanted |= {name: layer.name for name, layer in blocks.items()}
    calls = {f"gains {layer}": LayerCall.of(architecture, layer) for layer in key_layers if layer in measured}
    mixtures = {name: RoutedMeans(reading, layer) for name, layer in blocks.items() if layer.is_mixture}
    means = {name: _GroupMeans(reading) for name in (*wanted, *calls) if name not in mixtures}
    done = 0
    prefix: tuple[int, ...] = ()
    cache = None
    cut = not architecture.kind.bidirectional
    for batch in batches(reading, token_budget, share and can_share(architecture), cut):
        if batch.prefix != prefix:
            prefix = batch.prefix
            cache = run_prefix(architecture, hidden_layer, prefix) if prefix else None
        found: dict[str, Tensor] = {}
        routed: dict[str, list[GatedKeys]] = {}
        shape = batch.tokens.shape
        with ExitStack() as stack:
            into = {name: partial(_receive, found, name, shape, what) for name, what in wanted.items()}
            into["hidden"] = partial(_receive, found, "hidden", None, wanted["hidden"])
            stack.enter_context(hidden_hook(architecture, hidden_layer, into["hidden"]))
            for name, layer in blocks.items():
                if name in mixtures:
                    receive = partial(_receive_routed, routed, name, shape, layer.name)
                    stack.enter_context(gated_keys_hook(layer.module, layer.parameters, receive, layer.name))
                else:
                    stack.enter_context(input_hook(layer.module, into[name]))
            for call in calls.values():
                recording(stack, call)
            run_through(architecture, hidden_layer, batch.tokens, batch.mask, cache)
        check_called({*found, *routed}, wanted)
        streams_first = puts_streams_first(architecture, hidden_layer, found["hidden"], shape)
        found["hidden"] = as_states(found["hidden"], shape, _what(wanted["hidden"]), streams_first)
        for name, call in calls.items():
            call.streams_first = streams_first
            found[name] = measure_gains(architecture.model, call, shape)
            call.forget()
        for name, mean in means.items():
            mean.add(found.pop(name), batch)
        for name, routed_means in mixtures.items():
            routed_means.add(routed.pop(name), batch)
        done += len(batch.prompts)
        progress(Progress(stage, done, len(reading.prompts), "prompts"))
    results: dict[str, Tensor] = {name: mean.result() for name, mean in means.items()}
    routing: dict[str, Routing] = {}
    for name, routed_means in mixtures.items():
        results[name], routing[name] = routed_means.result()
    hidden = results["hidden"]
    return hidden, {
        n: States(hidden, results[f"keys {n}"], results.get(f"gains {n}"), routing.get(f"keys {n}")) for n in key_layers
    }


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


def _receive(found: dict[str, Tensor], name: str, shape: torch.Size | None, what: str, states: Tensor) -> None:
    """Store the states that a hook of a module received, as (batch, tokens, features) if the shape is given."""
    if name in found:
        raise InputError(f"{what} runs more than once in a forward pass: a token has several keys there.")
    found[name] = states if shape is None else as_sequence(states, shape, _what(what))


def _what(module: str) -> str:
    return f"The tensor that flows through {module}"


def _receive_routed(
    routed: dict[str, list[GatedKeys]], name: str, shape: torch.Size, what: str, output: Tensor, keys: list[GatedKeys]
) -> None:
    """Store the gated keys that a mixture's hook received, with its output (tokens, d_out)."""
    if name in routed:
        raise InputError(f"{what} runs more than once in a forward pass: a token has several keys there.")
    as_sequence(output, shape, f"The output of {what}")
    routed[name] = keys
