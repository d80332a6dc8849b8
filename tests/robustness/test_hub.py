"""Every call that could reach a hub goes through one module, which allows connections only on request."""

import ast
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from huggingface_hub import constants

from rocr import InputError
from rocr.model import hub
from rocr.model.hub import offline
from rocr.model.load import find_model, load_model, load_tokenizer
from rocr.model.load_partial import empty_model
from tests.support.versions import MAJOR

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
PROBE = {"subject": "Ada Byron", "query": "What did Ada Byron write?", "answer": "programs"}
ELSEWHERE = {
    "config.json": {
        "auto_map": {
            "AutoConfig": "owner/repo--configuration.Config",
            "AutoModelForCausalLM": "owner/repo--modeling.Model",
            "AutoTokenizer": ["owner/repo--tokenization.Slow", "owner/repo--tokenization.Fast"],
        }
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["owner/repo--tokenization.Slow", "owner/repo--tokenization.Fast"]},
    },
}
"""Fields that send transformers to a hub for code."""


def with_fields(model, target, *names):
    """A copy of a model's folder whose files name code in another repository."""
    shutil.copytree(model, target)
    for name in names:
        path = target / name
        path.write_text(json.dumps(json.loads(path.read_text()) | ELSEWHERE[name]))
    return target


def commands(files, model, base):
    """Every command that reads a model, with every way of loading."""
    concept = ("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2", "--no-answers", "--force")
    edited = ("unlearn", model, *concept, "--statistics", files.statistics)
    other = with_fields(files.edited, base / "other", *ELSEWHERE)
    more = ("--concept", "Grace Hopper", "--redirect", "Blaise Pascal", "--statistics", files.statistics)
    (base / "probes.jsonl").write_text(json.dumps(PROBE))
    (base / "names.txt").write_text("Ada Byron")
    probes = ("--probes", base / "probes.jsonl")
    return {
        "stats": ("stats", model, "--text", files.text, "--layers", "1", "--out", base / "statistics"),
        "stats --partial": ("stats", model, "--text", files.text, "--layers", "1", "--partial", "--out", base / "s"),
        "unlearn": (*edited, "--out", base / "edited"),
        "unlearn --partial": (*edited, "--partial", "--out", base / "part"),
        "unlearn --dry-run": (*edited, "--dry-run"),
        "eval": ("eval", model, *probes, "--forms", "qa", "--out", base / "report.json"),
        "compare": (
            *("compare", model, *probes, "--targets", "Ada Byron", "--redirect", "Blaise Pascal"),
            *("--text", files.text, "--methods", "rocr", "--forms", "qa", "--out", base / "table.json"),
        ),
        "redirects": ("redirects", model, *probes, "--among", "Blaise Pascal", "a gardener", "--out", base / "l"),
        "aliases": ("aliases", model, base / "names.txt", "--languages", "Greek", "--out", base / "names.jsonl"),
        "apply": ("apply", model, files.edit, "--out", base / "applied"),
        "add": ("add", other, *more, "--no-answers", "--force", "--out", base / "more"),
        "revert": ("revert", model, "--edit", files.edit, "--out", base / "reverted"),
        "ask": ("ask", files.edited, "Who?", "--model", model, "--answer-tokens", 2),
        "verify": ("verify", model),
        "info": ("info", files.edit),
        "doctor": ("doctor",),
    }


NAMES = (
    "stats", "stats --partial", "unlearn", "unlearn --partial", "unlearn --dry-run", "eval", "compare", "redirects",
    "aliases", "apply", "add", "revert", "ask", "verify", "info", "doctor",
)  # fmt: skip


