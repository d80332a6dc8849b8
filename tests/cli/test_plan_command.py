"""`rocr plan`: that of `rocr unlearn --dry-run` under a name of its own, and what it recommends."""

import json
from types import SimpleNamespace

import pytest
import torch

from rocr.cli.main import program
from rocr.cli.recommend import added_options, recommended
from rocr.concepts import Concept
from rocr.export.duration import GGUF_SECONDS_OF_TOKEN
from tests.support.models import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
MEASURED = ("seconds", "seconds_of_stages", "free", "basis", "recommended")
"""What differs between two plans of one edit: times of this machine."""


def test_a_plan_takes_the_options_of_unlearn():
    own, of_unlearn = ({p.opts[0] for p in program.commands[name].params} for name in ("plan", "unlearn"))
    assert of_unlearn - own == {"--dry-run", "--overwrite", "--keep-statistics"} and own < of_unlearn


def test_a_plan_is_a_dry_run(files, concept, command, tmp_path):
    more = ("--text", files.text, "--tokens", 200, "--strength", 0.5, "--save", "edit", "--json")
    plan, dry = (
        command(*words, files.model, *concept, *more, "--out", tmp_path / "out")
        for words in (("plan",), ("unlearn", "--dry-run"))
    )
    assert plan.code == dry.code == 0, plan.errors + dry.errors
    found, expected = json.loads(plan.output), json.loads(dry.output)
    assert {n: v for n, v in found.items() if n not in MEASURED} == {
        n: v for n, v in expected.items() if n not in MEASURED
    }
    assert not list(tmp_path.iterdir())
    assert found["seconds"]["total"] == pytest.approx(sum(found["seconds_of_stages"].values()))


def test_a_list_without_redirects_is_planned_with_chosen_ones(files, command, tmp_path):
    (tmp_path / "list.txt").write_text("Ada Byron\nBlaise Pascal -> a gardener\n", encoding="utf-8")
    done = command("plan", files.model, tmp_path / "list.txt", "--layers", "1", "--json")
    assert done.code == 0, done.errors
    layers, redirect, statistics = json.loads(done.output)["recommended"]
    default = layers["text"].split(",")[0]
    assert "in place of 1" in layers["text"] and layers["options"][0] == "--layers" and default.isdigit()
    assert "1 of 2 concepts" in redirect["text"] and redirect["options"] == ["--redirect", "auto"]
    assert statistics["options"][0] == "--keep-statistics"
    assert "add to the command line --layers" in done.errors
    refused = command("unlearn", files.model, tmp_path / "list.txt", "--dry-run")
    assert refused.code == 2, "the run itself chooses none unasked"


def test_what_is_as_recommended_adds_nothing(files, concept, command):
    done = command("plan", files.model, *concept[:4], "--statistics", files.statistics, "--json")
    assert done.code == 0, done.errors
    assert [each["options"] for each in json.loads(done.output)["recommended"]] == [[], [], []]


@pytest.mark.parametrize(("more", "counted"), [((), True), (("--variants", "none"), False)])
def test_a_plan_counts_the_keys_of_other_spellings(files, command, more, counted):
    arguments = ("--concept", "Augusta Byron", "--redirect", "Blaise Pascal", "--statistics", files.statistics)
    done = command("plan", files.model, *arguments, *more)
    assert done.code == 0, done.errors
    assert ("keys of other spellings (--variants)" in done.output) == counted


def test_long_lists_are_advised_to_take_more_text(model):
    from rocr.model.architecture import find_architecture
    from rocr.model.layers import layers_by_default

    architecture = find_architecture(model)
    job = SimpleNamespace(
        architecture=architecture,
        layers=layers_by_default(architecture),
        statistics=None,
        texts=[],
        text_tokens=lambda: 8192,
    )
    arguments = SimpleNamespace(keep_statistics="kept")
    for count, says in ((24, False), (25, True)):
        advice = recommended(arguments, [Concept(f"P {i}", "a gardener") for i in range(count)], job, 12.0)
        assert ("--tokens 100000" in advice[2].text) == says
        assert added_options(advice) == []


def test_the_loading_of_a_gguf_file_is_counted(make_model, tokenizer, concept, command, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    write_gguf(make_model("Llama", intermediate_size=64), tokenizer, tmp_path / "m.gguf", "F32")
    done = command("plan", tmp_path / "m.gguf", *concept, "--json")
    assert done.code == 0, done.errors
    assert json.loads(done.output)["seconds_of_stages"]["load"] > len(tokenizer) * GGUF_SECONDS_OF_TOKEN


@pytest.mark.parametrize(("more", "sparse"), [((), 1), (("--fill-zeros",), 0), (("--keep-zeros",), 2)])
def test_the_bits_of_kept_zeros_are_counted(make_model, tokenizer, concept, command, tmp_path, more, sparse):
    """One of two edited weights is half zeros, the other has a single zero, which only --keep-zeros keeps."""
    model = make_model("Llama", intermediate_size=256)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[:, ::2] = 0
        model.get_parameter("model.layers.2.mlp.down_proj.weight")[0, 0] = 0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = (tmp_path / "model", *concept, "--tokens", 100, "--save", "edit", "--retain-weight", 0, *more)
    done = command("plan", *given, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.errors
    plan = json.loads(done.output)
    assert plan["sparse"] == sparse
    done = command("unlearn", *given, "--out", tmp_path / "out")
    assert done.code == 0, done.errors
    layers = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["layers"]
    assert sum("which it keeps" in layer["metric"] for layer in layers) == sparse
    rows, columns = model.get_parameter("model.layers.1.mlp.down_proj.weight").shape
    dense = (
        json.loads(command("plan", *given, "--fill-zeros", "--json").output)["written"]["edit"] if not more else None
    )
    assert dense is None or plan["written"]["edit"] == dense + rows * columns // 8
