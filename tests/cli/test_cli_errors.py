"""Whatever is raised inside a command ends in one sentence; numbers and names from outside are bounded and shown."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import transformers

from rocr.cli.main import main, program
from rocr.cli.values import Number
from rocr.errors import InputError
from rocr.model.generate import ask

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [
    {"subject": "Ada Byron", "query": "Where was Ada Byron born?", "answer": "London", "distractors": ["Rome", "Oslo"]},
    {"subject": "Blaise Pascal", "query": "What did Blaise Pascal weigh?", "answer": "the air"},
    {"subject": "Robert Downey", "query": "What does Robert Downey do?", "answer": "acts"},
]
RAISED = [
    StopIteration(),
    AssertionError("shapes"),
    KeyError("position_ids"),
    IndexError("index out of range in self"),
    NotImplementedError(),
    RuntimeError("expected scalar type"),
    RecursionError("maximum recursion depth exceeded"),
]


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    path = tmp_path_factory.mktemp("probes") / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def commands(files, probes, tmp_path):
    """Arguments of every command that runs a model, by name."""
    names = tmp_path / "names.txt"
    names.write_text("Ada Byron")
    out = ("--out", tmp_path / "out")
    return {
        "stats": ("stats", files.model, "--text", files.text, "--layers", "1,2", *out),
        "unlearn": (
            *("unlearn", files.model, "--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2"),
            *("--statistics", files.statistics, *out),
        ),
        "eval": ("eval", files.model, "--probes", probes, "--text", files.text, *out),
        "redirects": ("redirects", files.model, "--probes", probes, "--among", "a gardener", "a key", *out),
        "aliases": ("aliases", files.model, names, "--languages", "Greek", "--out", tmp_path / "out.jsonl"),
        "compare": (
            *("compare", files.model, "--probes", probes, "--targets", "Ada Byron", "--redirect", "a gardener"),
            *("--methods", "original,rocr", "--tokens", "200", *out),
        ),
        "ask": ("ask", files.edited, "Who is Ada Byron?"),
    }


def assert_told(command, arguments, raised, tmp_path, code=2):
    done = command(*arguments, "--json")
    assert done.code == code, done.errors
    assert "Traceback" not in done.errors
    assert done.errors.splitlines()[-1].startswith("rocr: "), done.errors
    document = json.loads(done.output)
    assert document["exit_code"] == done.code
    assert "traceback" not in document
    assert document["error"] in done.errors
    debugged = command(*arguments, "--json", "--debug")
    assert debugged.code == done.code
    assert type(raised).__name__ in debugged.errors
    trace = json.loads(debugged.output)["traceback"]
    assert trace.startswith("Traceback (most recent call last)")
    assert type(raised).__name__ in trace
    assert "raise_it" in trace
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.jsonl").exists()
    return done


# Every error where a model is edited and where it is asked; of the other commands, an error with and one without text.
RAISED_BY = [(name, raised) for name in ("unlearn", "eval") for raised in RAISED]
RAISED_BY += [
    (name, RAISED[number]) for name in ("stats", "redirects", "aliases", "compare", "ask") for number in (0, 5)
]


@pytest.mark.parametrize(("name", "raised"), RAISED_BY, ids=lambda each: each if isinstance(each, str) else repr(each))
def test_a_model_whose_forward_raises(name, raised, commands, command, tmp_path, monkeypatch):
    def raise_it(*_, **__):
        raise raised

    monkeypatch.setattr(transformers.LlamaModel, "forward", raise_it)
    done = assert_told(command, commands[name], raised, tmp_path)
    if name in ("eval", "redirects", "aliases", "ask"):
        assert f"The forward pass of LlamaForCausalLM failed: {type(raised).__name__}" in done.errors
        assert done.code == 2


@pytest.mark.parametrize(
    "raised", [KeyError("x"), RecursionError("deep"), StopIteration()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("name", ["stats", "unlearn", "eval", "redirects", "aliases", "compare", "ask"])
def test_a_tokenizer_that_raises(name, raised, commands, command, tmp_path, monkeypatch):
    def raise_it(*_, **__):
        raise raised

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", raise_it)
    assert_told(command, commands[name], raised, tmp_path)


def test_a_bug_of_rocr_says_that_it_is_one(commands, command, tmp_path, monkeypatch):
    def raise_it(*_, **__):
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr("rocr.evaluation.report.report_json", raise_it)
    done = assert_told(command, commands["eval"], ZeroDivisionError(), tmp_path, code=1)
    assert done.code == 1
    assert "ZeroDivisionError: a bug: this is a bug of rocr. Run the command again with --debug" in done.errors


def test_the_causes_of_an_error_are_in_the_traceback(commands, command, monkeypatch):
    def raise_it(*_, **__):
        raise KeyError("the first cause")

    monkeypatch.setattr(transformers.LlamaModel, "forward", raise_it)
    done = command(*commands["eval"], "--debug")
    assert "KeyError: 'the first cause'" in done.errors
    assert "direct cause of the following exception" in done.errors
    assert "InputError: The forward pass of LlamaForCausalLM failed" in done.errors


def test_terminal_escapes_of_a_traceback_are_shown_as_codes(commands, command, monkeypatch):
    def raise_it(*_, **__):
        raise RuntimeError("\x1b[2J")

    monkeypatch.setattr(transformers.LlamaModel, "forward", raise_it)
    errors = command(*commands["eval"], "--debug").errors
    assert "\x1b" not in errors


def numeric_options():
    """(command, option) of every option whose value is a number or a list of numbers."""
    return [
        (name, parameter.opts[0])
        for name, command in program.commands.items()
        for parameter in command.params
        if parameter.type is click.FLOAT or isinstance(parameter.type, Number) or parameter.name == "layers"
    ]


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e400", "-1", "ten", "", "9" * 5000, "0-9999999999", "1,1", "3-1"]
)
def test_every_number_that_makes_no_sense_is_refused_before_a_model_is_loaded(
    value, commands, command, files, monkeypatch, tmp_path
):
    out = ("--out", tmp_path / "out")
    commands = commands | {
        "apply": ("apply", files.model, files.edit, *out),
        "remove": ("remove", files.edited, "Ada Byron", *out),
        "merge": ("merge", files.edited, files.edited, *out),
        "add": ("add", files.edited, "--concept", "Grace Hopper", "--redirect", "Blaise Pascal", *out),
        "revert": ("revert", files.edited, *out),
        "ask": ("ask", files.edited, "Who?"),
        "chat": ("chat", files.edited),
        "plan": ("plan", *commands["unlearn"][1:-2]),
        "demo": ("demo",),
    }
    monkeypatch.setattr("rocr.model.load.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert {("unlearn", "--ridge"), ("stats", "--layers"), ("compare", "--steps")} <= set(numeric_options())
    for name, option in numeric_options():
        arguments = [*map(str, commands[name]), f"{option}={value}"]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
        assert code == 2, (name, option, errors.getvalue())
        assert "Traceback" not in errors.getvalue()
        assert len(errors.getvalue()) < 400
        assert not (tmp_path / "out").exists()


def test_numbers_at_their_bounds_work(files, command, commands, tmp_path):
    most = ("--tokens", 10**12, "--length", 2**20, "--batch-tokens", 2**24, "--seed", 2**63 - 1)
    assert command(*commands["stats"], *most).code == 0
    most = ("--known", "0", "--orders", 10**6, "--seed", 2**63 - 1, "--neighbours", 10**6, "--suite-limit", 10**6)
    arguments = [part for part in commands["eval"] if part not in ("--text", files.text)]
    done = command(*arguments, *most, "--targets", "Ada Byron", "--overwrite")
    assert done.code == 0, done.errors


def test_a_model_does_not_write_more_than_it_can_at_once(files, command, concept, tmp_path):
    for arguments in (("stats", files.model), ("unlearn", files.model, *concept)):
        done = command(*arguments, "--tokens", 2**20 + 1, "--out", tmp_path / "out")
        assert done.code == 2
        assert "at most 1,048,576 tokens of text itself, not 1,048,577: give text files (--text)" in done.errors


def test_a_list_above_the_limit_is_refused_unless_it_is_allowed(files, command, tmp_path, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"Person {i} -> a gardener\n" for i in range(10_001)))
    (tmp_path / "out").mkdir()
    arguments = ("unlearn", files.model, names, "--statistics", files.statistics, "--out", tmp_path / "out")
    done = command(*arguments)
    assert done.code == 2
    assert "10,001 concepts, above the limit of 10,000" in done.errors
    assert "--allow-long-list" in done.errors
    done = command(*arguments, "--allow-long-list")
    assert done.code == 2
    assert "exists" in done.errors, "the list is not what is wrong now"


def test_the_limit_that_a_command_allows_is_that_of_the_edit(files, command, concept, tmp_path, monkeypatch):
    import rocr.cli.unlearn

    monkeypatch.setattr(rocr.cli.unlearn, "MAX_CONCEPTS", 0)
    monkeypatch.setattr(rocr.cli.unlearn, "check_length", lambda *_: None)
    arguments = ("unlearn", files.model, *concept, "--statistics", files.statistics, "--out", tmp_path / "out")
    done = command(*arguments)
    assert done.code == 2
    assert "1 concepts, above the limit of 0" in done.errors
    assert command(*arguments, "--allow-long-list").code == 0


@pytest.fixture
def odd_folder(tmp_path):
    folder = os.fsencode(tmp_path) + b"/odd\xc3\xa9\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("names on this disk are UTF-8")
    return Path(os.fsdecode(folder))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_about_a_file_whose_name_is_not_utf8_is_valid(
    encoding, files, command, concept, odd_folder, monkeypatch, tmp_path
):
    def run(*arguments):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, write_through=True))
        with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), encoding)):
            code = main([str(argument) for argument in arguments])
        return code, json.loads(raw.getvalue().decode(encoding))

    unlearn = ("unlearn", files.model, *concept, "--statistics", files.statistics, "--save", "model,edit,originals")
    out = odd_folder / "out"
    # An output there could not be read again.
    for arguments in (unlearn, ("stats", files.model, "--text", files.text, "--layers", "1")):
        code, report = run(*arguments, "--out", out, "--json")
        assert code == 2 and "its path is not UTF-8" in report["error"] and str(out) in report["error"]
    code, report = run(*unlearn, "--out", tmp_path / "out", "--json")
    assert code == 0, report
    shutil.move(tmp_path / "out", out)
    code, report = run("verify", out, "--json")
    assert code in (0, 3)
    assert report.get("folder", str(out)) == str(out)
    code, report = run("revert", out, "--out", odd_folder / "back", "--json")
    assert code == 2 and not (odd_folder / "back").exists()
    code, report = run("revert", out, "--out", tmp_path / "back", "--json")
    assert code == 0, report
    assert [*odd_folder.iterdir()] == [out]
    code, report = run("info", odd_folder / "nothing", "--json")
    assert code == 2
    assert "\udcff" in report["error"]


def test_names_that_are_not_utf8_are_shown_on_a_strict_terminal(odd_folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    shutil.copytree(Path(__file__).parents[2] / "rocr" / "data", odd_folder / "data")
    (odd_folder / "report.json").write_text('{"format": "rocr report 1", "name": "Frédéric"}', encoding="utf-8")
    command = [sys.executable, "-m", "rocr", "info", str(odd_folder / "report.json")]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Fr\\xe9d\\xe9ric" in done.stdout


@pytest.mark.parametrize("name", ["eval", "compare"])
def test_what_is_missing_is_said_before_a_model_is_loaded(name, commands, command, monkeypatch):
    monkeypatch.setattr("rocr.model.load.load_model", lambda *_: pytest.fail("the model was loaded"))
    done = command(*commands[name], "--forms", "qa,magic")
    assert done.code == 2
    assert "Unknown forms: magic" in done.errors
    if name == "eval":
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        done = command(*commands[name], "--suites", "mmlu")
        assert done.code == 2
        assert "pip install 'rocr[harness]'" in done.errors
    else:
        done = command(*commands[name], "--redirect", "x\udcff")
        assert done.code == 2
        assert "half of a surrogate pair" in done.errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json",),
        ("nonsense", "--json"),
        ("unlearn", "model", "--seed", "-1", "--json"),
        ("stats", "model", "--js", "--layers", "0-9999999999"),
        ("verify", "--json"),
        ("info", "file", "--json", "--what\udcff"),
    ],
    ids=" ".join,
)
def test_json_about_wrong_arguments_is_a_document_too(arguments, capsys):
    code = main(arguments)
    found = capsys.readouterr()
    document = json.loads(found.out)
    assert code == document["exit_code"] == 2
    assert found.err == f"rocr: {document['error']}\n" and document["error"].endswith(" --help.")


def test_wrong_arguments_without_json_leave_stdout_empty(capsys):
    assert main(("unlearn", "model", "--seed", "-1")) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("place", ["rocr.model.load.load_model", "transformers.LlamaForCausalLM.get_input_embeddings"])
@pytest.mark.parametrize(
    "raised", [SystemExit(7), type("PanicException", (BaseException,), {})("in Rust"), KeyError(1)]
)
def test_code_of_others_that_ends_the_process_is_told_as_an_error(place, raised, files, command, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise raised

    monkeypatch.setattr(place, stop)
    done = command("stats", files.model, "--text", files.text, "--layers", "1", "--out", tmp_path / "out", "--json")
    document = json.loads(done.output)
    assert done.code == document["exit_code"] == (2 if "transformers" in place else 1), done.errors
    assert type(raised).__name__ in document["error"]
    assert not [*tmp_path.glob("out*")]


@pytest.mark.parametrize("given", [None, 5, torch.nn.Identity(), torch.nn.LayerNorm(3)], ids=repr)
def test_a_model_that_gives_no_embedding_is_refused(given, files, command, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.LlamaForCausalLM.get_input_embeddings", lambda _: given)
    done = command("stats", files.model, "--text", files.text, "--layers", "1", "--out", tmp_path / "out")
    assert done.code == 2 and f"get_input_embeddings of LlamaForCausalLM returns {type(given).__name__}" in done.errors


@pytest.mark.parametrize("given", [None, {}, ["one"], "xx", [1, 2]], ids=repr)
def test_a_tokenizer_that_decodes_to_no_texts_is_refused(given, model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *_, **__: given)
    with pytest.raises(InputError, match="does not decode 2 answers"):
        ask(model, tokenizer, ["Who?", "What?"], max_tokens=2)


@pytest.mark.parametrize("words", [("doctor",), ("doctor", "--json"), ("--help",)])
def test_a_reader_that_has_ended_is_no_error_to_report(words):
    """As in `rocr doctor | head -1`, when head has read its line."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run([sys.executable, "-m", "rocr", *words], stdout=gone, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "rocr: " not in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr
