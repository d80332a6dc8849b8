"""--config: what a file of options may hold, how the command line replaces it, and how an output repeats its run."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rocr.cli.config_file import ALTERNATIVES, NOT_WRITTEN, config_of, settings_text
from rocr.cli.main import main, program
from rocr.errors import InputError
from rocr.io.toml import read_toml, write_toml

ROOT = Path(__file__).resolve().parents[2]
UNLEARN = program.commands["unlearn"]
EXAMPLES = {
    "seed": 7, "tokens": 500, "threads": 2, "lora_rank": 3, "answer_tokens": 8, "layers": [1, 2], "ridge": 2,
    "save": ["model", "edit"], "gamma": 1.5, "method": "projected", "key_tokens": "last", "variants": "spelling",
    "keys_per_concept": "all", "token_schedule": "ramp", "reach": "gradual", "quantised": "keep", "dtype": "float16",
    "gguf_type": "f16", "date": "2031-01-02", "force": True, "text": ["a.txt", "b.txt"], "concept": ["A", "B"],
}  # fmt: skip
"""A value of options that do not take any text or number."""


@pytest.fixture
def write(tmp_path):
    """write(text): a file with a text or bytes; its path."""

    def run(text):
        place = tmp_path / "edit.toml"
        place.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(place)

    return run


def context_of(*words):
    return UNLEARN.make_context("unlearn", [str(word) for word in words])


def given_of(context):
    """Values that the file or the command line gives."""
    default = (click.core.ParameterSource.DEFAULT, None)
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) not in default and name != "config"
    }


def example_of(parameter):
    if parameter.name in EXAMPLES:
        return EXAMPLES[parameter.name]
    if getattr(parameter, "is_flag", False):
        return True
    if parameter.multiple:
        return ["a text", 'of "two"']
    return 0.5 if parameter.type is click.FLOAT else "a text"


OPTIONS = [parameter for parameter in UNLEARN.params if parameter.name not in ("config", "json", "debug")]


@pytest.mark.parametrize("parameter", OPTIONS, ids=lambda parameter: parameter.name)
def test_every_option_is_read_from_a_file_and_written_for_the_next_run(parameter, write):
    value = example_of(parameter)
    needed = {} if parameter.name == "model" else {"model": "m"}
    context = context_of("--config", write(write_toml({**needed, parameter.name: value})))
    expected = tuple(value) if isinstance(value, list) else value
    assert given_of(context) == {**needed, parameter.name: expected}
    written = read_toml(settings_text(context, None))
    assert written == {**needed, **({} if parameter.name in NOT_WRITTEN else {parameter.name: value})}


def test_the_file_is_that_of_the_same_words(write):
    words = ("m", "list.txt", "--layers", "1-3", "--save", "edit,lora", "--text", "a", "b", "--ask", 'Who is "{}"?')
    first = settings_text(context_of(*words, "--out", "one", "--no-answers", "--ridge", "1e-5"), "0" * 64)
    again = context_of("--config", write(first), "--out", "two")
    assert settings_text(again, "0" * 64) == first
    assert "one" not in first and read_toml(first)["layers"] == [1, 2, 3] and read_toml(first)["ridge"] == 1e-5
    assert given_of(again)["text"] == ("a", "b")


def test_the_command_line_wins(write):
    place = write('model = "m"\nconcepts = "list.txt"\nridge = 2\ntext = ["a"]\nsave = "edit"\nno-answers = true\n')
    found = given_of(context_of("other", "--config", place, "--ridge", "3", "--text", "b", "c"))
    assert found == {
        **{"model": "other", "concepts": "list.txt", "ridge": 3.0, "text": ("b", "c"), "save": ("edit",)},
        "no_answers": True,
    }


@pytest.mark.parametrize(("one", "other"), [*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)])
def test_an_option_takes_the_place_of_the_one_that_it_excludes(one, other, write):
    parameters = {parameter.name: parameter for parameter in UNLEARN.params}
    value = example_of(parameters[other])
    place = write(write_toml({"model": "m", "ridge": 2, other: value}))
    if one == "concepts":
        words = ["m", "list.txt"]
    elif parameters[one].is_flag:
        words = [parameters[one].opts[0]]
    else:
        own = example_of(parameters[one])
        words = [f"{parameters[one].opts[0]}={own[0] if isinstance(own, list) else own}"]
    assert set(given_of(context_of(*words, "--config", place))) == {"model", "ridge", one}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ridg = 2", "line 1: 'ridg' is not an option. Did you mean ridge?"),
        (
            "\n# a line\n\ntemplat-weight = 2",
            "line 4: 'templat-weight' is not an option. Did you mean template_weight?",
        ),
        ("[settings]\nridge = 1", "line 1: 'settings' is not an option."),
        ('"a key" = 1', "line 1: 'a key' is not an option."),
        ("a.b = 1", "line 1: 'a' is not an option."),
        ("json = true", "line 1: json is given on the command line only."),
        ('config = "a"', "line 1: config is given on the command line only."),
        ("held-weight = 1\nheld_weight = 1", "line 2: held_weight is given twice, with - and with _."),
        ('ridge = "2"', "line 1: ridge must be a number, not '2' (a text)."),
        ("ridge = true", "line 1: ridge must be a number, not 'True' (true or false)."),
        ("seed = 1.0", "line 1: seed must be a whole number, not '1.0' (float)."),
        ("seed = -1", "line 1: seed: '-1' is not a whole number from 0 to 9,223,372,036,854,775,807."),
        ("force = 1", "line 1: force must be true or false, not '1' (int)."),
        ("method = 3", "line 1: method must be a text in quotes, not '3' (int)."),
        ('method = "x"', "line 1: method: 'x' is not one of 'whitened', 'projected'."),
        ('text = "a.txt"', 'line 1: text must be an array of texts such as ["a", "b"], not \'a.txt\' (a text).'),
        ("text = [1]", "line 1: text must be an array of texts"),
        ("text = []", "line 1: text must be an array of texts"),
        ("layers = [1.5]", 'line 1: layers must be an array such as [4, 5] or a text such as "4-6"'),
        ("layers = [1, 1]", "line 1: layers: '1,1' names a layer twice."),
        ("layers = [true]", "line 1: layers must be an array"),
        ('save = "all"', "line 1: save: --save takes model, gguf, lora"),
        ("save = [1]", "line 1: save must be an array"),
        ("model = {}", "line 1: model must be a text in quotes, not '{}' (a table)."),
        ("date = 2031-01-02", "line 1: date must be a text in quotes, not '2031-01-02' (date)."),
        ('concepts_sha256 = "abc"', "concepts_sha256 must be a sha256 of 64 hexadecimal digits"),
        ("ridge = ", "is not TOML:"),
        ("ridge = 1\nridge = 2", "is not TOML:"),
        ("x = " + "[" * 5000, "is not TOML: it is nested too deeply."),
        (b"\xff", "is not UTF-8."),
        ("#" * (2**20 + 1), "is larger than 1 MiB"),
    ],
    ids=lambda part: repr(part)[:30],
)
def test_a_key_or_value_that_is_not_an_option_is_refused(text, sentence, write, capsys):
    place = write(text)
    assert main(["unlearn", "--config", place, "--out", "o"]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors and place in errors and errors.count("\n") == 1 and len(errors) < 500


@pytest.mark.parametrize(
    ("place", "sentence"), [("nowhere.toml", "does not exist"), (".", "is a folder"), ("/dev/null", "not a regular")]
)
def test_what_is_no_file_is_refused(place, sentence, capsys):
    assert main(["unlearn", "--config", place]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_without_a_model_leaves_it_missing(write, capsys):
    assert main(["unlearn", "--config", write("ridge = 1")]) == 2
    assert "Missing argument 'MODEL'." in capsys.readouterr().err


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('"\\\n\r\t\b\f\x00\x1f\x7f\x80\u2028\U0001f600é')
def test_any_text_comes_back(text):
    assert read_toml(write_toml({"a": text, "b": [text, ""]})) == {"a": text, "b": [text, ""]}
    assert write_toml({"a": text}).count("\n") == 1


@settings(max_examples=50)
@given(st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1) | st.booleans())
def test_any_number_comes_back(value):
    found = read_toml(write_toml({"a": value, "b": [3, 4]}))
    assert found == {"a": value, "b": [3, 4]} and type(found["a"]) is type(value)


def test_half_of_a_surrogate_pair_cannot_be_written():
    with pytest.raises(UnicodeEncodeError):
        settings_text(context_of("m\udce9"), None)


def test_a_list_that_changed_is_said(files, write, command, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("Ada Byron -> Blaise Pascal\n", encoding="utf-8")
    values = {"model": str(files.model), "concepts": str(names), "statistics": str(files.statistics)}
    text = write_toml({**values, "dry_run": True, "concepts_sha256": hashlib.sha256(names.read_bytes()).hexdigest()})
    same = command("unlearn", "--config", write(text))
    assert same.code == 0 and "list of concepts" not in same.errors, same.errors
    names.write_text("Ada Byron -> a gardener\n", encoding="utf-8")
    changed = command("unlearn", "--config", write(text))
    assert changed.code == 0
    assert re.search(r"The list of concepts has the sha256 \w{12}; that of the run that wrote .* had", changed.errors)
    other = command("unlearn", files.model, names, "--config", write(text))
    assert other.code == 0 and "list of concepts" not in other.errors, "the command line names its own list"
    assert config_of(context_of("m", "--config", write('concepts_sha256 = "' + "0" * 64 + '"'))).concepts_sha256


def test_the_output_has_the_options_of_its_run_and_is_verified_with_and_without_them(files, command, digests):
    found = read_toml((files.edited / "edit.toml").read_text(encoding="utf-8"))
    assert found == {
        **{"model": str(files.model), "concept": ["Ada Byron"], "redirect": "Blaise Pascal", "layers": [1, 2]},
        **{"force": True, "statistics": str(files.statistics), "no_answers": True},
    }
    assert "report.json, edit.toml and edit.safetensors name the concepts or" in (files.edited / "README.md").read_text(
        encoding="utf-8"
    )
    assert digests(files.edited)["edit.toml"] in (files.edited / "SHA256SUMS").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_verify_and_revert_know_the_file(files, command, concept, tmp_path):
    out, reverted = tmp_path / "out", tmp_path / "reverted"
    given = ("--statistics", files.statistics, "--save", "model,edit,originals")
    assert command("unlearn", files.model, *concept, *given, "--out", out).code == 0
    assert command("verify", out).code == 0
    edited = command("unlearn", out, *concept, *given[:2], "--out", tmp_path / "twice", "--redirect", "a gardener")
    assert edited.code in (0, 2), edited.errors  # statistics of the first model
    assert command("revert", out, "--out", reverted).code == 0
    assert not (reverted / "edit.toml").exists()
    assert command("apply", files.model, out / "edit.safetensors", "--out", tmp_path / "applied").code == 0
    assert not (tmp_path / "applied" / "edit.toml").exists()
    assert command("verify", tmp_path / "applied").code == 0
    (out / "edit.toml").write_text("ridge = 3\n", encoding="utf-8")
    done = command("verify", out)
    assert done.code == 3 and "edit.toml (sha256" in done.errors


TIMES = {"report.json"}
"""Files of an output that hold the seconds that a run took."""


@pytest.mark.thorough
def test_a_run_is_repeated_to_the_same_bytes_by_real_processes(files, tmp_path, digests):
    names = tmp_path / "people.txt"
    names.write_text("Ada Byron | the countess -> Blaise Pascal\nGrace Hopper\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, "-m", "rocr", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done

    given = ("--redirect", "a gardener", "--text", files.text, "--layers", "1,2", "--tokens", 500, "--force")
    more = ("--ask", 'What is "{}"?\nSay it.', "--save", "model,edit,lora,originals", "--template", "Ünï {}")
    run("unlearn", files.model, "people.txt", *given, *more, "--answer-tokens", 3, "--ridge", "1e-1", "--out", "out")
    run("unlearn", "--config", "out/edit.toml", "--out", "again")
    first, second = digests(tmp_path / "out"), digests(tmp_path / "again")
    assert first.keys() == second.keys() >= {"edit.toml", "edit.safetensors", "model.safetensors", "README.md"}
    assert {name for name in first if first[name] != second[name]} == TIMES
    run("verify", "again")
    changed = run("unlearn", "--config", "out/edit.toml", "--out", "other", "--ridge", 5, "--save", "edit")
    assert "list of concepts" not in changed.stderr
    other = digests(tmp_path / "other")
    assert other["edit.safetensors"] != first["edit.safetensors"] and "model.safetensors" not in other
    assert read_toml((tmp_path / "other" / "edit.toml").read_text(encoding="utf-8"))["ridge"] == 5.0


def test_an_error_in_the_file_is_an_input_error(write):
    with pytest.raises(InputError):
        context_of("--config", write("nonsense = 1"))
