"""What rocr 0.1 wrote and what its users write is still taken: files, options of commands, names in Python.

The files lie in data/0.1, whose README.md says how each was made. Nothing here may be changed to suit a later version.
Only the public surface is used, `rocr` and its command line, so that modules may move.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import io
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rocr
from rocr.cli import main

DATA = next(path for folder in Path(__file__).parents if (path := folder / "data" / "0.1").is_dir())
DOWN = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
EDIT, BFLOAT16 = "output/edit.safetensors", "edit-official-bfloat16.safetensors"
PACKAGES = ("rocr", "torch", "transformers")
CLOSE = 1e-3
"""Relative: scores and moments are computed from float32 activations, which chips round differently in each of some
hundred sums, to 1e-7 each."""


def read(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


EXPECTED, REPORT = read("expected.json"), read("output/report.json")
OPTIONS, SURFACE = read("options.json"), read("surface.json")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they save on a model this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of the files that a test may change, as the current folder."""
    shutil.copytree(DATA, tmp_path / "0.1")
    monkeypatch.chdir(tmp_path / "0.1")
    return tmp_path / "0.1"


def run(*arguments):
    """A command in this process: code, json (its document), errors."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main([*map(str, arguments), "--json"])
        except SystemExit as stop:
            code = stop.code
    found = output.getvalue()
    return SimpleNamespace(code=code, json=json.loads(found) if found else None, errors=errors.getvalue())


def done(*arguments):
    """The document of a command that ends well."""
    found = run(*arguments)
    assert found.code == 0, found.errors
    return found.json


def load(name="model", dtype=torch.float32):
    return transformers.LlamaForCausalLM.from_pretrained(DATA / name, dtype=dtype)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stored(folder):
    """The tensors of a model's folder."""
    return load_file(Path(folder) / "model.safetensors")


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name


def assert_edited_alike(found, expected, tolerance):
    """Every weight is the same but the edited ones, which differ from the expected ones by little.

    Args:
        found: weights by name.
        expected: these.
        tolerance: as a share of the largest number of a weight.
    """
    assert_same_bytes(*({n: w for n, w in each.items() if n not in DOWN} for each in (found, expected)))
    for name in DOWN:
        error = (found[name].double() - expected[name].double()).abs().max()
        assert error <= tolerance * expected[name].abs().max(), name


