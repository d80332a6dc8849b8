"""Collect key statistics from text in one pass over all layers, stopping after the last edited one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocr import ops
from rocr.config import DEFAULT, ChatSettings
from rocr.errors import GuardError, InputError, RocrError
from rocr.io.dtypes import dtype_name
from rocr.model.architecture import Architecture, default_layers, find_architecture, positions_of
from rocr.model.capture import as_sequence, check_called, input_hook, run_through
from rocr.model.causality import check_causal
from rocr.model.chat import with_date
from rocr.model.fingerprint import down_projection_digests, fingerprint
from rocr.model.smaller_batches import retry_with_smaller_batch
from rocr.model.tensor_parallel import is_parallel
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent
from rocr.statistics.checkpoint import Checkpoint
from rocr.statistics.corpus import pack_tokens, token_batches
from rocr.statistics.distributed import Ranks
from rocr.statistics.provenance import Provenance, computed_with, versions_now
from rocr.statistics.self_generated import sample_sequences
from rocr.statistics.statistics import Statistics

DEFAULT_SAMPLED_TOKENS = 8_192
MAX_SAMPLED_TOKENS = 2**20
"""The model writes all of its sequences at once, so that memory grows with them."""
SECONDS_BETWEEN_CHECKPOINTS = 60.0
FIRST_TOKENS = 1
"""Tokens at the beginning of a sequence whose keys are left out."""


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
        checkpoint: file that holds the state of an interrupted collection; needs `text_sha256`. Of several
            processes each has its own, `<checkpoint>.<rank>-of-<number>`.
        distributed: whether the processes of an initialised torch.distributed group share the work. All of them
            must then call with the same model, text and options, and all get the result.
        chat: what the chat template is given where the model writes the text, half of it as chats.
    """

    tokens: int | None = None
    length: int = 512
    batch_tokens: int = 8192
    seed: int = 0
    text_sha256: str | None = None
    text_bytes: int | None = None
    checkpoint: str | os.PathLike[str] | None = None
    distributed: bool = True
    chat: ChatSettings = DEFAULT

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InputError(f"length must be at least 2 tokens, since the first is left out, not {self.length}.")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens must be at least 1, not {self.tokens}.")
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, not {self.batch_tokens}.")
        if self.checkpoint is not None and self.text_sha256 is None:
            raise InputError("A checkpoint needs text_sha256, or it could be resumed on another text.")


