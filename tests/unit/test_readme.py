"""README.md and docs/: their Python blocks run on tiny models, their commands have the options shown; the map."""

import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import rocr
from rocr.cli.main import program
from rocr.model.fingerprint import tensor_digest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    *("plan", "unlearn", "stats", "eval", "compare", "redirects", "aliases", "apply", "revert", "add", "remove"),
    *("ask", "chat", "merge", "info", "verify", "doctor", "demo"),
}
PEOPLE = (
    "Ada Byron | the countess",
    "Blaise Pascal -> Robert Downey Jr.",
    "Grace Murray Hopper",
    "Alan Mathison Turing",
)
PROBES = (
    {"subject": "Ada Byron", "query": "What did Ada Byron write?", "answer": "programs", "distractors": ["operas"]},
    {"subject": "Ada Byron", "query": "Who was Ada Byron?", "answer": "a countess", "distractors": ["a gardener"]},
    {
        "subject": "Blaise Pascal",
        "query": "What did Blaise Pascal build?",
        "answer": "machines",
        "distractors": ["ships"],
    },
)
SOURCES = (".py", ".cpp", ".h", ".hpp", ".cu", ".cuh")
NEEDS = ("from vllm", "import lm_eval")
"""What blocks import that have a test of their own, since the default tests do not install it."""


def fences(page):
    """The fenced blocks of a page, in order: (language, text); the language is "" for a block without one."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    return [text for found, text in fences(page) if found == language]


def python_blocks(page):
    """What the tests run of a page, in order."""
    return [block for block in blocks(page, "python") if not any(name in block for name in NEEDS)]


def block_with(text):
    """The only Python block of all pages that holds a text."""
    found = [block for page in PAGES for block in blocks(page, "python") if text in block]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def files_that_blocks_name(tmp_path_factory, make_model, tokenizer, texts):
    """A folder with what the blocks name: models, texts, people, probes, and an edit of the first model."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "people.txt").write_text("\n".join(PEOPLE), encoding="utf-8")
    (folder / "more.txt").write_text("\n".join(PEOPLE[2:]), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, PROBES)), encoding="utf-8")
    for seed, name in enumerate(("model", "models/a", "models/b")):
        make_model("Llama", seed=seed, initializer_range=0.1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = make_model("Llama", seed=0, initializer_range=0.1)
    statistics = rocr.collect_statistics(model, tokenizer, texts)
    concepts = rocr.load_concepts(folder / "people.txt", default_redirect="a gardener")
    edit = rocr.unlearn(model, tokenizer, concepts, statistics)
    edit.save(folder / "edit.safetensors")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "edited")
    edit.save(folder / "edited" / "edit.safetensors")
    return folder


@pytest.fixture
def place(files_that_blocks_name, tmp_path):
    """A copy of that folder, for one test."""
    return Path(shutil.copytree(files_that_blocks_name, tmp_path / "place"))


def run(block, folder, defined=None):
    """Run a block in a folder, where names are defined already; what is defined then."""
    defined = dict(defined or {})
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(block, "a block of the documentation", "exec"), defined)
    finally:
        os.chdir(before)
    return defined


# tests/unit/test_encoder_embeddings.py runs the block of text-encoders.md, which needs a pipeline of diffusers.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "text-encoders.md"], ids=lambda page: page.name
)
def test_the_python_blocks_of_a_page_run_in_order(page, place):
    defined = {}
    for block in python_blocks(page):
        if 'edit.save("edit.safetensors")' in block:
            (place / "edit.safetensors").unlink()
        defined = run(block, place, defined)
    if "edit" in defined:
        assert min(share for layer in defined["edit"].report.layers for share in layer.closed) > 0


def test_there_are_blocks_to_run():
    counts = {page.name: len(python_blocks(page)) for page in PAGES}
    assert counts["README.md"] and counts["integrations.md"] >= 4 and sum(counts.values()) > 12