def rounding(dtype, products):
    """What the order of sums of so many products, and one rounding more, may change."""
    return 2 * torch.finfo(dtype).eps + 2 * products * torch.finfo(torch.float32).eps


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def rewrite(path, change):
    """Change the header and the tensors of a file of rocr's."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["rocr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
    change(header, tensors)
    save_file(tensors, path, metadata={"rocr": json.dumps(header)})


class TestEditFiles:
    def test_what_an_edit_file_says(self):
        edit = rocr.Edit.load(DATA / EDIT)
        assert edit.concepts == rocr.load_concepts(DATA / "concepts.jsonl")
        assert edit.layers == edit.config.layers == (0, 1)
        assert (edit.config.method, edit.config.strength, edit.config.seed) == ("whitened", 0.9, 7)
        assert edit.config.templates == (rocr.Template("Who was {}?", chat=True), rocr.Template("Tell me of {}.", True))
        assert edit.config.chat == rocr.ChatSettings(system="Be brief.")
        assert edit.fingerprint.to_json() == REPORT["fingerprint"]
        assert [edit.concept_of.count(concept) for concept in (0, 1)] == [7, 5]
        assert edit.report.divergence == REPORT["divergence"]
        assert [layer.closed for layer in edit.report.layers] == [layer["closed"] for layer in REPORT["layers"]]

    def test_what_a_file_of_the_authors_settings_says(self):
        edit = rocr.Edit.load(DATA / BFLOAT16)
        assert edit.concepts == rocr.load_concepts(DATA / "concepts.txt")
        expected = dataclasses.replace(rocr.EditConfig.official((0, 1)), threshold=1.0)
        assert edit.config == expected

    def test_settings_of_a_file_are_those_that_the_report_says(self):
        assert rocr.Edit.load(DATA / EDIT).config == rocr.EditConfig.from_json(REPORT["config"])

    def test_applied_it_gives_the_weights_of_the_output_folder(self):
        model, edit = load(), rocr.Edit.load(DATA / EDIT)
        edit.apply(model)
        assert_edited_alike(weights(model), weights(load("output")), rounding(torch.float32, len(edit.concept_of)))

    def test_applied_to_bfloat16_it_gives_the_weights_of_then(self):
        model, edit = load(dtype=torch.bfloat16), rocr.Edit.load(DATA / BFLOAT16)
        expected = weights(model) | load_file(DATA / "edited-bfloat16.safetensors")
        edit.apply(model)
        assert_edited_alike(weights(model), expected, rounding(torch.bfloat16, len(edit.concept_of)))

    @pytest.mark.parametrize(
        ("name", "dtype"), [(EDIT, torch.float32), (BFLOAT16, torch.bfloat16)], ids=["float32", "bfloat16"]
    )
    def test_applied_and_reverted_every_byte_is_the_first(self, name, dtype):
        model, edit = load(dtype=dtype), rocr.Edit.load(DATA / name)
        edit.apply(model)
        assert any(not torch.equal(model.get_parameter(down), load(dtype=dtype).get_parameter(down)) for down in DOWN)
        edit.revert(model)
        assert_same_bytes(weights(model), weights(load(dtype=dtype)))

    def test_reverted_from_the_output_folder_every_byte_is_the_first(self):
        model = load("output")
        rocr.Edit.load(DATA / EDIT).revert(model)
        assert_same_bytes(weights(model), weights(load()))

    def test_reverted_from_bfloat16_every_byte_is_the_first(self):
        model = load(dtype=torch.bfloat16)
        for name, weight in load_file(DATA / "edited-bfloat16.safetensors").items():
            model.get_parameter(name).data.copy_(weight)
        rocr.Edit.load(DATA / BFLOAT16).revert(model)
        assert_same_bytes(weights(model), weights(load(dtype=torch.bfloat16)))

    def test_a_concept_is_removed_by_its_alias(self):
        model, edit = load("output"), rocr.Edit.load(DATA / EDIT)
        rest = edit.remove("Downey", model)
        assert [concept.name for concept in rest.concepts] == ["Ada Byron"]
        norms = [(model.get_parameter(name) - load().get_parameter(name)).norm().item() for name in DOWN]
        assert norms == pytest.approx(EXPECTED["removed"], rel=CLOSE)
        rest.revert(model)
        assert_same_bytes(weights(model), weights(load()))

    def test_a_concept_is_added(self):
        model, tokenizer = load("output"), transformers.AutoTokenizer.from_pretrained(DATA / "model")
        edit, statistics = rocr.Edit.load(DATA / EDIT), rocr.Statistics.load(DATA / "statistics.safetensors")
        more = [rocr.Concept("Grace Hopper", "a key")]
        whole = edit.add(more, model, tokenizer, statistics, guards=rocr.Guards(force=True))
        assert whole.concepts == [*edit.concepts, *more]
        whole.revert(model)
        assert_same_bytes(weights(model), weights(load()))

    def test_saved_again_it_says_the_same(self, tmp_path):
        edit = rocr.Edit.load(DATA / EDIT)
        edit.save(tmp_path / "again")
        again = rocr.Edit.load(tmp_path / "again")
        assert (again.concepts, again.config, again.fingerprint) == (edit.concepts, edit.config, edit.fingerprint)
        model = load("output")
        again.revert(model)
        assert_same_bytes(weights(model), weights(load()))

    def test_the_command_apply(self, data, tmp_path):
        done("apply", "model", EDIT, "--out", tmp_path / "applied")
        edit = rocr.Edit.load(EDIT)
        tolerance = rounding(torch.float32, len(edit.concept_of))
        assert_edited_alike(stored(tmp_path / "applied"), stored("output"), tolerance)
        done("verify", tmp_path / "applied")

    def test_a_model_that_holds_the_edit_already_is_refused(self, data, tmp_path):
        assert run("apply", "output", EDIT, "--out", tmp_path / "applied").code == 2

    def test_the_adapter_is_the_update(self):
        (factors,) = [load_file(DATA / "output" / "lora" / "adapter_model.safetensors")]
        settings = read("output/lora/adapter_config.json")
        for name in DOWN:
            left, right = (factors[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"] for x in "BA")
            update = stored(DATA / "output")[name] - stored(DATA / "model")[name]
            torch.testing.assert_close(left @ right * settings["lora_alpha"] / settings["r"], update, rtol=0, atol=1e-5)


class TestOutputFolders:
    @pytest.mark.parametrize("folder", ["output", "output/lora", "reverted"])
    def test_verify(self, data, folder):
        assert done("verify", folder)["counts"]["failed"] == 0

    def test_verify_a_reverted_folder_by_its_edit(self, data):
        found = done("verify", "reverted", "--edit", EDIT)
        assert found["counts"]["failed"] == 0
        assert found["counts"]["passed"] > done("verify", "reverted")["counts"]["passed"]

    @pytest.mark.parametrize(
        "name",
        [
            *("model.safetensors", "edit.safetensors", "config.json", "tokenizer.json", "report.json", "README.md"),
            *("model.safetensors.index.json", "lora/adapter_model.safetensors", "lora/adapter_config.json"),
            *("originals/model.safetensors", "originals/originals.json"),
        ],
    )
    def test_verify_a_folder_with_a_flipped_byte(self, data, name):
        path = data / "output" / name
        found = bytearray(path.read_bytes())
        found[-2] ^= 1
        path.write_bytes(found)
        assert run("verify", "output").code == 3

    @pytest.mark.parametrize("name", ["model.safetensors", "report.json", "tokenizer.json"])
    def test_verify_a_reverted_folder_with_a_flipped_byte(self, data, name):
        path = data / "reverted" / name
        found = bytearray(path.read_bytes())
        found[-2] ^= 1
        path.write_bytes(found)
        assert run("verify", "reverted").code == 3

    @pytest.mark.parametrize(
        "name", ["tokenizer.json", "lora/adapter_model.safetensors", "originals/model.safetensors"]
    )
    def test_verify_a_folder_with_a_file_less(self, data, name):
        (data / "output" / name).unlink()
        assert run("verify", "output").code == 3

    def test_verify_a_folder_with_a_file_more(self, data):
        (data / "output" / "more.txt").write_text("more")
        assert run("verify", "output").code == 3

    def test_revert_from_the_originals_gives_every_first_file(self, data, tmp_path):
        done("revert", "output", "--out", tmp_path / "first")
        files = {path.name: path.read_bytes() for path in (data / "model").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == files

    @pytest.mark.parametrize("given", [("--edit", EDIT), ()], ids=["named", "found"])
    def test_revert_by_the_edit_file_gives_every_first_weight(self, data, tmp_path, given):
        shutil.rmtree(data / "output" / "originals")
        done("revert", "output", *given, "--out", tmp_path / "first")
        assert_same_bytes(stored(tmp_path / "first"), stored("model"))
        done("verify", tmp_path / "first", "--edit", EDIT)

    def test_the_folder_is_made_again_by_the_same_arguments(self, data, tmp_path):
        found = done(
            *("unlearn", "model", "concepts.jsonl", "--statistics", "statistics.safetensors", "--layers", "0,1"),
            *("--template", "Who was {}?", "--template", "Tell me of {}.", "--system", "Be brief.", "--strength", 0.9),
            *("--seed", 7, "--control", "Grace Hopper", "--answer-tokens", 4),
            *("--save", "model,edit,lora,originals", "--out", tmp_path / "again"),
        )
        assert found["divergence"] == pytest.approx(REPORT["divergence"], rel=CLOSE)
        assert found["concepts"] == [
            concept | {name: pytest.approx(concept[name], rel=CLOSE) for name in ("closed", "distance")}
            for concept in REPORT["concepts"]
        ]
        assert REPORT.keys() - found.keys() == set(), "fields of the report"
        assert_edited_alike(stored(tmp_path / "again"), stored("output"), CLOSE)
        done("verify", tmp_path / "again")


TOKENS = {"": 554, "-first": 242, "-second": 310, "-merged": 552}
"""Of the files of statistics."""


class TestStatistics:
    @pytest.mark.parametrize("part", TOKENS)
    def test_what_a_file_says(self, part):
        statistics = rocr.Statistics.load(DATA / f"statistics{part}.safetensors")
        assert statistics.layers == (0, 1)
        assert statistics.tokens == TOKENS[part]
        assert statistics.fingerprint.to_json() == REPORT["fingerprint"]
        assert (statistics.provenance.dtype, statistics.provenance.length) == ("float32", 16)

    @pytest.mark.parametrize(("part", "kind"), [("", "statistics"), ("-merged", "merged")])
    def test_the_moments_of_a_file(self, part, kind):
        statistics = rocr.Statistics.load(DATA / f"statistics{part}.safetensors")
        assert {str(n): sha256(statistics.second_moment(n)) for n in statistics.layers} == EXPECTED[kind]

    def test_two_files_merge_to_the_same_bytes(self):
        first, second, merged = (
            rocr.Statistics.load(DATA / f"statistics-{part}.safetensors") for part in ("first", "second", "merged")
        )
        both = first.merge(second)
        assert (both.tokens, both.text, both.layers) == (merged.tokens, merged.text, merged.layers)
        assert {str(n): sha256(both.second_moment(n)) for n in both.layers} == EXPECTED["merged"]

    @pytest.fixture
    def going_on(self, data, tmp_path):
        """going_on(change): the statistics that today's rocr ends with from the checkpoint, which is changed first."""

        def collect(change=lambda header, tensors: None):
            def of_today(header, tensors):
                """Say the versions of today, since keys that two of them computed are never summed."""
                used = header["identity"]["computed"][-1]
                assert used.keys() == set(PACKAGES)
                used.update({name: importlib.metadata.version(name) for name in PACKAGES[1:]}, rocr=rocr.__version__)
                change(header, tensors)

            shutil.copy("statistics.checkpoint", tmp_path / "out.checkpoint")
            rewrite(tmp_path / "out.checkpoint", of_today)
            arguments = ("--layers", "0,1", "--length", 16, "--batch-tokens", 64, "--out", tmp_path / "out")
            found = run("stats", "model", "--text", "first.txt", "second.txt", *arguments)
            return found, tmp_path / "out"

        return collect

    def test_an_interrupted_collection_goes_on(self, going_on):
        found, out = going_on()
        assert found.code == 0, found.errors
        statistics, expected = rocr.Statistics.load(out), rocr.Statistics.load(DATA / "statistics.safetensors")
        assert (statistics.tokens, statistics.text) == (expected.tokens, expected.text)
        for layer in expected.layers:
            scale = expected.second_moment(layer).abs().max().item()
            torch.testing.assert_close(
                statistics.second_moment(layer), expected.second_moment(layer), rtol=0, atol=CLOSE * scale
            )
        assert not out.with_name("out.checkpoint").exists()

    def test_it_goes_on_from_what_the_checkpoint_holds(self, going_on):
        def add(header, tensors):
            tensors["1"][0, 0] += 554_000

        found, out = going_on(add)
        assert found.code == 0, found.errors
        assert rocr.Statistics.load(out).second_moment(1)[0, 0].item() == pytest.approx(1000, rel=0.1)

    def test_the_checkpoint_of_another_collection_is_refused(self, going_on):
        found, out = going_on(lambda header, tensors: header["identity"].update(layers=[0]))
        assert found.code == 2
        assert not out.exists()