@plain_arithmetic()
def collect_statistics(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    layers: Sequence[int] | None = None,
    options: CollectOptions | None = None,
    progress: ProgressCallback = silent,
) -> Statistics:
    """Collect the second moments of a model's keys on ordinary text.

    Inside a torch.distributed process group, every process runs its share of the batches, which are those of a
    single process, and the sums are added up once at the end: the same result to rounding.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        texts: documents; None: text that the model itself writes, by `options.seed`.
        layers: decoder layers whose keys are collected; None: those that are edited by default.
        options: how text is cut and read.
        progress: told after every batch.

    Raises:
        InputError: the layers do not exist, the text is empty, more tokens are wanted than the model writes, or a
            checkpoint is of another collection.
        GuardError: a key is not finite.
        RocrError: another process failed or was lost; the checkpoints stay.
    """
    options = options or CollectOptions()
    if texts is None:
        check_sampled(options.tokens)
        options = replace(options, chat=with_date(options.chat, tokenizer))
    # Processes that hold one model between them run every batch together.
    ranks = Ranks.of_group() if options.distributed and not is_parallel(model) else Ranks()
    source = _Source(texts, options, ranks)
    with ranks.together():
        architecture = find_architecture(model)
        chosen = tuple(sorted(layers)) if layers is not None else default_layers(architecture.depth)
        if not chosen:
            raise InputError("layers is empty: name the decoder layers whose keys are to be collected.")
        for layer in chosen:
            architecture.check_down_projection(layer)
        sums = {layer: _zeros(architecture, layer) for layer in chosen}
        mark = fingerprint(architecture, tokenizer, max(chosen))
        weight = architecture.down_projection(max(chosen)).weight
        before = down_projection_digests(architecture, max(chosen))
        check_causal(architecture, max(chosen))
    identity = {
        # Without the name: the same model may lie elsewhere by now.
        "model": [mark.model, mark.layer, mark.tokenizer, list(before)],
        "text": source.name(),
        "layers": list(chosen),
        "cut": [options.tokens, options.length, options.batch_tokens],
        # A sum of keys that were computed in two ways is the sum of no single run.
        "computed": [dtype_name(weight.dtype), weight.device.type, computed_with(model), versions_now()],
    }
    ranks.check_same("models, texts, layers or options", identity)
    with ranks.together():
        state = Checkpoint.open(ranks.checkpoint(options.checkpoint), identity | ranks.share(), sums)
    saved_at = time.monotonic()
    try:
        resumed, finished = 0, state.batches
        for number, batch in enumerate(source.batches(architecture, tokenizer, progress)):
            done = batch.before + batch.count
            if number // ranks.size < finished:
                resumed = done
            elif ranks.owns(number):
                state.finish_batch(_accumulate(architecture, state, batch))
                progress(Progress("statistics", done, source.estimate(done), "tokens", resumed))
                if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                    state.save()
                    saved_at = time.monotonic()
            if ranks.ends_round(number):
                ranks.meet()
        ranks.meet(finished=True)
        ranks.check_same("texts", source.name())
        tokens = sum(ranks.gather(state.tokens))
        if tokens == 0:
            raise InputError(
                f"The text gave no tokens to collect: {source.documents} documents of {source.bytes} bytes."
            )
        if ranks.size > 1:
            state.close()
            for layer in chosen:
                ranks.add_up(sums[layer])
    except BaseException as error:
        state.save()
        ranks.tell(error)
        raise
    moments = {layer: _finished(total, tokens, layer) for layer, total in sums.items()}
    read = replace(source.provenance(dtype_name(weight.dtype), computed_with(model)), down_projections=before)
    return Statistics(moments, tokens, source.name(), mark, read)


def check_sampled(tokens: int | None) -> None:
    """Refuse to let a model write more than it can at once.

    Raises:
        InputError: it is more than 1,048,576 tokens.
    """
    if tokens is not None and tokens > MAX_SAMPLED_TOKENS:
        raise InputError(
            f"Without text the model writes its own, at most {MAX_SAMPLED_TOKENS:,} tokens, not {tokens:,}: "
            "give text files (--text), or ask for fewer tokens (--tokens)."
        )


@dataclass(frozen=True)
class _Batch:
    """Sequences of equal length.

    Attributes:
        sequences: token ids.
        before: number of keys that the batches before it give.
        count: number of keys to take from it, from its beginning: no first tokens, nothing beyond the limit.
    """

    sequences: list[list[int]]
    before: int
    count: int


