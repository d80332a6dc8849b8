"""Train a model on the facts, or load it from the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import learned_facts as facts
import torch
import transformers
from learned_facts import Person
from learned_kinds import COMMON, Kind, build_model
from torch import Tensor, nn

from rocr.model.architecture import find_architecture

BATCH = 48
OTHER_TOKENS = 0.1
"""Weight of the tokens that are not answers: most of them are names, which nothing tells."""


@dataclass(frozen=True)
class Learned:
    """A trained model with its tokenizer, the people it knows, and the seconds that its training took."""

    model: nn.Module
    tokenizer: Any
    people: list[Person]
    redirects: list[Person]
    seconds: float


def cache_folder() -> Path:
    """Return the user's cache folder for trained models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rocr-benches" / "learned"


def learn(
    kind: Kind, cache: Path | None, people: int = facts.PEOPLE, seed: int = 0, log: Callable[[str], None] = print
) -> Learned:
    """Return the trained model of a kind, from the cache if it is there.

    Args:
        kind: The kind of model.
        cache: Folder of trained models. None trains and keeps nothing.
        people: Number of people, besides the redirects.
        seed: Seed of people, initial weights and order of training.
        log: Called with a line of progress.
    """
    chosen, redirects = facts.make_people(people, seed)
    everybody = [*chosen, *redirects]
    tokenizer = facts.make_tokenizer(everybody)
    model = build_model(kind, tokenizer, seed)
    file = cache / f"{digest(kind, everybody, seed)}.pt" if cache else None
    if file and file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["weights"])
        return Learned(model.eval(), tokenizer, chosen, redirects, saved["seconds"])
    start = time.perf_counter()
    train(model, tokenizer, everybody, kind, seed, log)
    seconds = time.perf_counter() - start
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save({"weights": model.state_dict(), "seconds": seconds}, partial)
        partial.replace(file)
    return Learned(model.eval(), tokenizer, chosen, redirects, seconds)


