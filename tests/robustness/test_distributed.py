"""Two processes in the environment of torchrun: shared statistics, and a model spread over them by its parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

import rocr
from tests.support.forks import end_of, start_fork

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
ROUNDING = 2e-6  # float32 sums in another order, relative to the largest entry; at most 3e-7 was measured
SCRIPT = """
import contextlib, io, json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
import rocr
from rocr.cli import main
from rocr.model.tensor_parallel import whole
transformers.utils.logging.disable_progress_bar()
given = json.loads(sys.argv[1])
texts, layers, found = given["texts"], [1, 2], {}

def collect(model, texts=texts, together=True, **options):
    return rocr.collect_statistics(
        model,
        tokenizer,
        texts,
        layers,
        rocr.CollectOptions(length=32, batch_tokens=256, distributed=together, **options),
    )

def apart(one, other):
    return max(float((one.moments[l] - other.moments[l]).abs().max() / other.moments[l].abs().max()) for l in layers)

def refusal(action):
    try:
        action()
    except rocr.RocrError as error:
        return f"{type(error).__name__}: {error}"

output = io.StringIO()
with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    found["code"] = main(given["stats"])
found["printed"] = output.getvalue()

# Under a name of its own in the store: there a second group would find the addresses of the first, which are gone.
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", store=dist.PrefixStore("library", store), rank=rank, world_size=size)
plain = AutoModelForCausalLM.from_pretrained(given["model"])
tokenizer = AutoTokenizer.from_pretrained(given["model"])
alone = collect(plain, together=False)
shared = collect(plain)
again = collect(plain)
found["same"] = (shared.tokens, shared.text) == (alone.tokens, alone.text)
found["apart"] = apart(shared, alone)
found["same bytes again"] = all(torch.equal(shared.moments[l], again.moments[l]) for l in layers)
few, few_alone = collect(plain, tokens=700), collect(plain, tokens=700, together=False)
found["limited"] = [few.tokens, few_alone.tokens, apart(few, few_alone)]
sampled, sampled_alone = (collect(plain, None, together, tokens=300) for together in (True, False))
found["sampled"] = [sampled.tokens == sampled_alone.tokens, apart(sampled, sampled_alone)]
found["other text"] = refusal(lambda: collect(plain, texts if rank == 0 else texts[:-1] + ["another text"]))
found["less text"] = refusal(lambda: collect(plain, texts if rank == 0 else texts[:5]))
found["no text"] = refusal(lambda: collect(plain, []))
found["other options"] = refusal(lambda: collect(plain, tokens=100 + rank))

def poisoned(texts):
    for number, text in enumerate(texts):
        if rank == 1 and number == 40:
            raise rocr.GuardError("a key is bad")
        yield text

found["one fails"] = refusal(lambda: collect(plain, poisoned(texts)))
found["and after that"] = apart(collect(plain), alone)  # nobody is out of step

spread = AutoModelForCausalLM.from_pretrained(
    given["model"], distributed_config=transformers.DistributedConfig(tp_plan="auto")
)
weight = spread.model.layers[1].mlp.down_proj.weight
found["own part"] = list(weight.to_local().shape)
by_parts = collect(spread)
found["spread statistics"] = [
    by_parts.tokens == alone.tokens, by_parts.fingerprint == alone.fingerprint, apart(by_parts, alone)
]
concepts = [
    rocr.Concept("Ada Byron", "Blaise Pascal", ("the countess",)), rocr.Concept("Robert Downey Jr.", "a gardener")
]
settings, force = rocr.EditConfig(layers=(1, 2)), rocr.Guards(force=True)
first = {name: whole(p).clone() for name, p in spread.named_parameters()}
places = {name: (p.device, getattr(p, "placements", None)) for name, p in spread.named_parameters()}
edits = [rocr.unlearn(model, tokenizer, concepts, alone, settings, guards=force) for model in (spread, plain)]
found["spread edit"] = {
    name: [float((whole(p) - q).abs().max()), float((q - first[name]).abs().max())]
    for (name, p), q in zip(spread.named_parameters(), plain.parameters()) if not torch.equal(q, first[name])
}
found["before"] = [u.applied.before for u in edits[0].updates] == [u.applied.before for u in edits[1].updates]
found["in place"] = places == {n: (p.device, getattr(p, "placements", None)) for n, p in spread.named_parameters()}
edits[0].revert(spread)
found["reverted"] = all(torch.equal(whole(p), first[name]) for name, p in spread.named_parameters())
edits[1].revert(plain)
edits[1].apply(plain)
edits[1].apply(spread)  # made on a whole model
found["carried over"] = all(torch.equal(whole(p), q) for p, q in zip(spread.parameters(), plain.parameters()))
edits[1].revert(spread)
edits[0].apply(spread)
edits[1].revert(plain)
edits[0].apply(plain)
found["carried back"] = all(torch.equal(whole(p), q) for p, q in zip(spread.parameters(), plain.parameters()))
edits[0].revert(plain)

