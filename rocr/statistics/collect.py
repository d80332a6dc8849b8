"""Collect the second moments of keys from text, in one pass over all layers up to the last wanted one."""

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

from rocr.argument_checks import TEXTS, check_kind, check_layers, check_list, check_reader
from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.io.dtypes import dtype_name
from rocr.model.architecture import Architecture, find_architecture, positions_of
from rocr.model.blocks import find_blocks
from rocr.model.capture import check_called, run_through
from rocr.model.causality import check_writes, with_kind
from rocr.model.chat import with_date
from rocr.model.fingerprint import down_projection_digests, fingerprint
from rocr.model.layers import check_blocks, layers_by_default
from rocr.model.smaller_batches import retry_with_smaller_batch
from rocr.model.tensor_parallel import is_parallel
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent
from rocr.statistics.batch import FIRST_TOKENS, LayerCollector
from rocr.statistics.checkpoint import Checkpoint
from rocr.statistics.corpus import closed_sequences, pack_tokens, token_batches
from rocr.statistics.distributed import Distributed
from rocr.statistics.provenance import Provenance, computed_with, versions_now
from rocr.statistics.self_generated import sample_sequences
from rocr.statistics.statistics import MixtureMoments, Statistics
from rocr.statistics.sums import LayerSums

DEFAULT_SAMPLED_TOKENS = 8_192
MAX_SAMPLED_TOKENS = 2**20
"""Maximum number of tokens that the model writes: it writes all sequences at once, so memory grows with them."""
SECONDS_BETWEEN_CHECKPOINTS = 60.0
NO_TEXT = (
    "write the text of its own statistics. Give texts like those that it reads, such as prompts of an image generator: "
    "rocr.collect_statistics(model, tokenizer, texts, layers), or --text FILE."
)


