"""The rows of whole stages, at the shape of Llama-3-8B with random weights: statistics, and many concepts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_kernels import add_by_torch
from gpu_timing import Row, Times, interleave
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rocr
from rocr.architectures import Architecture, find_architecture
from rocr.capture import input_hook, run_through

LAYERS = (4, 5, 6)
WORDS = [
    first + last for first in ("ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "su") for last in "bdfglmnprst"
]
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TEMPLATES = 6
OFFICIAL_SEQUENCE = 512


def make_tokenizer() -> Any:
    """A tokenizer that knows WORDS, one token each."""
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
    """A random Llama on the device."""
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
    """Documents of random words, without end."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(WORDS, k=400)) + " ."


def statistics(device: torch.device, tokens: int, official_tokens: int, tiny: bool = False) -> list[Row]:
    """Second moments of three layers: rocr, one pass with hooks and addmm, and the official pass for each layer.

    The official loop runs on fewer tokens; all times are scaled to those of rocr.
    """
    tokenizer = make_tokenizer()
    model = make_model(device, max(LAYERS) + 1, tiny)
    wide_model = make_model(device, max(LAYERS) + 1, tiny, torch.float32)
    architecture, wide_architecture = find_architecture(model), find_architecture(wide_model)
    batches = torch.randint(7, 100, (tokens // 8192 or 1, min(16, tokens // 32), 512 if tokens >= 8192 else 32))
    width = architecture.down_projection(LAYERS[0]).weight.shape[1]
    options = rocr.CollectOptions(tokens=tokens)

    def ours() -> None:
        rocr.collect_statistics(model, tokenizer, random_texts(0), LAYERS, options)

    def hooks() -> None:
        totals = {layer: torch.zeros(width, width, device=device) for layer in LAYERS}
        for batch in batches:
            _collect(architecture, batch, {layer: partial(_add, totals[layer]) for layer in LAYERS}, max(LAYERS))

    def official() -> None:
        for layer in LAYERS:
            total = torch.zeros(width, width, device=device)
            for row in batches.flatten(0, 1)[: max(1, official_tokens // batches.shape[2])]:
                _collect(wide_architecture, row[None], {layer: partial(_add_in_float32, total)}, layer)

    functions: dict[str, Callable[[int], object]] = {
        "rocr": lambda _: ours(),
        "one pass with hooks": lambda _: hooks(),
        "official": lambda _: official(),
    }
    times = interleave(functions, device, rounds=3, few=("official",))
    rows_of_official = max(1, official_tokens // batches.shape[2])
    run = {"rocr": tokens, "one pass with hooks": batches.numel(), "official": rows_of_official * batches.shape[2]}
    scaled = {name: _times(each, tokens / run[name]) for name, each in times.items()}
    rate = {f"{name} microseconds a token": each.median / tokens * 1e6 for name, each in scaled.items()}
    size = f"layers 4 to 6, {tokens} tokens" + (" (tiny)" if tiny else "")
    note = f"tokens that were run: {run}; rocr's time holds its tokenizer and its hashes"
    return [
        Row("statistics", size, scaled, "rocr", "official", 5, 10, {}, rate, note),
        Row("statistics", size, scaled, "rocr", "one pass with hooks", 1.1, 1.4, {}, rate, note),
    ]


def thousand_concepts(device: torch.device, count: int, official_count: int, tiny: bool = False) -> list[Row]:
    """Many concepts at once, statistics given, against the authors' one at a time, which is measured on a few."""
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
    # The authors keep the projectors on the host.
    width = architecture.down_projection(LAYERS[0]).weight.shape[1]
    projectors = {layer: torch.eye(width) for layer in LAYERS}

    def ours() -> None:
        rocr.unlearn(model, tokenizer, concepts, known, config, guards=guards).revert(model)

    def official() -> None:
        for concept in concepts[:official_count]:
            _official_edit(architecture, tokenizer, concept.name, projectors)

    functions: dict[str, Callable[[int], object]] = {"rocr": lambda _: ours(), "official": lambda _: official()}
    times = interleave(functions, device, rounds=2, few=("official",))
    scaled = {"rocr": times["rocr"], "official": _times(times["official"], count / official_count)}
    size = f"{count} concepts, layers 4 to 6" + (" (tiny)" if tiny else "")
    note = f"official: {official_count} concepts were run, their time scaled; guards off, as the weights are random"
    return [Row("unlearn", size, scaled, "rocr", "official", 300, 1000, {}, {}, note)]


def _collect(
    architecture: Architecture, tokens: Tensor, receivers: dict[int, Callable[[Tensor], None]], last: int
) -> None:
    """Run tokens (batch, length) through layers 0 to last, and give each receiver its layer's keys."""
    hooks = [input_hook(architecture.down_projection(layer).module, each) for layer, each in receivers.items()]
    for hook in hooks:
        hook.__enter__()
    try:
        run_through(architecture, last, tokens)
    finally:
        for hook in hooks:
            hook.__exit__(None, None, None)


def _add(total: Tensor, keys: Tensor) -> None:
    add_by_torch(total, keys.reshape(-1, keys.shape[-1]))


def _add_in_float32(total: Tensor, keys: Tensor) -> None:
    rows = keys.reshape(-1, keys.shape[-1]).float()
    total += rows.T @ rows


def _official_edit(architecture: Architecture, tokenizer: Any, name: str, projectors: dict[int, Tensor]) -> None:
    """One concept: for each layer a pass for the key and one for the state, and the dense (d_in, d_in) solve."""
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
        weight + update.T.to(weight.dtype)  # out of place, as there; not kept, so that every round edits one model


def _times(times: Times, factor: float) -> Times:
    return Times(times.median * factor, times.p20 * factor, times.p80 * factor, times.rounds)
