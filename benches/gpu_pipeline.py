"""Benches of whole stages with random weights in the shape of Llama-3-8B: statistics, and many concepts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from gpu_kernels import CHECKED_COLUMNS, add_by_torch
from gpu_timing import Row, Times, interleave, relative_error
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rocr
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.capture import input_hook, run_through

LAYERS = (4, 5, 6)
WORDS = [
    first + last for first in ("ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "su") for last in "bdfglmnprst"
]
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TEMPLATES = 6
OFFICIAL_SEQUENCE = 512
ROUNDS = 2
"""Rounds of a stage, which takes seconds; the check of its errors is its warm-up."""


def make_tokenizer() -> Any:
    """Return a tokenizer with one token for each of WORDS."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<?>", ".", ",", "?", ":", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<?>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<?>",
        chat_template=template,
    )


def make_model(device: torch.device, depth: int, tiny: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a Llama with random weights on the device."""
    config = LlamaConfig(
        vocab_size=128, num_hidden_layers=depth, max_position_embeddings=2048, **(TINY if tiny else LLAMA)
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


def random_texts(seed: int) -> Iterator[str]:
    """Yield documents of random words without end."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(WORDS, k=400)) + " ."


class ExactMoments:
    """Float64 sums k kᵀ of the inputs of a model's down-projections, in CHECKED_COLUMNS columns."""

    def __init__(self, architecture: Architecture, skipped: int, limit: int) -> None:
        """Initialise the sums with 0.

        Args:
            architecture: Architecture of the model.
            skipped: Number of tokens at the start of every sequence that are left out.
            limit: Maximum number of tokens to sum.
        """
        self._skipped, self._limit = skipped, limit
        weight = architecture.down_projection(LAYERS[0]).weight
        self.columns = torch.randperm(weight.shape[1], device=weight.device)[:CHECKED_COLUMNS]
        self._sums = {
            layer: torch.zeros(weight.shape[1], len(self.columns), dtype=torch.float64, device=weight.device)
            for layer in LAYERS
        }
        self._tokens = dict.fromkeys(LAYERS, 0)
        self._architecture = architecture

    def _add(self, layer: int, keys: Tensor) -> None:
        rows = keys[:, self._skipped :].flatten(0, 1)[: self._limit - self._tokens[layer]]
        self._tokens[layer] += len(rows)
        self._sums[layer] += rows.double().T @ rows[:, self.columns].double()

    def error(self, collect: Callable[[], dict[int, Tensor]]) -> float:
        """Return the largest relative error over all layers of the sums that `collect` returns."""
        with ExitStack() as stack:
            for layer in LAYERS:
                module = self._architecture.down_projection(layer).module
                stack.enter_context(input_hook(module, partial(self._add, layer)))
            sums = collect()
        return max(relative_error(sums[layer][:, self.columns], self._sums[layer]) for layer in LAYERS)


def statistics(device: torch.device, tokens: int, official_tokens: int, tiny: bool = False) -> list[Row]:
    """Time the second moments of three layers by rocr, by one pass with hooks, and by the authors' pass for each layer.

    The authors' loop runs on fewer tokens; times are scaled to the tokens of rocr. Errors are measured on few tokens.
    """
    tokenizer = make_tokenizer()
    model = make_model(device, max(LAYERS) + 1, tiny)
    wide_model = make_model(device, max(LAYERS) + 1, tiny, torch.float32)
    architecture, wide_architecture = find_architecture(model), find_architecture(wide_model)
    shape = (tokens // 8192 or 1, min(16, tokens // 32), OFFICIAL_SEQUENCE if tokens >= 8192 else 32)
    batches = torch.randint(7, 100, shape)
    official_rows = batches.flatten(0, 1)[: max(1, official_tokens // batches.shape[2])]
    width = architecture.down_projection(LAYERS[0]).weight.shape[1]

    def ours(tokens: int) -> dict[int, Tensor]:
        options = rocr.CollectOptions(tokens=tokens)
        found = rocr.collect_statistics(model, tokenizer, random_texts(0), LAYERS, options)
        return {layer: found.second_moment(layer) * found.tokens for layer in LAYERS}

    def hooks(batches: Tensor) -> dict[int, Tensor]:
        totals = {layer: torch.zeros(width, width, device=device) for layer in LAYERS}
        for batch in batches:
            _collect(architecture, batch, {layer: partial(_add, totals[layer]) for layer in LAYERS}, max(LAYERS))
        return totals

    def official(rows: Tensor) -> dict[int, Tensor]:
        totals = {layer: torch.zeros(width, width, device=device) for layer in LAYERS}
        for layer in LAYERS:
            for row in rows:
                _collect(wide_architecture, row[None], {layer: partial(_add_in_float32, totals[layer])}, layer)
        return totals

    few = min(official_tokens, 8192)
    error = {
        "rocr": ExactMoments(architecture, skipped=1, limit=few).error(lambda: ours(few)),
        "one pass with hooks": ExactMoments(architecture, 0, few).error(lambda: hooks(batches[:1, : few // shape[2]])),
        # Passes for later layers run through earlier ones again; the limit leaves out these keys.
        "official": ExactMoments(wide_architecture, 0, official_rows.numel()).error(lambda: official(official_rows)),
    }
    functions: dict[str, Callable[[int], object]] = {
        "rocr": lambda _: ours(tokens),
        "one pass with hooks": lambda _: hooks(batches),
        "official": lambda _: official(official_rows),
    }
    times = interleave(functions, device, rounds=ROUNDS, warm_up=False)
    run = {"rocr": tokens, "one pass with hooks": batches.numel(), "official": official_rows.numel()}
    scaled = {name: _times(each, tokens / run[name]) for name, each in times.items()}
    rate = {f"{name} microseconds a token": each.median / tokens * 1e6 for name, each in scaled.items()}
    size = f"layers 4 to 6, {tokens} tokens" + (" (tiny)" if tiny else "")
    note = (
        f"tokens that were run: {run}; rocr's time includes tokenizer and hashes; errors are of {few} tokens, "
        "against float64 sums of the same keys"
    )
    return [
        Row("statistics", size, scaled, "rocr", "official", 5, 10, error, rate, note),
        Row("statistics", size, scaled, "rocr", "one pass with hooks", 1.1, 1.4, error, rate, note),
    ]


def thousand_concepts(device: torch.device, count: int, official_count: int, tiny: bool = False) -> list[Row]:
    """Time many concepts in one edit with given statistics, against the authors' edits of single concepts.

    The authors' time is measured on `official_count` concepts and scaled.
    """
    tokenizer = make_tokenizer()
    model = make_model(device, 8 if tiny else 32, tiny)
    architecture = find_architecture(model)
    draw = random.Random(1)
    pairs = draw.sample([(first, last) for first in WORDS for last in WORDS if first != last], count + 1)
    names = [f"{first} {last}" for first, last in pairs]
    concepts = [rocr.Concept(name, names[-1]) for name in names[:count]]
    gathered = rocr.CollectOptions(tokens=min(32768, 200 if tiny else 32768))
    known = rocr.collect_statistics(model, tokenizer, random_texts(2), LAYERS, gathered)
    config = rocr.EditConfig(layers=LAYERS)
    guards = rocr.Guards(force=True)
    # The authors' code keeps the projectors in the memory of the host.
    width = architecture.down_projection(LAYERS[0]).weight.shape[1]
    projectors = {layer: torch.eye(width) for layer in LAYERS}

    def ours() -> rocr.Edit:
        edit = rocr.unlearn(model, tokenizer, concepts, known, config, guards=guards)
        edit.revert(model)
        return edit

    def official() -> None:
        for concept in concepts[:official_count]:
            _official_edit(architecture, tokenizer, concept.name, projectors)

    key, residual, update = _official_edit(architecture, tokenizer, concepts[0].name, projectors)
    key, residual = key.double(), residual.double()
    exact = residual.T @ key.T / (key.square().sum() + 1)  # the projectors are identities
    error = {"rocr": _edit_error(ours(), known), "official": relative_error(update, exact)}
    functions: dict[str, Callable[[int], object]] = {"rocr": lambda _: ours(), "official": lambda _: official()}
    times = interleave(functions, device, rounds=ROUNDS, warm_up=False)
    scaled = {"rocr": times["rocr"], "official": _times(times["official"], count / official_count)}
    size = f"{count} concepts, layers 4 to 6" + (" (tiny)" if tiny else "")
    note = (
        f"official: {official_count} concepts were run, their time scaled; guards off, as the weights are random; "
        "errors are of the updates, against float64 from the same keys, residuals and statistics"
    )
    return [Row("unlearn", size, scaled, "rocr", "official", 300, 1000, error, {}, note)]


def _edit_error(edit: rocr.Edit, known: rocr.Statistics) -> float:
    """Return the largest relative error of an edit's updates over all layers."""
    errors = []
    for update, measures in zip(edit.updates, edit.report.layers, strict=True):
        keys, residuals = update.keys.double(), update.residuals.double()
        moment = known.second_moment(update.layer).to(keys)
        inverse_metric = moment * (edit.config.gamma / moment.diagonal().mean())
        inverse_metric.diagonal().add_(1.0)
        product = torch.linalg.solve(inverse_metric, keys.T).T
        system = keys @ product.T
        system.diagonal().add_(measures.ridge)
        exact = residuals.T @ torch.linalg.solve(system, product)
        errors.append(relative_error(update.factors.left.double() @ update.factors.right.double(), exact))
    return max(errors)


def _collect(
    architecture: Architecture, tokens: Tensor, receivers: dict[int, Callable[[Tensor], None]], last: int
) -> None:
    """Run tokens (batch, length) through layers 0 to `last`, and call each receiver with the keys of its layer."""
    with ExitStack() as stack:
        for layer, receive in receivers.items():
            stack.enter_context(input_hook(architecture.down_projection(layer).module, receive))
        run_through(architecture, last, tokens)


def _add(total: Tensor, keys: Tensor) -> None:
    add_by_torch(total, keys.reshape(-1, keys.shape[-1]))


def _add_in_float32(total: Tensor, keys: Tensor) -> None:
    rows = keys.reshape(-1, keys.shape[-1]).float()
    total += rows.T @ rows


def _official_edit(
    architecture: Architecture, tokenizer: Any, name: str, projectors: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Edit one concept as the authors do: two passes for each layer (key and state), and the dense (d_in, d_in) solve.

    Returns:
        Key (d_in, 1), residual (1, d_out) and update (d_out, d_in) of the last layer.
    """
    tokens = tokenizer([f"{name} ."] * TEMPLATES, return_tensors="pt")["input_ids"]
    for layer, projector in projectors.items():
        found: list[Tensor] = []
        _collect(
            architecture, tokens, {layer: lambda keys, found=found: found.append(keys[:, -1].float().mean(0))}, layer
        )
        run_through(architecture, max(projectors), tokens)
        weight = architecture.down_projection(layer).weight
        key = found[0][:, None]
        residual = torch.randn(1, weight.shape[0], device=weight.device)
        identity = torch.eye(len(key), device=weight.device)
        system = projector.to(weight.device) @ (key @ key.T) + identity
        update = torch.linalg.solve(system, projector.to(weight.device) @ key @ residual)
        weight + update.T.to(
            weight.dtype
        )  # out of place as in the authors' code; the sum is discarded, so that every round edits the same model
    return key, residual, update.T


def _times(times: Times, factor: float) -> Times:
    return Times(times.median * factor, times.p20 * factor, times.p80 * factor, times.rounds)
