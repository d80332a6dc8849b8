"""Edit a model that does not fit into memory, and measure the bytes that `rocr unlearn` reads, holds and writes.

    python benches/large_model.py --gigabytes 8 --folder /tmp

The model has the shape of a Llama 3 model (8B by default) with as many layers as the size allows. Its random bfloat16
weights are written layer by layer and never held in memory. The statistics are random too, because the quality of the
edit is not measured. The script prints a Markdown table and removes all files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rocr.model.architecture import find_architecture
from rocr.model.fingerprint import fingerprint
from rocr.model.load import find_model
from rocr.model.load_partial import load_partial, needed_tensors
from rocr.model.weight_files import find_weight_files
from rocr.statistics.statistics import Statistics

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "test": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
}
SHARD_BYTES = 5 * 10**9
NOISE_NUMBERS = 2**24
CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from rocr.cli import main
import rocr.unlearn, rocr.model.load_partial, transformers.models.llama.modeling_llama

def number(file, name):
    return int(Path(file).read_text().split(name)[1].split()[0])

def watch():
    global own
    while not done.wait(0.02):
        own = max(own, number("/proc/self/status", "RssAnon:"))

before, held = number("/proc/self/io", "rchar:"), number("/proc/self/status", "VmRSS:")
own = first = number("/proc/self/status", "RssAnon:")
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
code = main(json.loads(sys.argv[1]))
seconds = time.perf_counter() - started
done.set()
watcher.join()
found = {
    "code": code,
    "read": number("/proc/self/io", "rchar:") - before,
    "peak": (number("/proc/self/status", "VmHWM:") - held) * 1024,
    "own": (own - first) * 1024,
    "seconds": seconds,
}
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the model on the disk")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--layers", default="4,5,6", help="layers to edit")
    parser.add_argument("--folder", type=Path, help="folder for the model (default: the system's temporary folder)")
    arguments = parser.parse_args()
    layers = tuple(map(int, arguments.layers.split(",")))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        base = Path(folder)
        size = make_model(base / "model", SHAPES[arguments.shape], arguments.gigabytes * 1e9, max(layers) + 2)
        needed, moments = make_statistics(base / "model", layers, base / "statistics")
        found = run(base, arguments.layers)
        written = sum(path.stat().st_size for path in (base / "out").iterdir() if path.stat().st_nlink == 1)
    depth, size_in_all = size
    # "read by calls" includes the files with edited tensors, read to be copied, and the copies, read to be hashed.
    print(
        "| model, GB | layers | edited | loaded part, GB | statistics, GB | read by calls, GB | anonymous memory, GB "
        "| with mapped files, GB | written, GB | seconds |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    cells = [needed, moments, found["read"], found["own"], found["peak"], written]
    shown = " | ".join(f"{cell / 1e9:.2f}" for cell in cells)
    print(f"| {size_in_all / 1e9:.2f} | {depth} | {arguments.layers} | {shown} | {found['seconds']:.1f} |")


def make_model(folder: Path, shape: dict[str, int], size: float, least: int) -> tuple[int, int]:
    """Write a model of about `size` bytes; return its number of layers and its size in bytes."""
    folder.mkdir()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    head = [
        (f"model.{name}", rows) for name, rows in (("embed_tokens.weight", [len(tokenizer), shape["hidden_size"]]),)
    ]
    layer_bytes = sum(2 * _numbers(rows) for _, rows in layer_tensors(0, shape))
    depth = max(least, round(size / layer_bytes))
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=depth, dtype="bfloat16", tie_word_embeddings=False, **shape
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tail = [("model.norm.weight", [shape["hidden_size"]]), ("lm_head.weight", [len(tokenizer), shape["hidden_size"]])]
    parts = [head, *(layer_tensors(layer, shape) for layer in range(depth)), tail]
    needed = sum(2 * _numbers(rows) for part in parts for _, rows in part)
    if shutil.disk_usage(folder).free < 1.5 * needed:
        raise SystemExit(
            f"{folder} has too little free space for a model of {needed / 1e9:.1f} GB and its edited copy; choose "
            "another --folder or fewer --gigabytes."
        )
    weight_map: dict[str, str] = {}
    noise = torch.randn(NOISE_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, tensors in enumerate(_shards(parts)):
        name = f"model-{number:05d}.safetensors"
        write_shard(folder / name, tensors, noise)
        weight_map |= {tensor: name for tensor, _ in tensors}
    index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return depth, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def layer_tensors(layer: int, shape: dict[str, int]) -> list[tuple[str, list[int]]]:
    """Return names and shapes of the tensors of a Llama layer."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": [width, width],
        "self_attn.k_proj": [keys, width],
        "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, width],
        "mlp.gate_proj": [inner, width],
        "mlp.up_proj": [inner, width],
        "mlp.down_proj": [width, inner],
        "input_layernorm": [width],
        "post_attention_layernorm": [width],
    }
    return [(f"model.layers.{layer}.{name}.weight", rows) for name, rows in shapes.items()]