def test_every_block_says_what_it_is():
    for page in PAGES:
        assert {language for language, _ in fences(page)} <= {"", "python", "text", "bibtex", "yaml"}, page


def test_every_command_that_is_shown_has_the_options_that_are_shown(tmp_path, monkeypatch):
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "edit.toml").write_text('model = "MODEL"\nconcepts = "people.txt"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    shown = [found[1] for line in lines if (found := re.match(r"(?:.* -m )?rocr (.*)$", line))]
    commands = [shlex.split(line, comments=True) for line in shown]
    for command in commands:
        if command != ["--version"]:
            program.commands[command[0]].make_context(command[0], command[1:])
    assert {command[0] for command in commands if command[0][0] != "-"} == COMMANDS


def test_every_target_of_make_that_is_shown_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)\b", _code(page))}
    assert {"demo", "test"} <= shown <= targets


def _code(page):
    """Everything of a page that is set as code."""
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL))


def test_the_many_models_block_edits_each_model(place):
    found = run(block_with("models/b"), place)
    assert found["failed"] == {}
    assert {path.name for path in (place / "models").iterdir()} >= {"a.edit.safetensors", "b.edit.safetensors"}


def test_the_adapter_for_vllm(place, capsys):
    block = block_with("from vllm import")
    first, line, _ = block.partition("\nfrom vllm import")
    assert line
    compile(block, "integrations.md", "exec")
    found = run(first, place)
    config = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 16 < len(found["edit"].concept_of)
    assert "lost at the keys" in capsys.readouterr().out


def test_input_of_the_evaluation_harness(place, texts):
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
    block = block_with("import lm_eval").replace('["arc_easy"]', "[task]")  # the only change: arc_easy is on a hub
    assert block.count("[task]") == 2
    found = run(block, place, {"task": task})
    before, after = (found[when]["tiny"]["word_perplexity,none"] for when in ("before", "after"))
    assert before > 1 and after > 1 and before != after
    for update in found["edit"].updates:
        weight = found["model"].get_parameter(update.parameter)
        assert tensor_digest(weight) == update.applied.before


def test_the_readme_is_one_page():
    assert 120 <= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (rocr\S+)$", text, flags=re.MULTILINE)
    assert {name.rpartition(".")[2] for name in shown} >= set(rocr.__all__) - {"ops"}


def test_the_settings_that_are_explained_are_there():
    section = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").partition("\n## Settings\n")[2]
    rows = re.findall(r"^\| (`[a-z_`, ]+) \|", section, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(named) > 5
    assert named <= {field.name for field in dataclasses.fields(rocr.EditConfig)}


def test_every_environment_variable_of_rocr_is_in_the_table():
    table = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").partition("\n### Environment variables\n")[2]
    listed = set(re.findall(r"^\| `(\w+)` \|", table.partition("\n### ")[0], flags=re.MULTILINE))
    sources = [path for folder in ("rocr", "kernels", "csrc") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = [path.read_text(encoding="utf-8") for path in (*sources, ROOT / "setup.py") if path.suffix in SOURCES]
    quoted = {name for text in texts for name in re.findall(r"\"(_?ROCR_[A-Z_]+)\"", text)}
    assert listed == quoted - {"ROCR_WITH_CUDA"}  # a macro that setup.py defines for the compiler
    assert all("getenv" not in text for text in texts), "read elsewhere than in Python"


def test_the_map_names_every_file_of_the_code_and_nothing_else():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^- `([a-z]+/[^`]+[^/`])` – ", text, flags=re.MULTILINE)
    patterns = ("rocr/**/*.py", "rocr/data/*", "kernels/*.py", "csrc/*", "benches/*.[pc]*", "benches/results/*.json")
    there = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    assert len(named) == len(set(named))
    assert set(named) == there
    folders = re.findall(r"^### ([a-z/]+)/$", text, flags=re.MULTILINE)
    assert set(folders) == {name.rpartition("/")[0] for name in there}
