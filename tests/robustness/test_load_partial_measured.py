"""The bytes that `rocr unlearn` reads, holds and writes for a model of 80 layers in as many files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from rocr.model.architecture import find_architecture
from rocr.model.load import find_model
from rocr.model.load_partial import empty_model, needed_tensors
from rocr.model.weight_files import find_weight_files

ROOT = Path(__file__).parents[2]
LAYERS = (4, 5, 6)
SCRIPT = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from own_memory import OwnMemory
from rocr.cli import main

torch.set_num_threads(1)
first, second, out = json.loads(sys.argv[1])
read_files = set()

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        read_files.add(arguments[0])

def number(file, name):
    return int(Path(file).read_text().split(name)[1].split()[0])

assert main(first) == 0  # a model of 3 layers: all code is loaded by now
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what that run had freed would hide what this one takes
sys.addaudithook(hook)
before = number("/proc/self/io", "rchar:")
with OwnMemory() as memory:
    code = main(second)
read = number("/proc/self/io", "rchar:") - before - memory.read
Path(out).write_text(json.dumps({"code": code, "read": read, "peak": memory.peak, "files": sorted(read_files)}))
"""


def save_model(folder, make_model, tokenizer, layers):
    """Write a bfloat16 model of random numbers."""
    config = make_model("Llama", hidden_size=768, intermediate_size=384, num_hidden_layers=1).config
    config.num_hidden_layers, config.dtype = layers, torch.bfloat16
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16().to_empty(device="cpu")
    noise = torch.randn(768 * 768).mul(0.05).bfloat16()  # for every matrix anew would take a minute
    for parameter in model.parameters():
        noise = noise.roll(1009)
        parameter.data = noise[: parameter.numel()].view(parameter.shape).clone()
    model.save_pretrained(folder, max_shard_size="7MB")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def large(make_model, tokenizer, tmp_path_factory):
    """A model of 80 small layers in files of about a layer each, with arbitrary names in arbitrary order."""
    folder = tmp_path_factory.mktemp("large") / "model"
    save_model(folder, make_model, tokenizer, 80)
    place = folder / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    files = sorted(set(index["weight_map"].values()))
    names = [f"{number:x}.safetensors" for number in random.Random(0).sample(range(2**32), len(files))]
    for file, name in zip(files, names, strict=True):
        (folder / file).rename(folder / name)
    entries = [(tensor, names[files.index(file)]) for tensor, file in index["weight_map"].items()]
    random.Random(1).shuffle(entries)
    place.write_text(json.dumps({"metadata": {"total_size": -1}, "weight_map": dict(entries)}))
    return folder


def shards_of(folder, last):
    """Names of the files that hold the embedding and the layers up to the last one, and of the others."""
    files = find_weight_files(folder)
    architecture = find_architecture(empty_model(find_model(str(folder))))
    needed = needed_tensors(files, architecture, last)
    names = {stored.file.name for stored in needed}
    return names, set(files.files) - names, sum(stored.size for stored in needed), files.size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads are counted by Linux")
def test_of_eighty_layers_a_tenth_is_read_and_the_rest_is_linked(
    large, make_model, tokenizer, files, concept, command, tmp_path
):
    names, others, needed, size = shards_of(large, max(LAYERS))
    assert len(names) >= 6 and len(others) > 50
    for name in others:  # whoever parses one of these fails
        content = (large / name).stat().st_size
        (large / name).write_bytes(b"\xff" * content)
    layers = ("--layers", ",".join(map(str, LAYERS)), "--partial")
    statistics = tmp_path / "statistics"
    done = command("stats", large, *layers, "--text", files.text, "--tokens", "4000", "--out", statistics)
    assert done.code == 0, done.errors
    given = ["--statistics", str(statistics), *concept, *layers]
    save_model(tmp_path / "small", make_model, tokenizer, 3)
    collect = ("stats", tmp_path / "small", "--layers", "1,2", "--text", files.text, "--tokens", "4000")
    assert command(*collect, "--out", tmp_path / "small statistics").code == 0
    small = ["unlearn", str(tmp_path / "small"), "--statistics", str(tmp_path / "small statistics"), *concept]
    commands = [
        [*small, "--partial", "--out", str(tmp_path / "small out")],
        ["unlearn", str(large), *given, "--out", str(tmp_path / "out")],
        str(tmp_path / "found"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    child = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(child, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["code"] == 0, done.stderr
    opened = {Path(path).name for path in found["files"] if Path(path).parent == large}
    assert not opened & others and names <= opened
    linked = {name for name in names | others if (tmp_path / "out" / name).samefile(large / name)}
    assert others <= linked and len(linked) >= len(names | others) - len(LAYERS)
    # The digests of what was written are taken from the disk again: that is not of the model.
    written = sum((tmp_path / "out" / name).stat().st_size for name in names - linked)
    read = found["read"] - written
    assert needed <= read <= 0.15 * size, f"{read:,} of {size:,} bytes"
    assert found["peak"] <= 1.3 * read, f"{found['peak']:,} bytes of memory for {read:,} bytes read"
