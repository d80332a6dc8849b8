"""README.md: the blocks of its section "In a pipeline", run in turn on tiny models; its commands and its map."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from rocr.cli.main import program
from rocr.fingerprint import tensor_digest

README = Path(__file__).parents[1] / "README.md"
SECTION = README.read_text(encoding="utf-8").partition("\n## In a pipeline\n")[2].partition("\n## ")[0]
TRANSFORMERS, VLLM, HARNESS, MODELS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
COMMANDS = {"unlearn", "stats", "eval", "compare", "redirects", "apply", "revert", "info", "verify", "doctor"}
PEOPLE = (
    "Ada Byron | the countess",
    "Blaise Pascal -> Robert Downey Jr.",
    "Grace Murray Hopper",
    "Alan Mathison Turing",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, tokenizer, texts):
    """A folder with what the blocks name: a model, two more, text and people."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "people.txt").write_text("\n".join(PEOPLE), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    for seed, name in enumerate(("model", "models/a", "models/b")):
        make_model("Llama", seed=seed, initializer_range=0.1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def run(block, folder, **given):
    """Run a block in a folder; what it defined."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(block, "README.md", "exec"), given)
    finally:
        os.chdir(before)
    return given


@pytest.fixture(scope="module")
def edited(place):
    """What the first block defines; the others use the edit that it saves."""
    return run(TRANSFORMERS, place)


def test_every_command_that_it_shows_has_the_options_that_it_shows():
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in re.findall(r"^(?:.* -m )?rocr (.*)$", block, flags=re.MULTILINE)]
    commands = [shlex.split(line, comments=True) for line in shown]
    for name, *words in commands:
        program.commands[name].make_context(name, words)
    assert {command[0] for command in commands} == COMMANDS


def test_a_transformers_script(edited, place):
    assert max(edited["edit"].report.distance) < 1
    assert {path.name for path in (place / "edited").iterdir()} >= {"config.json", "model.safetensors"}


def test_the_step_before_vllm(edited, place, capsys):
    first, line, _ = VLLM.partition("\nfrom vllm import")
    assert line
    compile(VLLM, "README.md", "exec")
    run(first, place)
    config = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 16 < len(edited["edit"].concept_of)
    assert "lost at the keys" in capsys.readouterr().out


def test_input_of_the_evaluation_harness(edited, place, texts):
    pytest.importorskip("lm_eval")
    (place / "rows.json").write_text("\n".join(json.dumps({"text": text}) for text in texts[:3]), encoding="utf-8")
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.json")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    block = HARNESS.replace('["arc_easy"]', "[task]")  # the only change: arc_easy is on a hub
    assert block.count("[task]") == 2
    found = run(block, place, task=task)
    before, after = (found[when]["tiny"]["word_perplexity,none"] for when in ("before", "after"))
    assert before > 1 and after > 1 and before != after
    for update in found["edit"].updates:
        weight = found["model"].get_parameter(update.parameter)
        assert tensor_digest(weight) == update.applied.before


def test_a_list_of_models(place):
    found = run(MODELS, place)
    assert found["failed"] == {}
    assert {path.name for path in (place / "models").iterdir()} >= {"a.edit.safetensors", "b.edit.safetensors"}


def test_the_map_names_every_file_of_the_code_and_nothing_else():
    root = README.parent
    named = re.findall(r"^- `([a-z]+/[^`]+)` – ", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    patterns = ("rocr/**/*.py", "rocr/data/*", "kernels/*.py", "csrc/*", "benches/*.py")
    there = {path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    assert len(named) == len(set(named))
    assert {name for name in named if not name.startswith("benches/results/")} == there
