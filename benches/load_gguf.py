"""Time the loading of GGUF files: the demo model, and a generated one with a vocabulary as large as Gemma's.

`python benches/load_gguf.py` prints, for each file, seconds of wall time and processor time of a new process for the
configuration, the tokenizer, the whole model, and in total with its imports. `--plain` also times the readers of the
packages gguf and transformers without the changes of rocr. `--out FILE` writes the numbers with machine and versions.
The generated file has the tokens, scores and types of a SentencePiece vocabulary of 262,144 entries, about 6,000 of
them control tokens, and a tiny gemma3 model with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from machine import commit, cpu_name

from rocr.demo import demo_model

TOKENS, CONTROLS, WIDTH, MIDDLE = 262_144, 6_242, 64, 128
TIMED = """
import json, sys, time
from contextlib import nullcontext
begun = time.perf_counter(), time.process_time()
from rocr.model import hub
from rocr.model.load import find_model, load_model
source, plain = find_model(sys.argv[1]), sys.argv[2] == "plain"
if plain:
    hub.fast_reader = nullcontext
found = {}
def timed(name, run):
    start = time.perf_counter(), time.process_time()
    run()
    found[name] = [time.perf_counter() - start[0], time.process_time() - start[1]]
def parts(name):
    with hub.loading(source) as library:
        timed(name, getattr(library, name))
import torch, transformers
found["imports"] = [time.perf_counter() - begun[0], time.process_time() - begun[1]]
timed("model and tokenizer", lambda: load_model(source))
found["process"] = [time.perf_counter() - begun[0], time.process_time() - begun[1]]
parts("config")
parts("tokenizer")
print(json.dumps(found))
"""


def vocabulary() -> tuple[list[str], list[int]]:
    """Return tokens and their types; each piece of a word concatenates two shorter ones, as merges require."""
    rng = random.Random(0)
    kinds = gguf.TokenType
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{i}>" for i in range(CONTROLS))]
    types = [kinds.CONTROL] * len(tokens)
    runs = ["\n" * length for length in range(1, 32)] + ["▁" * length for length in range(2, 32)]
    tokens += runs + [f"<0x{byte:02X}>" for byte in range(256)]
    types += [kinds.USER_DEFINED] * len(runs) + [kinds.BYTE] * 256
    pieces = ["▁", *"etaoinshrdlcumwfgypbvkjxqz"]
    tokens += pieces + [chr(letter) for letter in range(0x4E00, 0x4E00 + 8_000)]
    seen = set(tokens)
    while len(tokens) < TOKENS:
        first, second = (pieces[rng.randrange(min(len(pieces), 4_000))] for _ in range(2))
        if "▁" not in second and len(first + second) < 15 and first + second not in seen:
            seen.add(first + second)
            tokens.append(first + second)
            pieces.append(first + second)
    return tokens, types + [kinds.NORMAL] * (TOKENS - len(types))


def write_large(path: Path) -> None:
    """Write a tiny gemma3 model with random weights and a vocabulary of 262,144 entries."""
    tokens, types = vocabulary()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(TOKENS)])
    writer.add_token_types(types)
    for add, token in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2)):
        add(token)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    shapes = {"token_embd": (TOKENS, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(2):
        attention = {"q": (WIDTH, WIDTH), "k": (16, WIDTH), "v": (16, WIDTH), "output": (WIDTH, WIDTH)}
        shapes |= {f"blk.{layer}.attn_{name}": shape for name, shape in attention.items()}
        shapes |= {f"blk.{layer}.attn_{name}_norm": (16,) for name in "qk"}
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        shapes |= {f"blk.{layer}.{name}": (WIDTH,) for name in norms}
        feed_forward = {"gate": (MIDDLE, WIDTH), "up": (MIDDLE, WIDTH), "down": (WIDTH, MIDDLE)}
        shapes |= {f"blk.{layer}.ffn_{name}": shape for name, shape in feed_forward.items()}
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.05 * numbers.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: Path, how: str) -> dict[str, list[float]]:
    """Return the seconds of wall time and processor time of each step, in a new process."""
    done = subprocess.run([sys.executable, "-c", TIMED, str(path), how], capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return {step: [round(seconds, 2) for seconds in pair] for step, pair in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="also time the readers of the packages themselves")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_large(Path(folder) / "large.gguf")
        files = {"SmolLM2-135M (49,152 tokens)": demo_model(), "gemma3 (262,144 tokens)": Path(folder) / "large.gguf"}
        for name, path in files.items():
            for how in ("quick", "plain") if arguments.plain else ("quick",):
                results[f"{name}, {how}"] = found = measure(path, how)
                print(
                    f"{name}, {how}: " + ", ".join(f"{s} {wall:.1f} s ({cpu:.1f})" for s, (wall, cpu) in found.items())
                )
    if arguments.out:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit()}
        machine |= {package: version(package) for package in ("torch", "transformers", "tokenizers", "gguf")}
        report = {"machine": machine, "seconds of wall and processor": results}
        arguments.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