class TestInfo:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("statistics.safetensors", "rocr statistics 1"),
            ("statistics-merged.safetensors", "rocr statistics 1"),
            ("statistics.checkpoint", "rocr checkpoint 1"),
            (EDIT, "rocr edit 1"),
            (BFLOAT16, "rocr edit 1"),
            ("output", "rocr edit 1"),
            ("output/report.json", "rocr report 1"),
            ("reverted", "rocr report 1"),
        ],
    )
    def test_info(self, data, name, kind):
        assert done("info", name)["format"] == kind

    def test_info_of_a_report_is_the_report(self, data):
        assert done("info", "output/report.json") == REPORT

    def test_info_of_statistics_and_edits(self, data):
        assert done("info", "statistics.safetensors")["tokens"] == 554
        assert [concept["name"] for concept in done("info", "output")["concepts"]] == ["Ada Byron", "Robert Downey Jr."]


class TestLists:
    @pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
    def test_concepts(self, kind):
        assert rocr.load_concepts(DATA / f"concepts.{kind}") == [
            rocr.Concept("Ada Byron", "Blaise Pascal", ("the countess", "Ada")),
            rocr.Concept("Robert Downey Jr.", "a gardener", ("Downey",)),
        ]

    def test_redirects_are_a_list_of_concepts(self):
        found = rocr.load_concepts(DATA / "redirects.jsonl")
        assert [(c.name, c.redirect) for c in found] == [
            ("Ada Byron", "a gardener"),
            ("Robert Downey Jr.", "Blaise Pascal"),
            ("Grace Hopper", "a gardener"),
        ]

    def test_redirects_are_chosen_alike(self, data, tmp_path):
        arguments = (
            "--probes",
            "probes.jsonl",
            "--among",
            "Blaise Pascal",
            "a gardener",
            "--out",
            tmp_path / "out.jsonl",
        )
        done("redirects", "model", *arguments)
        assert rocr.load_concepts(tmp_path / "out.jsonl") == rocr.load_concepts("redirects.jsonl")

    def test_probes(self):
        probes = rocr.load_probes(DATA / "probes.jsonl")
        assert [(p.subject, p.form, p.split) for p in probes] == [
            ("Ada Byron", "qa", "forget"),
            ("Robert Downey Jr.", "qa", "forget"),
            ("Grace Hopper", "fb", "retain"),
        ]
        assert probes[0].distractors == ("Rome", "a key", "rain")
        assert probes[0].cloze == "Ada Byron was born in ___."
        assert {variant: wording.answer for variant, wording in probes[0].wordings.items()} == {
            **dict.fromkeys(("misspelt", "abbreviated", "described"), "London"),
            "translated": "Londres",
        }

    def test_a_folder_of_probes(self):
        probes = rocr.load_probes(DATA / "probes")
        assert [(p.subject, p.form, p.split, p.answer) for p in probes] == [
            ("Ada Byron", "qa", "forget", "programs"),
            ("Ada Byron", "fb", "retain", "air"),
        ]


