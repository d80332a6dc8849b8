"""Collect key statistics from text in one pass over all layers, stopping after the last edited one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocr import ops
from rocr.architectures import Architecture, default_layers, find_architecture, text_config
from rocr.capture import input_hook, run_through
from rocr.checkpoint import Checkpoint
from rocr.errors import GuardError, InputError
from rocr.fingerprint import fingerprint
from rocr.progress import Progress, ProgressCallback, silent
from rocr.sampling import sample_sequences
from rocr.statistics import Statistics
from rocr.texts import pack_tokens, token_batches

DEFAULT_SAMPLED_TOKENS = 8_192
SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True)
class CollectOptions:
    """How text is cut and read.

    Attributes:
        tokens: keys to collect at most; None: all of the text, or 8,192 where the model writes the text.
        length: tokens of a sequence, or fewer where the model has fewer positions. The first of each is left
            out: it is an attention sink.
        batch_tokens: tokens that are run together.
        seed: of the sampled text.
        text_sha256: what identifies the text, where the caller knows; else the texts themselves are hashed.
        text_bytes: size of the text, for the time left; None: unknown.
        checkpoint: file that holds the state of an interrupted collection; needs `text_sha256`.
    """

    tokens: int | None = None
    length: int = 512
    batch_tokens: int = 8192
    seed: int = 0
    text_sha256: str | None = None
    text_bytes: int | None = None
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InputError(f"length must be at least 2 tokens, since the first is left out, not {self.length}.")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens must be at least 1, not {self.tokens}.")
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, not {self.batch_tokens}.")
        if self.checkpoint is not None and self.text_sha256 is None:
            raise InputError("A checkpoint needs text_sha256, or it could be resumed on another text.")


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    layers: Sequence[int] | None = None,
    options: CollectOptions | None = None,
    progress: ProgressCallback = silent,
) -> Statistics:
    """Collect the second moments of a model's keys on ordinary text.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        texts: documents; None: text that the model itself writes, by `options.seed`.
        layers: decoder layers whose keys are collected; None: those that are edited by default.
        options: how text is cut and read.
        progress: told after every batch.

    Raises:
        InputError: the layers do not exist, the text is empty, or a checkpoint is of another collection.
        GuardError: a key is not finite.
    """
    options = options or CollectOptions()
    architecture = find_architecture(model)
    chosen = tuple(sorted(layers)) if layers is not None else default_layers(architecture.depth)
    if not chosen:
        raise InputError("layers is empty: name the decoder layers whose keys are to be collected.")
    sums = {layer: _zeros(architecture, layer) for layer in chosen}
    source = _Source(texts, options)
    mark = fingerprint(architecture, tokenizer, max(chosen))
    state = Checkpoint.open(
        options.checkpoint,
        identity={
            # Without the name: the same model may lie elsewhere by now.
            "model": [mark.model, mark.layer, mark.tokenizer],
            "text": source.name(),
            "layers": list(chosen),
            "cut": [options.tokens, options.length, options.batch_tokens],
        },
        sums=sums,
    )
    saved_at = time.monotonic()
    try:
        for number, batch in enumerate(source.batches(model, tokenizer, progress)):
            if number < state.batches:
                continue
            state.finish_batch(_accumulate(architecture, state, batch, options.tokens))
            progress(Progress("statistics", state.tokens, source.estimate(state.tokens), "tokens"))
            if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                state.save()
                saved_at = time.monotonic()
    except BaseException:
        state.save()
        raise
    if state.tokens == 0:
        raise InputError(f"The text gave no tokens to collect: {source.documents} documents of {source.bytes} bytes.")
    moments = {layer: _finished(total, state.tokens, layer) for layer, total in sums.items()}
    return Statistics(moments, state.tokens, source.name(), mark)


@dataclass
class _Source:
    """The text: counted and hashed while it is read."""

    texts: Iterable[str] | None
    options: CollectOptions
    documents: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def batches(self, model: nn.Module, tokenizer: Any, progress: ProgressCallback) -> Iterator[list[list[int]]]:
        """Batches of sequences of equal length, no more than the wanted tokens need."""
        options = self.options
        if self.texts is None:
            wanted = options.tokens or DEFAULT_SAMPLED_TOKENS
            sequences: Iterable[list[int]] = sample_sequences(model, tokenizer, wanted, options.seed, progress)
        else:
            length = min(options.length, getattr(text_config(model), "max_position_embeddings", None) or options.length)
            vocabulary = len(find_architecture(model).embedding.weight)  # type: ignore[arg-type]
            sequences = pack_tokens(self._counted(self.texts), tokenizer, length, vocabulary)
        planned = 0
        for batch in token_batches(sequences, options.batch_tokens):
            if options.tokens is not None and planned >= options.tokens:
                return
            planned += sum(len(sequence) - 1 for sequence in batch)
            yield from _equal_lengths(batch)

    def name(self) -> str:
        """What the statistics say of their text."""
        if self.texts is None:
            return f"written by the model, seed {self.options.seed}"
        return self.options.text_sha256 or self.digest.hexdigest()

    def estimate(self, tokens: int) -> int | None:
        """The total number of tokens, from the bytes read so far."""
        if self.texts is None:
            return self.options.tokens or DEFAULT_SAMPLED_TOKENS
        known = None
        if self.options.text_bytes and self.bytes:
            known = max(tokens, round(tokens * self.options.text_bytes / self.bytes))
        return min(filter(None, (known, self.options.tokens)), default=None)

    def _counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            self.digest.update(len(encoded).to_bytes(8, "little") + encoded)
            self.documents += 1
            self.bytes += len(encoded)
            yield text


def _zeros(architecture: Architecture, layer: int) -> Tensor:
    weight = architecture.down_projection(layer).weight
    return torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device)


def _accumulate(architecture: Architecture, state: Checkpoint, batch: list[list[int]], limit: int | None) -> int:
    """Add a batch's keys to the sums; returns how many tokens that were."""
    tokens = torch.tensor(batch)
    count = tokens[:, 1:].numel()
    count = count if limit is None else min(count, limit - state.tokens)
    if count <= 0:
        return 0

    def add(layer: int, keys: Tensor) -> None:
        with state.adding(layer) as total:
            ops.accumulate_second_moment(total, keys[:, 1:].reshape(-1, keys.shape[-1])[:count])

    with ExitStack() as stack:
        for layer in state.unfinished():
            module = architecture.down_projection(layer).module
            stack.enter_context(input_hook(module, partial(add, layer)))
        run_through(architecture, max(state.sums), tokens)
    return count


def _finished(total: Tensor, tokens: int, layer: int) -> Tensor:
    ops.symmetrize(total)
    if not torch.isfinite(total.diagonal()).all():
        raise GuardError(f"Some keys of layer {layer} are not finite: the model does not compute on this text.")
    return total.div_(tokens)


def _equal_lengths(batch: list[list[int]]) -> Iterator[list[list[int]]]:
    """Split a batch where the length changes, so that nothing is padded."""
    start = 0
    for i in range(1, len(batch) + 1):
        if i == len(batch) or len(batch[i]) != len(batch[start]):
            yield batch[start:i]
            start = i