@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
@pytest.mark.parametrize("name", NAMES)
def test_no_command_connects_for_code_that_a_model_names_elsewhere(
    name, trusted, files, tmp_path, command, tried, tally
):
    model = with_fields(files.model, tmp_path / "model", *ELSEWHERE)
    arguments = commands(files, model, tmp_path)[name]
    trust = ("--trust-remote-code",) if trusted and name not in ("verify", "info", "doctor") else ()
    done = command(*arguments, *trust)
    assert not tried, done.errors
    assert "Traceback" not in done.errors
    # Code that cannot be had; a folder that rocr did not write; a model that was not edited.
    assert done.code == (2 if trust else {"verify": 2, "revert": 3}.get(name, 0)), done.errors
    tally("commands that did not connect")


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize("load", [load_model, load_tokenizer, empty_model])
def test_the_gate_is_what_keeps_from_connecting(load, place, files, tmp_path, tried, monkeypatch):
    source = find_model(str(with_fields(files.model, tmp_path / "model", place)))

    def attempt():
        try:
            load(source, trust_remote_code=True)
        except InputError as error:
            assert str(source.folder) in str(error)

    attempt()
    assert not tried
    monkeypatch.setattr(hub, "offline", lambda unless=False: nullcontext())
    monkeypatch.setattr(hub.Loading, "tokenizer", without_local_files_only(hub.Loading.tokenizer))
    monkeypatch.setattr(hub.Loading, "config", without_local_files_only(hub.Loading.config))
    attempt()
    # For a tokenizer, transformers 4 reads the files of the tokenizer first.
    settings = (load_model, empty_model) if MAJOR < 5 else (load_model, load_tokenizer, empty_model)
    reads_it = load in settings if place == "config.json" else load is not empty_model
    assert bool(tried) == reads_it, "without the gate, these libraries do connect"


def without_local_files_only(function):
    def called(loading):
        loading.options.pop("local_files_only", None)
        return function(loading)

    return called


def test_offline_is_as_before_after_the_context(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ZeroDivisionError), offline():
        assert constants.HF_HUB_OFFLINE
        with offline():
            pass
        assert constants.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not constants.HF_HUB_OFFLINE
    with offline(unless=True):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with offline(unless=True):
        assert constants.HF_HUB_OFFLINE, "an environment that says offline is obeyed"


def test_an_adapter_of_a_base_model_elsewhere_connects_to_nothing(files, tmp_path, command, tried):
    model = tmp_path / "adapter"
    shutil.copytree(files.model, model)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "X"}))
    done = command("stats", model, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 2 and "is an adapter" in done.errors and not tried


ONLY_IN_THE_GATE = {
    "from_pretrained", "from_config", "load_dataset", "snapshot_download", "hf_hub_download", "cached_file",
    "push_to_hub", "hf_api", "HfApi", "model_info", "get_class_from_dynamic_module",
}  # fmt: skip
INSIDE_OFFLINE = {"get_peft_model", "HFLM", "simple_evaluate", "TaskManager"}


def called_name(node):
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def unguarded_calls(tree, inside=False):
    """Names of calls of `INSIDE_OFFLINE` that stand in no `with offline(…)`."""
    if isinstance(tree, ast.With):
        contexts = [item.context_expr for item in tree.items if isinstance(item.context_expr, ast.Call)]
        inside = inside or any(called_name(context) == "offline" for context in contexts)
    found = [called_name(tree)] if isinstance(tree, ast.Call) and called_name(tree) in INSIDE_OFFLINE else []
    below = [name for child in ast.iter_child_nodes(tree) for name in unguarded_calls(child, inside)]
    return ([] if inside else found) + below


def test_nothing_else_calls_what_could_connect():
    gate = ROOT / "rocr" / "model" / "hub.py"
    calls_the_gate = ROOT / "rocr" / "evaluation" / "probes" / "load.py"
    for path in sorted((ROOT / "rocr").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {called_name(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        if path != gate:
            theirs = ONLY_IN_THE_GATE - ({"load_dataset"} if path == calls_the_gate else set())  # the gate's own
            assert not (names | imported) & theirs, f"{path} calls {(names | imported) & theirs}"
            assert not {name for name in imported if name.startswith("AutoModel")}, path
        else:
            assert {"from_pretrained", "from_config", "load_dataset"} <= names
        assert not unguarded_calls(tree), path
    assert unguarded_calls(ast.parse("with other():\n    get_peft_model()")) == ["get_peft_model"]


def test_code_of_a_generation_is_not_run_unless_trusted(files, tmp_path):
    mark, model = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(files.model, model)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\ndef generate(model): ...\n")
    load_model(find_model(str(model)))
    assert not mark.exists()