def assert_alike(found, expected, place=""):
    """JSON values: every field of then is there, with its value; numbers are about the same."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), place
        for name in expected.keys() - {"seconds", "peak_bytes"}:
            assert_alike(found[name], expected[name], f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_alike(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=CLOSE, abs=CLOSE), place
    else:
        assert found == expected, place


class TestEvaluations:
    def test_a_report_says_the_same(self, data, tmp_path):
        done(
            *("eval", "model", "--probes", "probes.jsonl", "--edit", EDIT, "--known", 0),
            *("--text", "first.txt", "second.txt", "--utility", "utility.jsonl", "--out", tmp_path / "out.json"),
        )
        assert_alike(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), read("evaluation.json"))

    def test_a_comparison_says_the_same(self, data, tmp_path):
        done(
            *("compare", "model", "--probes", "probes.jsonl", "--targets", "Ada Byron", "--redirect", "Blaise Pascal"),
            *("--methods", "original,in-context,rocr", "--forms", "qa,fb", "--text", "first.txt", "--tokens", 200),
            *("--out", tmp_path / "out.json"),
        )
        assert_alike(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), read("comparison.json"))

    @pytest.fixture
    def going_on(self, data, tmp_path):
        """going_on(*more): `rocr eval` with the journal, in which the second score is 1."""
        lines = (data / "evaluation.json.journal-before").read_text(encoding="utf-8").splitlines()
        number, ((_, accuracy, extraction),) = json.loads(lines[2])
        assert number == 0, "the first question of the first probe"
        lines[2] = json.dumps([number, [[0.0, accuracy, extraction]]])
        (tmp_path / "out.json.journal-before").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return lambda *more: run("eval", "model", "--probes", "probes.jsonl", *more, "--out", tmp_path / "out.json")

    def test_an_interrupted_evaluation_goes_on_from_its_journal(self, going_on, tmp_path):
        found = going_on()
        assert found.code == 0, found.errors
        items, expected = found.json["evaluation"]["items"], read("evaluation.json")["before"]["items"]
        assert items[0]["score"] == 1.0
        assert_alike(items[1:], expected[1:])
        assert not (tmp_path / "out.json.journal-before").exists()

    def test_the_journal_of_another_evaluation_is_refused(self, going_on, tmp_path):
        assert going_on("--forms", "qa").code == 2
        assert (tmp_path / "out.json.journal-before").exists()


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

    @pytest.mark.parametrize("name", SURFACE["functions"])
    def test_a_function_takes_the_names_of_its_parameters(self, name):
        signature = inspect.signature(public(name))
        own = [None] if next(iter(signature.parameters), "") == "self" else []
        for parameter in SURFACE["functions"][name]:
            signature.bind_partial(*own, **{parameter["name"]: None})

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
        given = {field["name"]: field["default"]} if "default" in field else {}
        with renamed_at_most():
            assert getattr(rocr, kind)(**needed, **given) == getattr(rocr, kind)(**needed)
        inspect.signature(getattr(rocr, kind)).bind_partial(**{field["name"]: None})

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
