"""Options of commands and names in Python that rocr 0.1 took are still taken."""

import contextlib
import dataclasses
import inspect
import subprocess
import sys
import warnings

import pytest

import rocr
from rocr.cli import main
from tests.support.of_0_1 import DATA, EDIT, done, read, run

OPTIONS, SURFACE = read("options.json"), read("surface.json")
COMMANDS = {name: options for name, options in OPTIONS["options"].items() if name}
WITH_INPUT = [command for command in COMMANDS if command != "doctor"]
SHARED = ("--help", "--json")
"""Options that every command has, and that other tests here give."""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder in which nothing is named "none"."""
    return tmp_path_factory.mktemp("options")


def filled(values, place):
    """The values of an argument as options.json has them, with the names of folders."""
    listed = [values] if isinstance(values, str) else values or []
    return [value.replace("TMP", str(place)).replace("DATA", str(DATA)) for value in listed]


def ways(option, place):
    """Arguments, each a way to write an option with a value that rocr 0.1 takes."""
    name, values = option["names"][-1], filled(option.get("example"), place)
    found = [[name, *values] for name in option["names"]]
    found += [[name, choice] for choice in option.get("choices", [])[1:]]
    found += [[f"{name}={values[0]}"]] if option["values"] == "1" else []
    found += [[name, *values, name, option["again"]]] if "again" in option else []
    return found


def needed(command, option, place):
    """What a command needs beside an option: its arguments without a name, and its other options."""
    arguments, options = [], filled(option.get("beside"), place)
    for other in COMMANDS[command]:
        if other.get("positional") and other["names"][0] != option.get("instead of"):
            arguments += filled(other["example"], place)
        elif other.get("required") and not other.get("positional") and other["names"] != option["names"]:
            options += [other["names"][-1], *filled(other["example"], place)]
    return arguments, options


def options_of(commands, wanted):
    """Parameters of a test: each option of commands that is wanted, under its name."""
    return [
        pytest.param(command, option, id=f"{command} {option['names'][-1]}")
        for command in commands
        for option in COMMANDS[command]
        if not option.get("positional") and option["names"][-1] not in SHARED and wanted(option)
    ]


class TestOptions:
    """A command whose model is not there is refused for that, once all of its arguments are understood."""

    @pytest.mark.parametrize(("command", "option"), options_of(WITH_INPUT, lambda option: True))
    def test_an_option_is_taken(self, command, option, place):
        arguments, options = needed(command, option, place)
        for given in ways(option, place):
            found = run(command, *arguments, *given, *options)
            assert found.code == 2, given
            missing_package = "pip install" in found.json["error"]  # said of an option that is understood
            assert str(place / "none") in found.json["error"] or missing_package, (given, found.errors)

    @pytest.mark.parametrize(
        ("command", "option"), options_of(WITH_INPUT, lambda option: option["values"] in ("0", "1"))
    )
    def test_an_option_is_taken_before_the_model(self, command, option, place):
        arguments, options = needed(command, option, place)
        found = run(command, *ways(option, place)[0], *arguments, *options)
        assert found.code == 2
        assert str(place / "none") in found.json["error"] or "pip install" in found.json["error"], found.errors

    @pytest.mark.parametrize("command", WITH_INPUT)
    def test_an_option_that_never_was_is_refused_by_its_name(self, command, place):
        arguments, options = needed(command, {"names": []}, place)
        found = run(command, *arguments, *options, "--never-was")
        assert found.code == 2
        assert "--never-was" in found.json["error"]

    @pytest.mark.parametrize(
        ("command", "option"), options_of(WITH_INPUT, lambda option: "choices" in option or "type" in option)
    )
    def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_option(self, command, option, place):
        arguments, options = needed(command, option, place)
        found = run(command, *arguments, *options, option["names"][-1], "nonsense")
        assert found.code == 2
        assert option["names"][-1] in found.json["error"]
        assert "nonsense" in found.json["error"]

    @pytest.mark.parametrize(
        ("command", "names"),
        [
            pytest.param(command, names, id=f"{command} {' '.join(names)}")
            for command, groups in OPTIONS["exclusive"].items()
            for names in groups
        ],
    )
    def test_options_that_exclude_each_other(self, command, names, place):
        arguments, options = needed(command, {"names": []}, place)
        found = run(command, *arguments, *options, *names)
        assert found.code == 2
        assert all(name in found.json["error"] for name in names)

    @pytest.mark.parametrize("command", OPTIONS["options"], ids=lambda command: command or "rocr")
    def test_help_names_every_option(self, command, capsys):
        texts = []
        for name in ("-h", "--help"):
            with contextlib.suppress(SystemExit):
                assert main([*([command] if command else []), name]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
        for option in OPTIONS["options"][command]:
            assert option.get("positional") or option["names"][-1] in texts[0]
        if not command:
            assert all(name in texts[0] for name in COMMANDS)

    def test_the_version(self, capsys):
        with contextlib.suppress(SystemExit):
            assert main(["--version"]) == 0
        assert capsys.readouterr().out.split() == ["rocr", rocr.__version__]

    def test_the_version_of_the_module(self):
        found = subprocess.run([sys.executable, "-m", "rocr", "--version"], capture_output=True, text=True, check=True)
        assert found.stdout.split() == ["rocr", rocr.__version__]

    def test_doctor(self):
        assert done("doctor", "--debug")["rocr"]["version"] == rocr.__version__


def public(name):
    """What a name of the surface stands for, such as "ops.symmetrize"."""
    found = rocr
    for part in name.split("."):
        found = getattr(found, part)
    return found


OTHER = {
    **{"layers": (4, 5), "method": "projected", "ridge": 2.0, "relative_ridge": False, "gamma": 2.0, "threshold": 0.5},
    **{"relative_threshold": True, "strength": 0.5, "templates": ("{}",), "key_tokens": "last", "measure": "once"},
    **{"keys_per_concept": "all", "contexts": "official", "reach": "gradual", "held_weight": 0.5, "seed": 1},
    "chat": rocr.ChatSettings(system="Be brief."),
}
"""A value of each setting that is not its default."""
DEFAULTS = {
    **{"chat": rocr.ChatSettings(), "templates": rocr.EditConfig().templates, "aliases": (), "distractors": ()},
    **{"variables": {}, "wordings": {}, "measures": {}, "settings": {}},
}
"""Defaults of fields that surface.json cannot hold."""
REQUIRED = {
    "Template": {"text": "{}"},
    "Concept": {"name": "Ada Byron", "redirect": "a gardener"},
    "Evaluation": {"items": [], "probes": 0},
    "Probe": {"subject": "Ada Byron", "query": "Who?", "answer": "a countess"},
    "Progress": {"stage": "edit", "done": 1, "total": 2, "unit": "layers"},
}


@contextlib.contextmanager
def renamed_at_most():
    """Nothing is warned of but a name that is another one by now."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert all(issubclass(warning.category, (DeprecationWarning, FutureWarning)) for warning in found), found