def write_shard(path: Path, tensors: Sequence[tuple[str, list[int]]], noise: torch.Tensor) -> None:
    """Write tensors of random bfloat16 numbers, taken from one block of noise at a different offset for each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, rows in tensors:
        header[name] = {"dtype": "BF16", "shape": rows, "data_offsets": [offset, offset + 2 * _numbers(rows)]}
        offset += 2 * _numbers(rows)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = memoryview(noise.view(torch.uint8).numpy())
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, rows in tensors:
            left, start = 2 * _numbers(rows), 2 * (hash_of(name) % NOISE_NUMBERS)
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def make_statistics(model: Path, layers: Sequence[int], out: Path) -> tuple[int, int]:
    """Write second moments of random keys; return the bytes of the loaded part of the model, and of the moments."""
    loaded = load_partial(find_model(str(model)), max(layers))
    architecture = find_architecture(loaded.model)
    width = architecture.down_projection(layers[0]).weight.shape[1]
    moment = torch.zeros(width, width)
    keys = torch.randn(256, width, generator=torch.Generator().manual_seed(1))
    torch.addmm(moment, keys.T, keys, alpha=1 / 256, out=moment)
    moment.diagonal().add_(1.0)
    moment = moment.tril() + moment.tril(-1).T
    mark = fingerprint(architecture, loaded.tokenizer, max(layers))
    Statistics(dict.fromkeys(layers, moment), 256, "random", mark).save(out)
    files = find_weight_files(model)
    assert files is not None
    needed = sum(stored.size for stored in needed_tensors(files, architecture, max(layers)))
    return needed, 4 * width * width * len(layers)


def run(base: Path, layers: str) -> dict[str, Any]:
    """Edit the model in a child process; return the bytes that it read and held, and its seconds."""
    concept = ["--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--force", "--partial", "--layers", layers]
    given = ["unlearn", str(base / "model"), *concept, "--statistics", str(base / "statistics")]
    command = [sys.executable, "-c", CHILD, json.dumps([*given, "--out", str(base / "out")]), str(base / "found")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((base / "found").read_text())
    if found["code"] != 0:
        raise SystemExit(found["code"])
    return found


def _shards(parts: Sequence[list[tuple[str, list[int]]]]) -> Iterator[list[tuple[str, list[int]]]]:
    """Yield the tensors of parts in groups of about SHARD_BYTES, one for each file."""
    group: list[tuple[str, list[int]]] = []
    size = 0
    for part in parts:
        own = sum(2 * _numbers(rows) for _, rows in part)
        if group and size + own > SHARD_BYTES:
            yield group
            group, size = [], 0
        group = group + part
        size += own
    yield group


def hash_of(name: str) -> int:
    """Return a hash of a name that is the same in every run."""
    return int.from_bytes(name.encode()[-8:], "little") * 2654435761 + len(name) * 40503


def _numbers(rows: Sequence[int]) -> int:
    return rows[0] * (rows[1] if len(rows) > 1 else 1)


if __name__ == "__main__":
    main()