from torch.distributed.tensor import Shard, distribute_tensor
mlp = plain.model.layers[2].mlp
mlp.down_proj.weight = torch.nn.Parameter(distribute_tensor(mlp.down_proj.weight.data, weight.device_mesh, [Shard(0)]))
found["by rows"] = refusal(lambda: rocr.unlearn(plain, tokenizer, concepts, alone, settings))
with open(f"{given['found']}-{rank}", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def found(files, texts, tmp_path_factory):
    """What each of two processes found."""
    base = tmp_path_factory.mktemp("distributed")
    stats = ["stats", files.model, "--text", files.text, "--layers", "1,2", "--length", "32", "--batch-tokens", "512"]
    given = {
        "model": str(files.model),
        "texts": texts,
        "stats": [*map(str, stats), "--out", str(base / "together")],
        "found": str(base / "found"),
    }
    # As the agent of torchrun does, this process holds the store in which the others find each other.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs, children = [base / f"log-{rank}" for rank in range(2)], []
    for rank, log in enumerate(logs):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment = {name: str(value) for name, value in place.items()}
        children.append(start_fork(SCRIPT, [json.dumps(given)], log, environment))
    assert [end_of(child) for child in children] == [0, 0], [log.read_text()[-5000:] for log in logs]
    return base, [json.loads((base / f"found-{rank}").read_text()) for rank in range(2)]


def test_the_command_in_two_processes_gives_what_one_gives(found, files, command, tmp_path):
    base, ranks = found
    assert [rank["code"] for rank in ranks] == [0, 0]
    assert "tokens at layers 1, 2" in ranks[0]["printed"] and ranks[1]["printed"] == ""
    assert not list(base.glob("together.*"))
    cut = ("--layers", "1,2", "--length", "32", "--batch-tokens", "512")
    assert command("stats", files.model, "--text", files.text, *cut, "--out", tmp_path / "alone").code == 0
    together, alone = (rocr.Statistics.load(path) for path in (base / "together", tmp_path / "alone"))
    assert (together.tokens, together.text, together.fingerprint) == (alone.tokens, alone.text, alone.fingerprint)
    for layer, moment in alone.moments.items():
        assert (together.moments[layer] - moment).abs().max() < ROUNDING * moment.abs().max()


def test_a_process_group_shares_the_text(found):
    for rank in found[1]:
        assert rank["same"] and rank["apart"] < ROUNDING
        assert rank["same bytes again"]
        assert rank["limited"][:2] == [700, 700] and rank["limited"][2] < ROUNDING
        assert rank["sampled"][0] and rank["sampled"][1] < ROUNDING
        assert rank["and after that"] < ROUNDING


def test_processes_that_differ_are_refused_in_all_of_them(found):
    for rank in found[1]:
        assert "different texts: give all of them the same" in rank["other text"]
        assert "did not read as much text as the others" in rank["less text"]
        assert "gave no tokens" in rank["no text"]
        assert "different models, texts, layers or options" in rank["other options"]
    assert found[1][0]["one fails"] == "OtherRankError: Process 1 of 2 stopped: a key is bad"
    assert found[1][1]["one fails"] == "GuardError: a key is bad"


def test_a_model_spread_by_tensor_parallelism_is_edited_where_its_parts_lie(found):
    for rank in found[1]:
        assert rank["own part"] == [32, 24]
        same_tokens, same_fingerprint, apart = rank["spread statistics"]
        assert same_tokens and same_fingerprint and apart < ROUNDING
        assert set(rank["spread edit"]) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
        for difference, moved in rank["spread edit"].values():
            # Parallel sums round otherwise; the solve magnifies that. At most 1e-6 of the movement was measured.
            assert difference < 1e-5 * moved
        assert rank["before"] and rank["in place"] and rank["reverted"] and rank["carried over"]
        assert rank["carried back"]
        assert "Shard(dim=0)" in rank["by rows"] and "Load the model in one process" in rank["by rows"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_the_command_as_the_readme_gives_it(files, processes, tmp_path):
    stats = ("stats", files.model, "--text", files.text, "--layers", "1,2", "--length", "32", "--batch-tokens", "512")
    done = torchrun(processes, "-m", "rocr", *stats, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == processes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = torchrun(processes, "-m", "rocr", *stats, "--out", tmp_path / "out")
    assert again.returncode == 1 and again.stderr.count("exists; choose another name") == 1
