"""Read ordinary text from files and pack it into token sequences, as a stream."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.model.tokenizer import calling_tokenizer, closing_tokens, opening_tokens, tokenize

_TXT_PIECE = 2**20  # a line of more bytes, and a paragraph of more characters, becomes several documents
_JSONL_LINE_BYTES = 64 * 2**20
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")

Paths = Iterable[str | os.PathLike[str]]


def read_texts(paths: Paths) -> Iterator[str]:
    """Yield the documents of text files, one file after the other.

    A document is a paragraph of a `.txt` file (paragraphs are separated by blank lines, and split if they have more
    than a million characters), the field `text` of a line of a `.jsonl` file, or a row of the column `text` of a
    `.parquet` file.

    Raises:
        InputError: A file cannot be read or has another extension, its text is not UTF-8, or a `text` is missing. The
            message gives file and line. It is raised when the stream reaches the error; `check_texts` finds most
            errors at once.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in map(Path, paths):
        read = readers.get(path.suffix.lower())
        if read is None:
            raise InputError(f"{path} is not a text file for rocr: its name must end in {', '.join(readers)}.")
        try:
            if not path.is_file():
                flaw = "is a folder or a device; give a text file" if path.exists() else "does not exist"
                raise InputError(f"{path} {flaw}.")
            yield from read(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def check_texts(paths: Paths) -> None:
    """Read the first document of every file, to report errors before a model is loaded.

    Raises:
        InputError: There are no files, or files are missing, unreadable, empty or of another kind; the message names
            all of them.
    """
    paths = list(paths)
    if not paths:
        raise InputError("No text files were given: give at least one.")
    problems: list[str] = []
    for path in paths:
        try:
            if next(read_texts([path]), None) is None:
                problems.append(f"{path} holds no text.")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def text_digest(paths: Paths) -> str:
    """Return the sha256 (hex) of the files' bytes in order, each file followed by its length in 8 bytes."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        length = 0
        try:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
                    length += len(block)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
        digest.update(length.to_bytes(8, "little"))
    return digest.hexdigest()


def pack_tokens(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    vocabulary: int | None = None,
    tokenised: Callable[[int], None] | None = None,
) -> Iterator[list[int]]:
    """Yield sequences of `length` tokens of the documents, which are joined by the end-of-text token.

    Every sequence begins with one BOS token if the tokenizer adds one to a text, and with none otherwise. The last
    sequence may be shorter; it is left out if it has fewer than 2 tokens.

    Args:
        texts: The documents.
        tokenizer: The tokenizer of the model.
        length: Number of tokens of a sequence, at least 2.
        vocabulary: Number of tokens that the model embeds. None: unknown. The end-of-text token of a tokenizer that
            was converted from a GGUF file can lie beyond them; documents are then joined without it.
        tokenised: Called with the number of tokens of documents, when they are tokenised.

    Raises:
        InputError: The length is below 2, or the tokenizer fails.
    """
    if length < 2:
        raise InputError(f"A sequence of {length} tokens is too short: give a length of at least 2.")
    start = _start_token(tokenizer)
    head = [] if start is None else [start]
    separator = _end_of_text(tokenizer, vocabulary)
    room = length - len(head)
    pending: list[int] = []
    follows = False
    for tokens in _tokenised(texts, tokenizer, tokenised):
        if follows and separator is not None:
            pending.append(separator)
        pending += tokens
        follows = True
        position = _after_start(pending, 0, start)
        while len(pending) - position >= room:
            yield head + pending[position : position + room]
            position = _after_start(pending, position + room, start)
        del pending[:position]
    if len(head) + len(pending) >= 2:
        yield head + pending


def closed_sequences(
    texts: Iterable[str], tokenizer: Any, length: int, tokenised: Callable[[int], None] | None = None
) -> Iterator[list[int]]:
    """Yield each document as a sequence of its own, between the tokenizer's opening and closing tokens.

    A document that does not fit into `length` tokens is cut into several sequences.

    Args:
        texts: The documents.
        tokenizer: The tokenizer of a text encoder.
        length: Maximum number of tokens of a sequence.
        tokenised: Called with the number of tokens of documents, when they are tokenised.

    Raises:
        InputError: The length leaves no room for the text, or the tokenizer fails.
    """
    opening, closing = opening_tokens(tokenizer, ""), closing_tokens(tokenizer)
    room = length - len(opening) - len(closing)
    if room < 1:
        raise InputError(
            f"A sequence of {length} tokens is too short: the tokenizer puts {len(opening) + len(closing)} tokens "
            "around a text."
        )
    for tokens in _tokenised(texts, tokenizer, tokenised):
        for start in range(0, len(tokens), room):
            sequence = [*opening, *tokens[start : start + room], *closing]
            if len(sequence) >= 2:
                yield sequence


def token_batches(sequences: Iterable[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Yield batches of at least one sequence, with at most `budget` tokens if they have several.

    Raises:
        InputError: The budget is below 1.
    """
    if budget < 1:
        raise InputError(f"A token budget of {budget} is too small: give at least 1.")
    batch: list[list[int]] = []
    tokens = 0
    for sequence in sequences:
        if batch and tokens + len(sequence) > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(sequence)
        tokens += len(sequence)
    if batch:
        yield batch


def _start_token(tokenizer: Any) -> int | None:
    """Return the BOS token if the tokenizer adds it to a text; None otherwise."""
    with calling_tokenizer(tokenizer):
        start: int | None = tokenizer.bos_token_id
        return start if start is not None and tokenizer("a")["input_ids"][:1] == [start] else None


def _end_of_text(tokenizer: Any, vocabulary: int | None) -> int | None:
    """Return the token that ends a document: an end-of-text token, or else EOS, which ends a turn in chat models."""
    with calling_tokenizer(tokenizer):
        for text in _END_OF_TEXT:
            token: int | None = tokenizer.convert_tokens_to_ids(text)
            if token is None or tokenizer.convert_ids_to_tokens(token) != text:
                continue
            if vocabulary is None or token < vocabulary:
                return token
        end: int | None = tokenizer.eos_token_id
    return end


def _after_start(tokens: list[int], position: int, start: int | None) -> int:
    """Return the position after any BOS tokens of the text itself at the beginning of a sequence."""
    while start is not None and position < len(tokens) and tokens[position] == start:
        position += 1
    return position


def _tokenised(texts: Iterable[str], tokenizer: Any, tokenised: Callable[[int], None] | None) -> Iterator[list[int]]:
    """Yield the tokens of each document that has any. Documents are tokenised in batches, for speed."""
    for batch in _document_batches(texts):
        found = tokenize(tokenizer, batch)
        if tokenised is not None:
            tokenised(sum(map(len, found)))
        yield from filter(None, found)


def _document_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield batches of documents, limited in their number and their characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _lines(path: Path, limit: int) -> Iterator[tuple[int, str, bool]]:
    """Yield (line number from 1, text with its line end, whether it is the whole line).

    A line of more than `limit` bytes is yielded in pieces of that size.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, offset = 1, 0
    with path.open("rb") as file:
        while True:
            piece = file.readline(limit)
            undecoded = len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x} at offset {offset - undecoded + error.start:,}"
                raise InputError(f"{path}:{number}: is not UTF-8: {byte} ({error.reason})") from None
            if not piece:
                return
            ended = piece.endswith(b"\n")
            yield number, text.removeprefix("\ufeff") if offset == 0 else text, ended or len(piece) < limit
            offset += len(piece)
            number += ended


def _read_txt(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    characters = 0
    for _, line, _ in _lines(path, _TXT_PIECE):
        blank = not line.strip()
        if not blank:
            paragraph.append(line.replace("\r\n", "\n"))
            characters += len(line)
        if paragraph and (blank or characters >= _TXT_PIECE):
            yield "".join(paragraph).removesuffix("\n")
            paragraph, characters = [], 0
    if paragraph:
        yield "".join(paragraph).removesuffix("\n")


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line, whole in _lines(path, _JSONL_LINE_BYTES):
        if not whole:
            raise InputError(f"{path}:{number}: is longer than {_JSONL_LINE_BYTES // 2**20} MiB; split the document.")
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()
        except json.JSONDecodeError as error:
            flaw = f"is not valid JSON: {error.msg} at character {error.colno}"
        except UnicodeEncodeError:
            flaw = "field 'text' holds half of a surrogate pair, which is not valid text"
        except RecursionError:
            flaw = "is nested too deeply"
        except (KeyError, TypeError, AttributeError, ValueError):
            flaw = "must be an object with a field 'text' whose value is text"
        else:
            if text.strip():
                yield text
            continue
        raise InputError(f"{path}:{number}: {flaw}")


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path} cannot be read without pyarrow: pip install 'rocr[parquet]'") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise InputError(f"{path} has no column 'text', but {', '.join(file.schema_arrow.names)}.")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise InputError(
                            f"{path}: row {row:,} of the column 'text' holds {type(text).__name__}, not text."
                        )
                    if text.strip():
                        yield text
    except (ArrowException, ValueError) as error:
        raise InputError(f"{path} cannot be read as parquet after row {row:,}: {error}") from error