@dataclass(frozen=True)
class CollectOptions:
    """How text is cut into sequences and read.

    Attributes:
        tokens: Maximum number of keys to collect. None is all of the text, or 8,192 if the model writes the text.
        length: Number of tokens of a sequence, at most the number of positions of the model. The key of the first
            token of each sequence is left out, since that token is an attention sink.
        batch_tokens: Number of tokens that are run together.
        seed: Seed of the text that the model writes.
        text_sha256: Identifier of the text. None hashes the texts while they are read.
        text_bytes: Size of the text in bytes, for the estimate of the remaining time. None: unknown.
        checkpoint: Path of the checkpoint of an interrupted collection. It requires `text_sha256`. With several
            processes, each one writes `<checkpoint>.<rank>-of-<size>`.
        distributed: Whether the processes of an initialised torch.distributed group share the work. All of them must
            then call with the same model, text and options, and all of them get the result.
        chat: Inputs of the chat template for text that the model writes, half of which are chats.

    Raises:
        InputError: A value is out of its range, or a checkpoint is given without `text_sha256`.
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
            raise InputError(f"length must be at least 2, since the first token is left out, not {self.length}.")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens must be at least 1, not {self.tokens}.")
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, not {self.batch_tokens}.")
        if self.checkpoint is not None and self.text_sha256 is None:
            raise InputError("A checkpoint needs text_sha256, to detect that it is resumed with another text.")


@plain_arithmetic()
def collect_statistics(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    layers: Sequence[int] | None = None,
    options: CollectOptions | None = None,
    progress: ProgressCallback = silent,
) -> Statistics:
    """Collect the second moments of the keys of a model on ordinary text.

    For each layer, the result is C = sum(k kᵀ) / tokens over the inputs k (d_in,) of the down-projection:
    (d_in, d_in), float32, not centred. No float32 accumulator sums more than 8,192 tokens.

    In a torch.distributed process group, each process runs a share of the batches, and the sums of all processes are
    added in float64 at the end. The result equals that of a single process up to rounding.

    Args:
        model: A causal language model of transformers with dense MLPs or experts, or a text encoder or
            encoder-decoder, which reads each document as a text of its own, with the tokens that its tokenizer puts
            around it.
        tokenizer: The tokenizer of the model.
        texts: The documents. None is text that the model itself writes, drawn with `options.seed`; an encoder cannot
            write any.
        layers: The decoder layers whose keys are collected. None is the layers that are edited by default.
        options: How the text is cut into sequences and read. None is `CollectOptions()`.
        progress: Called after every batch.

    Returns:
        The statistics, with the fingerprint of the model and with how the text was read.

    Raises:
        InputError: An argument is of another type, such as a single text in place of a list; or a layer does not exist
            or cannot be edited, the text is empty, more tokens are wanted than the model can write, the model is an
            encoder and there are no texts, or the checkpoint is that of another collection.
        GuardError: Keys are not finite, or all keys of a layer are zero.
        RocrError: Another process failed or is lost; the checkpoints are kept.

    Source:
        The second moment of keys is that of ROME (arXiv 2202.05262, eq. 2), from ordinary text.
    """
    check_reader(model, tokenizer, progress)
    check_list("texts", texts, str, TEXTS, True, "Pass texts=[text], or one text for each document of a file.")
    check_layers("layers", layers)
    check_kind("options", options, CollectOptions, "a rocr.CollectOptions", optional=True)
    options = options or CollectOptions()
    if texts is None:
        check_sampled(options.tokens)
        options = replace(options, chat=with_date(options.chat, tokenizer))
    # The processes of a tensor-parallel model run every batch together.
    is_shared = options.distributed and not is_parallel(model)
    distributed = Distributed.default_group() if is_shared else Distributed()
    source = _Source(texts, options, distributed)
    with distributed.collective():
        architecture = find_architecture(model)
        chosen = tuple(sorted(layers)) if layers is not None else layers_by_default(architecture)
        if not chosen:
            raise InputError("layers is empty: give the numbers of the decoder layers whose keys are to be collected.")
        blocks = check_blocks(architecture, chosen)
        sums = {layer: LayerSums.zeros(blocks[layer]) for layer in chosen}
        mark = fingerprint(architecture, tokenizer, max(chosen))
        dtype, device = dtype_name(blocks[max(chosen)].dtype), blocks[max(chosen)].device.type
        before = down_projection_digests(architecture, max(chosen))
        architecture = with_kind(architecture, max(chosen))
        if texts is None:
            check_writes(architecture, NO_TEXT)
    identity = {
        # Without the name, since the model may have been moved.
        "model": [mark.model, mark.layer, mark.tokenizer, list(before)],
        "text": source.name(),
        "layers": list(chosen),
        "cut": [options.tokens, options.length, options.batch_tokens],
        # Keys of one sum must be computed in the same way.
        "computed": [dtype, device, computed_with(model), versions_now()],
    }
    distributed.check_same("models, texts, layers or options", identity)
    with distributed.collective():
        state = Checkpoint.open(distributed.checkpoint(options.checkpoint), identity | distributed.share(), sums)
    saved_at = time.monotonic()
    try:
        resumed, finished = 0, state.batches
        for number, batch in enumerate(source.batches(architecture, tokenizer, progress)):
            done = batch.before + batch.count
            if number // distributed.size < finished:
                resumed = done
            elif distributed.owns(number):
                state.finish_batch(_accumulate(architecture, state, batch))
                progress(Progress("statistics", done, source.estimate(done), "tokens", resumed))
                if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                    state.save()
                    saved_at = time.monotonic()
            if distributed.ends_round(number):
                distributed.barrier()
        distributed.barrier(finished=True)
        distributed.check_same("texts", source.name())
        tokens = sum(distributed.gather(state.tokens))
        if tokens == 0:
            raise InputError(
                f"The text gave no tokens to collect: {source.documents} documents of {source.bytes} bytes. Give more "
                "text."
            )
        if distributed.size > 1:
            state.close()
            for layer in chosen:
                distributed.sum_layer(sums[layer])
    except BaseException as error:
        state.save()
        distributed.broadcast_error(error)
        raise
    means = {layer: total.finished(tokens, layer) for layer, total in sums.items()}
    moments = {layer: moment for layer, moment in means.items() if isinstance(moment, Tensor)}
    mixtures = {layer: moment for layer, moment in means.items() if isinstance(moment, MixtureMoments)}
    read = replace(source.provenance(dtype, computed_with(model)), down_projections=before)
    return Statistics(moments, tokens, source.name(), mark, read, mixtures)


def check_sampled(tokens: int | None) -> None:
    """Raise InputError if a model is to write more than 1,048,576 tokens, which it writes all at once."""
    if tokens is not None and tokens > MAX_SAMPLED_TOKENS:
        raise InputError(
            f"Without text files, the model writes at most {MAX_SAMPLED_TOKENS:,} tokens of text itself, not {tokens:,}"
            ": give text files (--text), or fewer tokens (--tokens)."
        )


@dataclass(frozen=True)
class _Batch:
    """Sequences of equal length.

    Attributes:
        sequences: Token ids.
        before: Number of keys of all batches before it.
        count: Number of keys to collect, from the beginning of the batch; first tokens do not count.
    """

    sequences: list[list[int]]
    before: int
    count: int


@dataclass
class _Source:
    """The text, which is counted and hashed while it is read."""

    texts: Iterable[str] | None
    options: CollectOptions
    distributed: Distributed
    length: int = 2
    documents: int = 0
    bytes: int = 0
    tokenised: int = 0
    packed: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def batches(self, architecture: Architecture, tokenizer: Any, progress: ProgressCallback) -> Iterator[_Batch]:
        """Yield the batches of all processes, up to the wanted number of tokens."""
        options = self.options
        if self.texts is None:
            wanted = options.tokens or DEFAULT_SAMPLED_TOKENS
            # Processes on other hardware may draw other tokens.
            written = self.distributed.from_first(
                sample_sequences(architecture.reader, tokenizer, wanted, options.seed, progress, options.chat)
            )
            self.length, self.documents = max(map(len, written)), len(written)
            sequences: Iterable[list[int]] = written
        else:
            self.length = min(options.length, positions_of(architecture.model) or options.length)
            vocabulary = len(architecture.embedding.weight)  # type: ignore[arg-type]
            if architecture.kind.writes_text:
                sequences = pack_tokens(
                    self._counted(self.texts), tokenizer, self.length, vocabulary, self._count_tokenised
                )
            else:
                sequences = closed_sequences(self._counted(self.texts), tokenizer, self.length, self._count_tokenised)
        before = 0
        for batch in token_batches(sequences, options.batch_tokens):
            if options.tokens is not None and before >= options.tokens:
                return
            ordered = batch if architecture.kind.writes_text else sorted(batch, key=len)
            for part in _equal_lengths(ordered):
                self.packed += sum(map(len, part))
                count = sum(len(sequence) - FIRST_TOKENS for sequence in part)
                if options.tokens is not None:
                    count = min(count, options.tokens - before)
                yield _Batch(part, before, count)
                before += count

    def name(self) -> str:
        """Return the identifier of the text for the statistics."""
        if self.texts is None:
            return f"written by the model, seed {self.options.seed}" + self.options.chat.described()
        return self.options.text_sha256 or self.digest.hexdigest()

    def provenance(self, dtype: str, config: dict[str, Any]) -> Provenance:
        """Return how the text was read; valid after all batches."""
        return Provenance(dtype, self.length, FIRST_TOKENS, config, self.documents, versions_now())

    def estimate(self, tokens: int) -> int | None:
        """Return the estimated total number of tokens, from the bytes read so far; None: unknown.

        Args:
            tokens: Number of tokens collected. More may be tokenised: documents are tokenised in batches.
        """
        if self.texts is None:
            return self.options.tokens or DEFAULT_SAMPLED_TOKENS
        known = None
        if self.options.text_bytes and self.bytes:
            waiting, unread = max(0, self.tokenised - self.packed), max(0, self.options.text_bytes - self.bytes)
            known = round(tokens + waiting + unread * self.tokenised / self.bytes)
        return min(filter(None, (known, self.options.tokens)), default=None)

    def _count_tokenised(self, tokens: int) -> None:
        self.tokenised += tokens

    def _counted(self, texts: Iterable[str]) -> Iterator[str]:
        for index, text in enumerate(texts):
            check_kind(f"texts[{index}]", text, str, "a text")
            encoded = text.encode("utf-8", "surrogatepass")
            self.digest.update(len(encoded).to_bytes(8, "little") + encoded)
            self.documents += 1
            self.bytes += len(encoded)
            yield text


def _accumulate(architecture: Architecture, state: Checkpoint, batch: _Batch) -> int:
    """Add the keys of a batch to the sums, and return their number."""
    if batch.count == 0:
        return 0
    retry_with_smaller_batch(partial(_accumulate_pieces, architecture, state, batch), len(batch.sequences))
    return batch.count


def _accumulate_pieces(architecture: Architecture, state: Checkpoint, batch: _Batch, size: int) -> None:
    """Run a batch in pieces of `size` sequences. Each layer's keys are added in one step, after the last piece."""
    collectors = [
        LayerCollector(state, blocks, batch.count) for blocks in find_blocks(architecture, state.unfinished()).values()
    ]
    pieces = torch.split(torch.tensor(batch.sequences), size)  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        for each in collectors:
            stack.enter_context(each.hook())
        for number, piece in enumerate(pieces):
            for each in collectors:
                each.begin(number, piece.shape, is_last=number == len(pieces) - 1)
            run_through(architecture, max(state.sums), piece)
    names = {each.layer.layer: each.layer.name for each in collectors}
    check_called([each.layer.layer for each in collectors if each.is_done], names)


def _equal_lengths(batch: list[list[int]]) -> Iterator[list[list[int]]]:
    """Split a batch into runs of sequences of equal length, so that no padding is needed."""
    start = 0
    for i in range(1, len(batch) + 1):
        if i == len(batch) or len(batch[i]) != len(batch[start]):
            yield batch[start:i]
            start = i
