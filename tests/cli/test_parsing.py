"""Words of the command line: options of several words, abbreviations, values with dashes, suggestions, completion."""

import dataclasses
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

import rocr
from rocr.cli.main import main, program
from rocr.config import BY_COUNT, LONG_LIST, LONG_LIST_TEMPLATE_WEIGHT, RENAMED, EditConfig

ROOT = Path(__file__).resolve().parents[2]


def parsed(command, *words):
    """Values of a command's parameters that differ from their defaults."""
    given = program.commands[command]
    context = given.make_context(command, list(words))
    source = click.core.ParameterSource.COMMANDLINE
    return {name: value for name, value in context.params.items() if context.get_parameter_source(name) is source}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["m", "--text", "a", "b", "c"], {"model": "m", "text": ("a", "b", "c")}),
        (["m", "--text", "a", "b", "--tokens", "5"], {"model": "m", "text": ("a", "b"), "tokens": 5}),
        (["--text", "a", "b", "--", "m", "list.txt"], {"model": "m", "concepts": "list.txt", "text": ("a", "b")}),
        (["--text=a", "m", "list.txt"], {"model": "m", "concepts": "list.txt", "text": ("a",)}),
        (["m", "--text", "a", "--text", "b"], {"model": "m", "text": ("a", "b")}),
        (["m", "--text", "-1", "- b", "-"], {"model": "m", "text": ("-1", "- b", "-")}),
        (["m", "--control", "A B", "C D"], {"model": "m", "control": ("A B", "C D")}),
        (["m", "--concept", "A", "list.txt"], {"model": "m", "concepts": "list.txt", "concept": ("A",)}),
        (["m", "--concept", "A", "--redirect", "B"], {"model": "m", "concept": ("A",), "redirect": "B"}),
        (["m", "--concept", "A", "--concept=B"], {"model": "m", "concept": ("A", "B")}),
        (["m", "--conc", "A", "--red=B=C"], {"model": "m", "concept": ("A",), "redirect": "B=C"}),
        (
            ["m", "--concept", "-a name", "--redirect=--out"],
            {"model": "m", "concept": ("-a name",), "redirect": "--out"},
        ),
        (["m", "--redirect=a = b"], {"model": "m", "redirect": "a = b"}),
        (["m", "--redirect", ""], {"model": "m", "redirect": ""}),
        (["m", "--ridge", "-1e3", "--gamma=-inf"], {"model": "m", "ridge": -1000.0, "gamma": -float("inf")}),
        (["m", "--lay", "1-3,5"], {"model": "m", "layers": (1, 2, 3, 5)}),
        (["m", "--save", "model,lora,model"], {"model": "m", "save": ("model", "lora")}),
        (["--js", "m", "--", "--odd"], {"model": "m", "concepts": "--odd", "json": True}),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_words_and_what_they_mean(words, values):
    assert parsed("unlearn", *words) == values


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Missing command. See rocr --help."),
        (["unlern"], "No such command 'unlern'."),
        (["unlearn"], "Missing argument 'MODEL'. See rocr unlearn --help."),
        (["stats", "m"], "Missing option '--out'. See rocr stats --help."),
        (["redirects", "m", "--out", "o"], "Missing option '--among'."),
        (["unlearn", "m", "--conce", "x", "--d", "cpu"], "'--d' is ambiguous: it may mean --dtype or --device or"),
        (["unlearn", "m", "--redirect", "--out", "o"], "Option '--redirect' requires a value."),
        (["unlearn", "m", "--text", "--out", "o"], "Option '--text' requires a value."),
        (["unlearn", "m", "--text"], "Option '--text' requires a value."),
        (["unlearn", "m", "--whole=1"], "'--whole' does not take a value."),
        (["unlearn", "m", "c", "d"], "Got unexpected extra argument (d)"),
        (["unlearn", "m", "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'."),
        (["unlearn", "m", "--seed", "-1"], "'-1' is not a whole number from 0 to 9,223,372,036,854,775,807."),
        (["unlearn", "m", "--layers", "3-1"], "'3-1' is not a list of layers from 0 to 9,999"),
        (["unlearn", "m", "--layers", "1,1"], "'1,1' names a layer twice."),
        (["eval", "m", "--out", "o", "--known", "nan"], "'nan' is not a number from 0 to 1."),
        (["unlearn", "m", "--save", "all"], "--save takes model, gguf, lora, gguf-lora, edit, originals, not all."),
        (["unlearn", "m", "--system", "x" * 5000, "--dtype", "y" * 5000], "Invalid value for '--dtype': 'yyy"),
    ],
    ids=lambda part: " ".join(part)[:60] if isinstance(part, list) else "",
)
def test_wrong_words_are_refused_in_one_sentence(words, sentence, capsys):
    assert main([*words, "--json"] if words else words) == 2
    found = capsys.readouterr()
    assert found.err.startswith("rocr: ") and sentence in found.err
    assert found.err.count("\n") == 1 and len(found.err) < 400
    if words:
        document = json.loads(found.out)
        assert document == {"error": found.err.removeprefix("rocr: ").rstrip("\n"), "exit_code": 2}
    else:
        assert found.out == ""