class TestSurface:
    @pytest.mark.parametrize("name", SURFACE["names"]["rocr"])
    def test_a_name_is_there(self, name):
        assert getattr(rocr, name) is not None
        assert name in rocr.__all__

    @pytest.mark.parametrize(
        ("name", "keyword"),
        [
            pytest.param(name, parameter["name"], id=f"{name} {parameter['name']}")
            for name, parameters in SURFACE["functions"].items()
            for parameter in parameters
        ],
    )
    def test_a_function_takes_a_parameter_by_its_name(self, name, keyword):
        with renamed_at_most(), contextlib.suppress(rocr.RocrError, AttributeError, ValueError):
            try:
                public(name)(**{keyword: None})
            except TypeError as error:  # of what is missing, or of None
                assert "unexpected keyword" not in str(error), error

    @pytest.mark.parametrize("name", SURFACE["functions"])
    def test_a_function_takes_its_parameters_in_their_order(self, name):
        signature = inspect.signature(public(name))
        own = [None] if next(iter(signature.parameters), "") == "self" else []
        expected = [p["name"] for p in SURFACE["functions"][name] if "keyword only" not in p]
        bound = list(signature.bind(*own, *expected).arguments.items())[len(own) :]
        found = {parameter: value for parameter, value in bound if parameter in expected}
        assert all(parameter == value for parameter, value in found.items()), found

    @pytest.mark.parametrize("name", SURFACE["functions"])
    def test_a_function_needs_no_more_than_it_did(self, name):
        signature = inspect.signature(public(name))
        own = [None] if next(iter(signature.parameters), "") == "self" else []
        signature.bind(*own, **{p["name"]: None for p in SURFACE["functions"][name] if "required" in p})

    @pytest.mark.parametrize(
        ("kind", "field"),
        [
            pytest.param(kind, field, id=f"{kind} {field['name']}")
            for kind, fields in SURFACE["fields"].items()
            if kind not in ("Statistics", "Edit")  # made by functions, and of what these tests have no values for
            for field in fields
        ],
    )
    def test_a_class_takes_a_field_by_its_name(self, kind, field):
        needed = REQUIRED.get(kind, {})
        name = field["name"]
        given = {name: field["default"] if "default" in field else DEFAULTS[name]} if name not in needed else {}
        with renamed_at_most():
            assert getattr(rocr, kind)(**needed, **given) == getattr(rocr, kind)(**needed)

    @pytest.mark.parametrize("name", [field["name"] for field in SURFACE["fields"]["EditConfig"]])
    def test_a_setting_of_an_edit_has_an_effect_by_its_name(self, name):
        with renamed_at_most():
            changed = rocr.EditConfig(**{name: OTHER[name]})
        assert changed != rocr.EditConfig()

    @pytest.mark.parametrize("name", [field["name"] for field in SURFACE["fields"]["EditConfig"]])
    def test_a_setting_of_an_edit_is_read_from_a_file_by_its_name(self, name):
        value = dataclasses.replace(rocr.EditConfig(), **{name: OTHER[name]}).to_json().get(name, None)
        given = value if value is not None else OTHER[name]
        assert rocr.EditConfig.from_json({name: given}) != rocr.EditConfig.from_json({})

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            pytest.param(kind, field["name"], id=f"{kind}.{field['name']}")
            for kind in ("Statistics", "Edit", "Evaluation", "Concept", "Probe", "Progress")
            for field in [*SURFACE["fields"][kind], *({"name": n} for n in SURFACE["properties"].get(kind, []))]
        ],
    )
    def test_a_result_has_its_field(self, kind, name):
        if kind in ("Statistics", "Edit"):
            found = (
                rocr.Edit.load(DATA / EDIT) if kind == "Edit" else rocr.Statistics.load(DATA / "statistics.safetensors")
            )
        else:
            found = getattr(rocr, kind)(**REQUIRED[kind])
        with renamed_at_most():
            getattr(found, name)