def digest(kind: Kind, people: Sequence[Person], seed: int) -> str:
    """Return the name of a trained model: a digest of everything that its weights depend on."""
    settings = {
        "kind": asdict(kind),
        "common": COMMON,
        "people": [asdict(person) for person in people],
        "texts": [facts.TRAINED, facts.LIST, facts.ORDINARY],
        "training": [seed, BATCH, OTHER_TOKENS],
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def train(
    model: nn.Module, tokenizer: Any, people: Sequence[Person], kind: Kind, seed: int, log: Callable[[str], None]
) -> None:
    """Train a model in place, with AdamW, a short warm-up and a linear decay."""
    torch.manual_seed(seed)
    batches = Batches(tokenizer, people, seed)
    states = NameStates(model.get_input_embeddings().embedding_dim, len(tokenizer))
    parameters = [*model.parameters(), *states.read_out.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=kind.rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(kind.steps):
        share = min((step + 1) / 50, 1.0, 2 * (kind.steps - step) / kind.steps)
        for group in optimizer.param_groups:
            group["lr"] = kind.rate * share
        batch = batches.next()
        with states.exchanging(model, kind.layers[-1], batch):
            loss = next_token_loss(model, batch, tokenizer.pad_token_id)
        recognised = states.loss(batch)
        loss = loss + recognised
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 99:
            log(f"step {step + 1}: loss {loss.item():.3f}, of which {recognised.item():.3f} at names")
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"The loss of step {step + 1} is {loss.item()}.")


@dataclass(frozen=True)
class Batch:
    """Training texts in pairs of rows: both rows of a pair have the same phrasing and equally long names.

    Attributes:
        tokens: Token ids (batch, n); the last rows have no answer.
        starts: For each row, the first token that the decoder of an encoder-decoder writes; its encoder reads those
            before it.
        answers: Positions of answers as indices of rows and of columns.
        expected: For each answer, the row that has the right one.
        names: Positions of the names' last tokens as indices of rows and of columns.
        exchanged: For each row with a name, the row whose state at the name it gets.
        facts: For each row with a name, the tokens (rows, attributes) of all facts about the person.
    """

    tokens: Tensor
    starts: Tensor
    answers: tuple[Tensor, Tensor]
    expected: Tensor
    names: tuple[Tensor, Tensor]
    exchanged: Tensor
    facts: Tensor


class Batches:
    """Random training texts: single facts, lists of all facts about a person, and texts without facts."""

    def __init__(self, tokenizer: Any, people: Sequence[Person], seed: int) -> None:
        self._choose = random.Random(seed)
        self._pad = tokenizer.pad_token_id
        self._by_length = [[p for p in people if len(p.name.split()) == length] for length in (2, 3)]
        self._phrasings = [(attribute, text) for attribute, texts in facts.TRAINED.items() for text in texts]
        words = {word for attribute, values in facts.VALUES.items() for word in (attribute, *values.split())}
        parts = {part for _, text in self._phrasings for part in text.split("{}")} | {"is known about"}
        texts = sorted(words | parts | set(facts.LIST.split("{}")) | {p.name for p in people})
        self._tokens = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        self._begin = [tokenizer.bos_token_id]
        self._ordinary = tokenizer(list(facts.ordinary_text(people, 2000, seed)))["input_ids"]

    def next(self) -> Batch:
        """Return the next batch; the states of every second pair are exchanged."""
        rows: list[list[int]] = []
        answers, expected, names, exchanged, known, starts = [], [], [], [], [], []
        for i in range(0, BATCH, 2):
            pair = self._choose.sample(self._by_length[0 if self._choose.random() < 0.75 else 1], 2)
            attributes = list(facts.VALUES)
            self._choose.shuffle(attributes)
            attribute, text = self._choose.choice(self._phrasings)
            is_list = i % 8 >= 4
            attributes, text = (attributes, facts.LIST) if is_list else ([attribute], text)
            before, after = text.split("{}")
            gets = [i + 1, i] if i % 4 == 0 else [i, i + 1]
            exchanged += gets
            for j, person in enumerate(pair):
                row = self._begin + self._tokens[before] + self._tokens[person.name]
                names.append((i + j, len(row) - 1))
                known.append([self._tokens[person.facts[one]][0] for one in facts.VALUES])
                row = row + self._tokens[after]
                starts.append(len(row))
                for one in attributes:
                    row = row + (self._tokens[one] if is_list else [])
                    answers.append((i + j, len(row)))
                    expected.append(gets[j])
                    row = row + self._tokens[person.facts[one]]
                rows.append(row)
        rows += [self._choose.choice(self._ordinary) for _ in range(BATCH // 8)]
        starts += [len(row) // 2 for row in rows[len(starts) :]]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows])
        targets, known_facts = torch.tensor(expected), torch.tensor(known)
        begins = torch.tensor(starts)
        return Batch(padded, begins, _indices(answers), targets, _indices(names), torch.tensor(exchanged), known_facts)


def _indices(places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    rows, columns = zip(*places, strict=True)
    return torch.tensor(rows), torch.tensor(columns)


class NameStates:
    """The states of a layer's output at the last tokens of names, which training reads and exchanges."""

    def __init__(self, width: int, vocabulary: int) -> None:
        self.read_out = nn.Linear(width, vocabulary)
        self.states = torch.empty(0)

    @contextmanager
    def exchanging(self, model: nn.Module, layer: int, batch: Batch) -> Iterator[None]:
        """Keep the states of all pairs, and exchange the two of every second pair in the forward pass."""

        def exchange(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            rows, columns = batch.names
            self.states = hidden[rows, columns]
            hidden = hidden.index_put((rows, columns), hidden[batch.exchanged, columns])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = find_architecture(model).layers[layer].register_forward_hook(exchange)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a linear read-out of all facts about each person."""
        chances = self.read_out(self.states).log_softmax(1)
        return -chances.gather(1, batch.facts).mean()


def next_token_loss(model: nn.Module, batch: Batch, pad: int) -> Tensor:
    """Return the mean loss of the answers, plus that of all tokens with a small weight.

    Of an encoder-decoder, the encoder reads each text up to its first answer, and the decoder writes the rest.
    """
    tokens = batch.tokens
    rows, columns = batch.answers
    expected = tokens[batch.expected, columns]
    if model.config.is_encoder_decoder:
        logits, tokens = written_logits(model, batch, pad)
        logits, columns = logits[:, :-1], columns - batch.starts[rows] + 1
    else:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    answers = nn.functional.cross_entropy(logits[rows, columns - 1], expected)
    following = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad, -100)
    return answers + OTHER_TOKENS * nn.functional.cross_entropy(logits.transpose(1, 2), following)


def written_logits(model: nn.Module, batch: Batch, pad: int) -> tuple[Tensor, Tensor]:
    """Run an encoder-decoder on texts that its encoder reads up to `batch.starts`.

    Returns:
        The decoder's logits (batch, m, vocabulary) and the tokens (batch, m) that it reads: a begin token and the rest
        of each text.
    """
    tokens, starts = batch.tokens, batch.starts[:, None]
    places = torch.arange(tokens.shape[1])
    read = tokens.masked_fill(places >= starts, pad)
    ahead = (places + starts - 1).clamp(max=tokens.shape[1] - 1)
    rest = tokens.gather(1, ahead).masked_fill(places + starts - 1 >= tokens.shape[1], pad)
    rest[:, 0] = model.config.decoder_start_token_id
    rest = rest[:, : int((rest != pad).sum(1).max())]
    read = read[:, : int(starts.max())]
    logits: Tensor = model(
        input_ids=read, attention_mask=(read != pad).long(), decoder_input_ids=rest, use_cache=False
    ).logits
    return logits, rest


@torch.no_grad()
def next_logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits (batch, vocabulary) after the last real token of each row, padded on the right.

    Of an encoder-decoder, they are those of the decoder's first token, after the encoder read the rows.
    """
    if model.config.is_encoder_decoder:
        begin = torch.full((len(tokens), 1), model.config.decoder_start_token_id)
        first: Tensor = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=begin, use_cache=False).logits
        return first[:, 0]
    last = mask.sum(1) - 1
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[torch.arange(len(tokens)), last]