@dataclass
class _Source:
    """The text: counted and hashed while it is read."""

    texts: Iterable[str] | None
    options: CollectOptions
    ranks: Ranks
    length: int = 2
    documents: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def batches(self, architecture: Architecture, tokenizer: Any, progress: ProgressCallback) -> Iterator[_Batch]:
        """The batches of all processes, no more than the wanted tokens need."""
        options = self.options
        if self.texts is None:
            wanted = options.tokens or DEFAULT_SAMPLED_TOKENS
            # Chips of other kinds may draw otherwise.
            written = self.ranks.of_first(
                sample_sequences(architecture.model, tokenizer, wanted, options.seed, progress, options.chat)
            )
            self.length, self.documents = max(map(len, written)), len(written)
            sequences: Iterable[list[int]] = written
        else:
            self.length = min(options.length, positions_of(architecture.model) or options.length)
            vocabulary = len(architecture.embedding.weight)  # type: ignore[arg-type]
            sequences = pack_tokens(self._counted(self.texts), tokenizer, self.length, vocabulary)
        before = 0
        for batch in token_batches(sequences, options.batch_tokens):
            if options.tokens is not None and before >= options.tokens:
                return
            for part in _equal_lengths(batch):
                count = sum(len(sequence) - FIRST_TOKENS for sequence in part)
                if options.tokens is not None:
                    count = min(count, options.tokens - before)
                yield _Batch(part, before, count)
                before += count

    def name(self) -> str:
        """What the statistics say of their text."""
        if self.texts is None:
            return f"written by the model, seed {self.options.seed}" + self.options.chat.described()
        return self.options.text_sha256 or self.digest.hexdigest()

    def provenance(self, dtype: str, config: dict[str, Any]) -> Provenance:
        """How the text was read, once it was."""
        return Provenance(dtype, self.length, FIRST_TOKENS, config, self.documents, versions_now())

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


def _accumulate(architecture: Architecture, state: Checkpoint, batch: _Batch) -> int:
    """Add a batch's keys to the sums; returns how many tokens that were."""
    if batch.count == 0:
        return 0

    retry_with_smaller_batch(partial(_accumulate_pieces, architecture, state, batch), len(batch.sequences))
    return batch.count


def _accumulate_pieces(architecture: Architecture, state: Checkpoint, batch: _Batch, size: int) -> None:
    """Run a batch, so many sequences at a time; its keys are added up at once, so that no layer has a part of them."""
    held: dict[int, list[Tensor]] = {layer: [] for layer in state.unfinished()}
    projections = {layer: architecture.down_projection(layer) for layer in held}

    def receive(layer: int, keys: Tensor) -> None:
        name = projections[layer].name
        if layer not in held or len(held[layer]) > done:
            raise InputError(f"{name} runs more than once in a forward pass, so that a token has several keys there.")
        keys = as_sequence(keys, pieces[done].shape, f"What flows through {name}")
        held[layer].append(keys[:, FIRST_TOKENS:].reshape(-1, keys.shape[-1]))
        if done == len(pieces) - 1:
            keys = torch.cat(held.pop(layer)) if len(pieces) > 1 else held.pop(layer)[0]
            _add(state, layer, keys[: batch.count])

    pieces = torch.split(torch.tensor(batch.sequences), size)  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        for layer, projection in projections.items():
            stack.enter_context(input_hook(projection.module, partial(receive, layer)))
        for done, piece in enumerate(pieces):  # noqa: B007 (`receive` reads it)
            run_through(architecture, max(state.sums), piece)
    check_called(
        projections.keys() - held.keys(), {layer: projection.name for layer, projection in projections.items()}
    )


def _add(state: Checkpoint, layer: int, keys: Tensor) -> None:
    try:
        with state.adding(layer) as total:
            ops.accumulate_second_moment(total, keys)
    except torch.cuda.OutOfMemoryError as error:  # the sum may hold a part of the keys: no second try
        raise RocrError(f"Memory ran out at layer {layer}: collect fewer layers at a time. {error}") from error


def _finished(total: Tensor, tokens: int, layer: int) -> Tensor:
    ops.symmetrize(total)
    if not torch.isfinite(total.diagonal()).all():
        raise GuardError(f"Some keys of layer {layer} are not finite: the model does not compute on this text.")
    if not total.diagonal().any():
        raise GuardError(f"All keys of layer {layer} are zero: the layer's MLP does nothing on this text.")
    return total.div_(tokens)


def _equal_lengths(batch: list[list[int]]) -> Iterator[list[list[int]]]:
    """Split a batch where the length changes, so that nothing is padded."""
    start = 0
    for i in range(1, len(batch) + 1):
        if i == len(batch) or len(batch[i]) != len(batch[start]):
            yield batch[start:i]
            start = i