def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    assert main(["unlearn", "m", "--redirct", "x"]) == 2
    assert re.match(r"rocr: No such option:? '?--redirct'?\.? \(.*--redirect", capsys.readouterr().err)


def test_partial_and_whole_exclude_each_other(files, command, concept, tmp_path):
    done = command("unlearn", files.model, *concept, "--partial", "--whole", "--dry-run")
    assert done.code == 2 and "--partial and --whole exclude each other" in done.errors


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--vers"], ["unlearn", "--help"], ["eval", "m", "-h"]])
def test_help_ends_with_code_0(words, capsys):
    assert main(words) == 0
    found = capsys.readouterr()
    assert found.err == ""
    if words == ["--vers"]:
        assert found.out == f"rocr {rocr.__version__}\n"
    elif len(words) == 1:
        assert [
            line.split()[0] for line in found.out.split("Commands:\n")[1].splitlines()[: len(program.commands)]
        ] == [*program.commands]
        assert "4 refused by a guard" in " ".join(found.out.split())


def test_the_help_page_has_a_heading_for_each_group_of_options(capsys):
    main(["unlearn", "--help"])
    shown = capsys.readouterr().out
    headings = [line.rstrip(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        *("Arguments", "Options", "Loading the model", "Running", "Settings", "Chat template"),
        *("Statistics of ordinary text", "Answers before and after"),
    ]
    assert "--text FILE..." in shown and "are words up to the next option" in " ".join(shown.split())
    main(["info", "--help"])
    assert "words up to" not in " ".join(capsys.readouterr().out.split())


def test_every_option_and_argument_has_a_help_text_that_is_a_sentence():
    for command in program.commands.values():
        assert command.help
        for parameter in command.params:
            assert parameter.help[0].isupper() or parameter.help[0] == ".", (command.name, parameter.name)
            assert parameter.help.endswith("."), (command.name, parameter.name)


def test_the_help_names_the_default_of_each_setting():
    defaults = {**dataclasses.asdict(EditConfig()), "template_weight": "0.03 for long lists, else 0"}
    defaults["token_schedule"] = "predicted"
    defaults["variants"] = "spelling for fewer than 25 concepts, none for more or with --key-tokens last"
    assert (LONG_LIST_TEMPLATE_WEIGHT, LONG_LIST) == (0.03, 25)
    assert {getattr(EditConfig(), name) for name in BY_COUNT} == {None}
    settings = [p for p in program.commands["unlearn"].params if getattr(p, "group", "") == "Settings" if not p.is_flag]
    assert len(settings) == 16
    for parameter in settings:
        if parameter.name not in ("template", *RENAMED):
            default = defaults[parameter.name]
            shown = f"{default:g}" if isinstance(default, float) else default
            assert parameter.help.endswith(f"(default: {shown})."), parameter.name


def test_the_help_page_shows_static_defaults(capsys):
    main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[default: (420 questions about 50 people and 20 things)]" in shown
    assert "[default: qa,fb,mcp,subtoken]" in shown and "[default: 0]" in shown


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("rocr unl", ["plain,unlearn"]),
        ("rocr unlearn --hel", ["plain,--held-weight", "plain,--help"]),
        ("rocr unlearn m --dtype b", ["plain,bfloat16"]),
        ("rocr unlearn m --text a --meth", ["plain,--method"]),
        ("rocr unlearn fold", ["file,fold"]),
        ("rocr stats m --text fold", ["file,fold"]),
    ],
)
def test_a_shell_completes(words, offered, capsys, monkeypatch):
    monkeypatch.setenv("_ROCR_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert main([]) == 0
    assert capsys.readouterr().out.split() == offered


def test_the_script_of_a_shell_is_written(capsys, monkeypatch):
    monkeypatch.setenv("_ROCR_COMPLETE", "bash_source")
    assert main([]) == 0
    assert "_ROCR_COMPLETE=bash_complete" in capsys.readouterr().out


def test_the_help_page_imports_nothing_heavy():
    code = (
        "import sys; from rocr.cli import main; main(['unlearn', '--help']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("words", "most"), [(["-c", "import rocr"], 0.15), (["-m", "rocr", "--help"], 0.25)])
def test_the_start_takes_little_time(words, most):
    def seconds():
        """CPU time, which other processes on the machine change little."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    taken = []
    for _ in range(5):
        before = seconds()
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        taken.append(seconds() - before)
    assert min(taken) < most
