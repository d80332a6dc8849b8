"""`rocr unlearn --dry-run` against the run itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rocr.export.duration import Speed, measure_speed
from rocr.export.forecast import UNDO_SHARE
from rocr.model.architecture import find_architecture
from rocr.model.hub import parameters_on_meta

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
WRITTEN, READ, HELD = 0.03, 1.25, 2.0
"""How far a dry run may be from the run: a share of the bytes written, and factors of bytes read and memory held."""
CONCEPT = ("--concept", "Ada Byron", "--redirect", "a gardener", "--layers", "2,3", "--force")
REAL = """
import io, json, re, sys
from contextlib import redirect_stdout
from pathlib import Path
import torch
from own_memory import OwnMemory
from rocr.cli import main
torch.set_num_threads(1)
def number(file, name):
    return int(re.search(name + r":\\s+(\\d+)", Path(file).read_text())[1])
def run(*more):
    with redirect_stdout(io.StringIO()) as output:
        assert main([*sys.argv[1:], *more, "--json"]) == 0
    return json.loads(output.getvalue())
plan = run("--dry-run")
read = number("/proc/self/io", "rchar")
with OwnMemory() as memory:
    run()
print(json.dumps({"plan": plan, "read": number("/proc/self/io", "rchar") - read - memory.read, "held": memory.peak}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer, make_model, files):
    """A model of 8 layers and some 50 MB in files of 2 MB, so that parts of it weigh more than what surrounds them."""
    folder = tmp_path_factory.mktemp("models") / "large"
    sizes = {"hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 8, "initializer_range": 0.02}
    make_model("Llama", **sizes).save_pretrained(folder, max_shard_size="2MB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="measures the process as Linux does")
@pytest.mark.parametrize("partial", ["--partial", pytest.param("--whole", marks=pytest.mark.slow)])
def test_it_says_what_the_run_then_does(partial, large, files, tmp_path):
    out = tmp_path / "out"
    arguments = ("unlearn", large, *CONCEPT, "--text", files.text, partial, "--no-answers", "--out", out)
    arguments += ("--retain-weight", 0)  # which names a model is asked to retain is not known before it is read
    given = ("--save", "model,edit,lora,originals")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    script = [sys.executable, "-c", REAL, *map(str, arguments + given)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    plan = found["plan"]
    planned = {what: sum(plan[what].values()) for what in ("read", "held", "written")}
    inputs = [*out.rglob("*")]
    links = [path for path in inputs if path.is_file() and path.stat().st_nlink > 1]
    written = sum(path.stat().st_size for path in inputs if path.is_file() and path not in links)
    assert abs(planned["written"] - written) <= WRITTEN * written
    assert plan["linked"] == len([path for path in links if path.parent == out])
    # A whole model is mapped into memory, which the system does not count as read.
    mapped = plan["read"]["model"] if partial == "--whole" else 0
    assert 1 / READ <= planned["read"] / (found["read"] + mapped) <= READ
    assert 1 / HELD <= planned["held"] / found["held"] <= HELD
    assert plan["seconds"].keys() == {"total"} and plan["seconds"]["total"] > 0 and "Measured now" in plan["basis"]


def test_nothing_is_made_and_a_small_disk_is_refused(files, concept, command, digests, tmp_path, monkeypatch):
    before = digests(files.model)
    arguments = ("unlearn", files.model, *concept, "--text", files.text, "--out", tmp_path / "out", "--dry-run")
    done = command(*arguments)
    assert done.code == 0, done.errors
    for word in ("model.layers.1.mlp.down_proj.weight (32, 48)", "hard links: 0", "free now", "are an estimate"):
        assert word in done.output
    monkeypatch.setattr("rocr.io.disk_space.SPARE_BYTES", 2**60)
    done = command(*arguments)
    assert done.code == 2 and "MiB are needed; nothing was written" in done.errors
    assert not list(tmp_path.iterdir())
    assert digests(files.model) == before


def test_a_beginning_that_takes_much_of_the_memory_stays_in_its_files(files, concept, command, tmp_path, monkeypatch):
    arguments = ("unlearn", files.model, *concept, "--statistics", files.statistics, "--partial", "--json")
    found = {}
    for memory in (2**50, 2**10):
        monkeypatch.setattr("rocr.model.load_partial.free_memory", lambda memory=memory: memory)
        out = tmp_path / str(memory)
        plan = command(*arguments, "--out", out, "--dry-run")
        assert plan.code == 0, plan.errors
        assert ("mapped from the model's files" in plan.errors + plan.output) == (memory == 2**10)
        plan = json.loads(plan.output)
        assert (plan["mapped"] > 0) == (plan["held"]["model"] == 0) == (memory == 2**10)
        done = command(*arguments, "--out", out)
        assert done.code == 0, done.errors
        found[memory] = (out / "model.safetensors").read_bytes()
    assert found[2**50] == found[2**10]


def test_what_the_run_would_refuse_is_refused(files, concept, command, tmp_path):
    for more in (("--layers", "9"), ("--layers", "1", "--partial")):
        done = command("unlearn", files.model, *concept, *more, "--out", tmp_path / "out", "--dry-run")
        assert done.code == 2, done.output
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    done = command("unlearn", tmp_path / "model", *concept, "--out", tmp_path / "out", "--dry-run")
    assert done.code == 2 and "Traceback" not in done.errors


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT-2"])
def test_speed_is_measured_and_leaves_model_and_random_state_alone(family, make_model):
    with parameters_on_meta():
        architecture = find_architecture(make_model(family))
    state = torch.get_rng_state()
    for dtype in UNDO_SHARE:
        speed = measure_speed(architecture, dtype)
        assert min(speed.layer, speed.step) > 0 and speed.products > 1e6
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.device.type == "meta" for parameter in architecture.model.parameters())


def test_seconds_are_those_of_the_layers_that_run(files, command, tmp_path, monkeypatch):
    """With a second per token and layer and all else free, seconds count tokens times layers."""
    speed = Speed(layer=1.0, step=0.0, products=1e30)
    monkeypatch.setattr("rocr.export.duration.measure_speed", lambda architecture, dtype: speed)
    monkeypatch.setattr("rocr.export.duration.DISK_BYTES_PER_SECOND", 1e30)

    def seconds(*more):
        common = ("unlearn", files.model, *CONCEPT, "--whole", "--out", tmp_path / "out", "--dry-run", "--json")
        done = command(*common, *more)
        assert done.code == 0, done.errors
        return json.loads(done.output)["seconds"]["total"]

    text = ("--text", files.text, "--no-answers")
    few, many = (seconds(*text, "--tokens", tokens) for tokens in (100, 300))
    assert many - few == 200 * 4, "statistics of the layers 2 and 3 run the first four"
    answers = [seconds(*text[:2], "--tokens", 100, "--answer-tokens", tokens) - few for tokens in (8, 16)]
    assert 0 < answers[0] < answers[1] < 2 * answers[0]
    assert seconds("--no-answers", "--tokens", 100) > few, "the model writes its own text"
    kept = [
        seconds(*text[:2], "--tokens", 100, "--retain-weight", weight, *no)
        for weight in (0, 1)
        for no in ((), text[2:])
    ]
    assert kept[2] - kept[0] > kept[3] - kept[1] > 0, "names that it may harm are read, and asked about with answers"
