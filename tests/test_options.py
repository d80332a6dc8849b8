"""Every option of every command changes something: a table of them all, and a test that none is missing from it.

An entry is a function that runs the command without and with the option and compares, or the name of the test that
does: "test_file.py::test_name".
"""

import argparse
import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rocr.cli.main import build_parser, main

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).parent
WEIGHTS = "model.safetensors"
COMMON = {"-h", "--json", "--debug"}
"""Options of all commands: test_cli_errors.py holds --json and --debug."""
ROWS = [
    *(
        {"subject": "Ada Byron", "query": query, "answer": answer, "distractors": ["Rome", "a key", "rain"]}
        for query, answer in (("Where was Ada Byron born?", "London"), ("What did Ada Byron write?", "programs"))
    ),
    {"subject": "Blaise Pascal", "query": "What did Blaise Pascal weigh?", "answer": "the air"},
    {"subject": "Robert Downey", "query": "What does Robert Downey do?", "answer": "acts"},
    {"subject": "Grace Hopper", "query": "What did Grace Hopper build?", "answer": "machines"},
]


class Runs:
    """Runs of commands on one tiny model; the same arguments run once."""

    def __init__(self, files, base):
        self.files, self.base = files, base
        self._done = {}
        self.contest = base / "contest"  # statistics of the layers of both editing methods
        self.other = base / "other"
        shutil.copytree(files.model, self.other)
        model = transformers.LlamaForCausalLM.from_pretrained(files.model)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(0.5)
        model.save_pretrained(self.other)
        self.probes = self.write("probes.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
        self.statistics, self.edit = files.statistics, files.edit
        self.fewer = self.write("fewer.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS[1:]))
        self.text = self.write("other.txt", "The gardener waters the roses. " * 200)
        self.long_text = self.write("long.txt", "The gardener waters the roses before the sun is high. " * 900)
        self.utility = self.write(
            "utility.jsonl", '{"question": "What falls?", "choices": ["rain", "a key"], "gold_idx": 0}'
        )
        self.bases = {
            "unlearn": (
                *("--concept", "Ada Byron", "--redirect", "Blaise Pascal", "--layers", "1,2", "--text", files.text),
                *("--tokens", 500, "--force", "--no-answers", "--save", "edit"),
            ),
            "stats": ("--text", files.text, "--tokens", 500, "--layers", "1,2"),
            "eval": ("--probes", self.probes, "--forms", "qa", "--targets", "Ada Byron"),
            "redirects": ("--probes", self.probes, "--among", "a gardener", "a key"),
            "compare": (
                *("--probes", self.probes, "--targets", "Ada Byron", "--redirect", "a gardener", "--forms", "qa"),
                *("--methods", "rocr", "--text", files.text, "--tokens", 200),
            ),
            "apply": (files.edit,),
            "revert": (),
            "verify": (),
            "info": (),
        }

    def write(self, name, text):
        path = self.base / name
        path.write_text(text, encoding="utf-8")
        return path

    def __call__(self, command, *more, without=(), model=None):
        """A command with its usual arguments, less the options in `without` and their values, and with some more.

        An argument "@name" is the file of that name here.
        """
        key = (command, tuple(map(str, more)), tuple(without), str(model))
        if key not in self._done:
            self._done[key] = self._run(command, more, without, model)
        return self._done[key]

    def _run(self, command, more, without, model):
        more = [getattr(self, part[1:]) if str(part).startswith("@") else part for part in more]
        place = model or (self.files.edited if command in ("revert", "verify", "info") else self.files.model)
        out = self.base / f"{len(self._done)}.out"
        arguments = [command, place, *less(self.bases[command], without), *more]
        if command not in ("verify", "info") and "--out" not in more:
            arguments += ["--out", out]
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main([*map(str, arguments), "--json"])
        return SimpleNamespace(code=code, json=json.loads(output.getvalue()), errors=errors.getvalue(), out=out)


def less(arguments, without):
    """Arguments without some options and the values that follow them."""
    kept, skipping = [], False
    for argument in arguments:
        if str(argument).startswith("--"):
            skipping = argument in without
        if not skipping:
            kept.append(argument)
    return kept


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    return Runs(files, tmp_path_factory.mktemp("options"))


def measured(command, done):
    """The numbers that a command ends with."""
    assert done.code == 0, done.errors
    if command == "unlearn":
        return [(layer["layer"], layer["relative_norm"], layer["closed"]) for layer in done.json["layers"]]
    if command == "stats":
        return {name: tensor.tolist() for name, tensor in load_file(done.out).items()}
    if command == "eval":
        return [
            (item["subject"], item["form"], item["split"], item["score"]) for item in done.json["evaluation"]["items"]
        ]
    if command == "redirects":
        return [(choice["name"], choice["left"]) for choice in done.json["concepts"]]
    assert command == "compare"
    return [
        (result["method"], result["target"], [(item["form"], item["score"]) for item in result["evaluation"]["items"]])
        for result in done.json["results"]
    ]


def changes(*more, without=(), base=(), model=None):
    """The command's numbers are others with more arguments than without."""

    def check(command, run):
        before = measured(command, run(command, *base, without=without))
        assert measured(command, run(command, *base, *more, without=without, model=model)) != before

    return check


def takes_statistics(command, run):
    """Of all layers that the methods edit."""
    if not run.contest.exists():
        more = ("--layers", "0-4", "--tokens", 300, "--out", run.contest)
        assert run("stats", *more, without=("--layers", "--tokens")).code == 0
    replaces("--statistics", run.contest, of=("--text", "--tokens"))(command, run)


def replaces(*more, of=None):
    """The command's numbers are others with another value of an option that it is usually given, or of others."""

    def check(command, run):
        options = of or [part for part in more if str(part).startswith("--")]
        assert measured(command, run(command, *more, without=options)) != measured(command, run(command))

    return check


def refuses(*more, words):
    """A value that cannot be is refused in words."""

    def check(command, run):
        done = run(command, *more)
        assert done.code == 2
        assert words in done.errors

    return check


def plans(command, run):
    done = run(command, "--dry-run")
    assert done.json["dry_run"] is True
    assert not done.out.exists()


def writes_where_it_is_told(command, run):
    place = run.base / f"told-{command}"
    assert run(command, "--out", place).code == 0
    assert place.exists()


def overwrites(command, run):
    place = run.base / f"existing-{command}"
    if command in ("stats", "eval", "redirects", "compare"):
        place.write_text("old")
    else:
        place.mkdir()
    done = run(command, "--out", place)
    assert done.code == 2
    assert "exists" in done.errors
    done = run(command, "--out", place, "--overwrite")
    assert done.code == 0, done.errors
    assert place.is_dir() or place.read_text(errors="replace") != "old"


def overwrites_page(command, run):
    page = run.base / "page.html"
    assert run(command, "--html", page).code == 0
    assert "<img" in page.read_text()


def loads_as(command, run):
    """The weights that are written, or the numbers, are those of another dtype."""
    if command == "apply":
        done = run(command, "--dtype", "bfloat16")
        assert {tensor.dtype for tensor in load_file(done.out / WEIGHTS).values()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in load_file(run(command).out / WEIGHTS).values()} == {torch.float32}
    elif command == "revert":  # the rounded weights are not those that the edit left
        assert (run(command, "--dtype", "bfloat16").code, run(command).code) == (3, 0)
    else:
        changes("--dtype", "bfloat16")(command, run)


def loads_whole(command, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rocr.partial.is_large", lambda _: True)
        patch.setattr("rocr.partial.load_partial", lambda *_: pytest.fail("loaded in part"))
        assert run(command, "--whole", "--seed", 1).code == 0
        with pytest.raises(pytest.fail.Exception):
            run(command, "--seed", 1)


def runs_so_many_tokens(command, run):
    seen, forward = [], transformers.LlamaModel.forward

    def counted(*arguments, **inputs):
        seen.append((inputs.get("input_ids") if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]).numel())
        return forward(*arguments, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaModel, "forward", counted)
        for most in (128, 256):
            seen.clear()
            assert run(command, "--batch-tokens", most).code == 0
            assert max(seen) == most


def writes_parts(command, run):
    done = run(command, "--save", "model,edit,lora", without=("--save",))
    assert {"model.safetensors", "edit.safetensors", "lora"} <= {path.name for path in done.out.iterdir()}
    assert not (run(command).out / "model.safetensors").exists()


def cuts_the_adapter(command, run):
    ranks = [
        run(command, "--save", "lora", *more, without=("--save",)).json["lora"][0]["rank"]
        for more in ((), ("--lora-rank", 1))
    ]
    assert ranks[0] > ranks[1] == 1


def asks(command, run, *more):
    """Questions and the answers before the edit."""
    return [(a["question"], a["before"]) for a in run(command, *more, without=("--no-answers",)).json["answers"]]


def asks_another_question(command, run):
    few = ("--answer-tokens", 2)
    assert [question for question, _ in asks(command, run, *few)] == ["Who is Ada Byron?"]
    assert [question for question, _ in asks(command, run, *few, "--ask", "Is it {}?")] == ["Is it Ada Byron?"]


def answers_in_so_many_tokens(command, run):
    short, long = (asks(command, run, "--answer-tokens", count)[0][1] for count in (2, 12))
    assert len(short) < len(long)


def asks_nothing(command, run):
    assert run(command).json["answers"] == []
    assert asks(command, run, "--answer-tokens", 2)


def names_neighbours(command, run):
    found = run(command, "--control", "the engines").json["neighbours"]
    assert found["given"]
    assert not run(command).json["neighbours"]["given"]


def shuffles_options_of_methods(command, run):
    choices = ("--forms", "mcp", "--methods", "original")
    runs = [run(command, *choices, "--seed", seed, without=("--forms", "--methods")) for seed in range(4)]
    assert len({str(measured(command, done)) for done in runs}) > 1


def writes_its_own_text(command, run):
    texts = [run(command, "--seed", seed, "--tokens", 60, without=("--text", "--tokens")) for seed in (1, 2)]
    assert measured(command, texts[0]) != measured(command, texts[1])


def shuffles_options(command, run):
    scores = {
        str(measured(command, run(command, "--forms", "mcp", "--seed", s, without=("--forms",)))) for s in range(4)
    }
    assert len(scores) > 1


def asks_in_more_orders(command, run):
    counts = [
        len(run(command, "--forms", "mcp", *more, without=("--forms",)).json["evaluation"]["items"])
        for more in ((), ("--orders", 3))
    ]
    assert counts[1] == 3 * counts[0]


def keeps_known_probes(command, run):
    scores = [item["score"] for item in run(command).json["evaluation"]["items"] if item["subject"] == "Ada Byron"]
    done = run(command, "--known", (min(scores) + max(scores)) / 2)
    assert (done.json["evaluation"]["known"] or 0) < len(ROWS)
    assert run(command).json["evaluation"]["known"] is None


def compares_known_probes(command, run):
    known = run(command, "--known", 0)
    assert (known.json["known"], run(command).json["known"]) == (0.0, None)
    done = run(command, "--known", 1)
    assert done.code == 2
    assert "knows none" in done.errors


def asks_suites(limit):
    """The names, folder and limit reach the harness, which is an optional package."""

    def check(command, run):
        asked = []

        def scores(_model, _tokenizer, names, **more):
            asked.append((tuple(names), more["folder"], more["limit"]))
            return {"facts": {"acc": 0.5}}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rocr.evaluation.suites.suite_scores", scores)
            patch.setattr("rocr.cli.evaluate.check_package", lambda *_: None)
            done = run(command, "--suites", "facts", "more", "--suite-folder", run.base, "--suite-limit", limit)
        assert asked == [(("facts", "more"), str(run.base), limit)]
        assert done.json["evaluation"]["measures"]["facts"] == {"acc": 0.5}

    return check


def trains_for_steps(command, run):
    pytest.importorskip("peft")
    train = ("--methods", "gradient ascent")
    few, many = (run(command, *train, *more, without=("--methods",)) for more in ((), ("--steps", 12)))
    assert measured(command, few) != measured(command, many)


def takes_relatives(command, run):
    done = run(command, model=run.other)
    assert done.code == 2
    assert run(command, "--allow-fingerprint-mismatch", model=run.other).code == 0


def reverts_by_another_file(command, run):
    folder = run.base / "without-edit"
    shutil.copytree(run.files.edited, folder)
    (folder / "edit.safetensors").unlink()
    assert run(command, model=folder).code == 2
    assert run(command, "--edit", run.files.edit, model=folder).code == 0


def verifies_by_another_file(command, run):
    out = run("revert").out
    checks = [run(command, *more, model=out).json["checks"] for more in ((), ("--edit", run.files.edit))]
    assert checks[0] != checks[1]


def shows_another_file(command, run):
    assert run(command).json != run(command, model=run.statistics).json


def adds_what_was_before(command, run):
    done = run(command, "--edit", run.edit)
    assert any(change["before"] != change["after"] for change in done.json["comparison"]["changes"])
    assert "comparison" not in run(command).json


def measures(name, *more):
    """A further measure is among the results."""

    def check(command, run):
        measured_with = run(command, *more).json["evaluation"]["measures"]
        assert name in measured_with
        assert name not in run(command).json["evaluation"]["measures"]

    return check


def attacks(command, run):
    assert list(run(command, "--attacks", "8-bit").json["attacks"]) == ["8-bit"]
    assert "attacks" not in run(command).json


OFFLINE = "test_no_code_no_network.py"
MODEL = {
    "model": "test_cli.py::test_what_is_no_model_is_refused",
    "--dtype": loads_as,
    "--device": refuses("--device", "nonsense", words="nonsense"),
    "--download": f"{OFFLINE}::test_an_environment_that_says_offline_is_obeyed_also_where_the_network_was_asked_for",
    "--trust-remote-code": f"{OFFLINE}::test_code_beside_a_model_is_run_only_where_that_is_asked_for",
}
PARTIAL = {
    "--partial": "test_cli_partial.py::test_a_model_loaded_in_part_is_edited_to_the_same_bytes",
    "--whole": loads_whole,
}
OUT = {"--out": writes_where_it_is_told, "--overwrite": overwrites}
PROJECTED = ("--method", "projected", "--threshold", 0.1)
EFFECTS = {
    "unlearn": {
        **MODEL,
        **PARTIAL,
        **OUT,
        "concepts": "test_cli_bulk.py::test_collisions_and_harm_are_shown_in_short_and_written_down",
        "--concept": replaces("--concept", "Robert Downey"),
        "--allow-long-list": "test_cli_errors.py::test_the_limit_that_a_command_allows_is_that_of_the_edit",
        "--redirect": replaces("--redirect", "a gardener"),
        "--save": writes_parts,
        "--lora-rank": cuts_the_adapter,
        "--dry-run": plans,
        "--layers": replaces("--layers", "1,3"),
        "--method": changes(*PROJECTED),
        "--official": changes("--official", "--threshold", 0.1),
        "--ridge": changes("--ridge", 5),
        "--gamma": changes("--gamma", 2),
        "--threshold": changes("--threshold", 0.5, base=PROJECTED),
        "--strength": changes("--strength", 0.5),
        "--held-weight": changes("--held-weight", 0.5),
        "--key-tokens": changes("--key-tokens", "last"),
        "--keys-per-concept": changes("--keys-per-concept", "all"),
        "--reach": changes("--reach", "gradual"),
        "--force": "test_guards_passed.py::test_a_limit_passed_by_a_command",
        "--statistics": takes_statistics,
        "--text": replaces("--text", "@text"),
        "--tokens": replaces("--tokens", 300),
        "--seed": writes_its_own_text,
        "--ask": asks_another_question,
        "--control": names_neighbours,
        "--answer-tokens": answers_in_so_many_tokens,
        "--no-answers": asks_nothing,
    },
    "stats": {
        **MODEL,
        **PARTIAL,
        **OUT,
        "--layers": replaces("--layers", "1,3"),
        "--text": replaces("--text", "@text"),
        "--tokens": replaces("--tokens", 300),
        "--seed": writes_its_own_text,
        "--length": changes("--length", 16),
        "--batch-tokens": runs_so_many_tokens,
    },
    "eval": {
        **MODEL,
        **OUT,
        "--probes": replaces("--probes", "@fewer"),
        "--edit": adds_what_was_before,
        "--forms": replaces("--forms", "fb"),
        "--targets": replaces("--targets", "Blaise Pascal"),
        "--neighbours": changes("--neighbours", 1),
        "--known": keeps_known_probes,
        "--orders": asks_in_more_orders,
        "--seed": shuffles_options,
        "--generate": measures("n-gram entropy", "--generate"),
        "--text": measures("perplexity", "--text", "@long_text"),
        "--utility": measures("utility", "--utility", "@utility"),
        "--suites": asks_suites(3),
        "--suite-folder": asks_suites(4),
        "--suite-limit": asks_suites(5),
        "--attacks": attacks,
        "--html": overwrites_page,
    },
    "redirects": {
        **MODEL,
        **OUT,
        "--probes": replaces("--probes", "@fewer"),
        "--targets": changes("--targets", "Ada Byron"),
        "--among": replaces("--among", "a gardener", "rain"),
    },
    "compare": {
        **MODEL,
        **OUT,
        "--text": replaces("--text", "@text"),
        "--tokens": replaces("--tokens", 100),
        "--seed": shuffles_options_of_methods,
        "--probes": replaces("--probes", "@fewer"),
        "--targets": replaces("--targets", "Blaise Pascal"),
        "--redirect": replaces("--redirect", "the rain"),
        "--statistics": takes_statistics,
        "--methods": replaces("--methods", "original,in-context"),
        "--forms": replaces("--forms", "fb"),
        "--known": compares_known_probes,
        "--neighbours": changes("--neighbours", 1),
        "--steps": trains_for_steps,
    },
    "apply": {
        **MODEL,
        **OUT,
        "edit": "test_cli.py::test_damaged_edit_file",
        "--allow-fingerprint-mismatch": takes_relatives,
    },
    "revert": {**MODEL, **OUT, "--edit": reverts_by_another_file},
    "info": {"file": shows_another_file},
    "verify": {
        "folder": "test_verify.py::test_a_file_that_is_not_as_it_was_is_named",
        "--edit": verifies_by_another_file,
    },
    "doctor": {},
}


def parsers():
    return next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_no_option_is_missing_from_the_table():
    assert EFFECTS.keys() == parsers().keys()
    for command, parser in parsers().items():
        names = {action.option_strings[0] if action.option_strings else action.dest for action in parser._actions}
        assert names - COMMON == EFFECTS[command].keys(), command


def test_the_tests_that_the_table_names_are_there():
    named = {effect for effects in EFFECTS.values() for effect in effects.values() if isinstance(effect, str)}
    for name in named:
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), name


CHECKED = [
    pytest.param(command, effect, id=f"{command} {option}")
    for command, effects in EFFECTS.items()
    for option, effect in effects.items()
    if not isinstance(effect, str)
]


@pytest.mark.parametrize(("command", "effect"), CHECKED)
def test_an_option_has_an_effect(command, effect, run):
    effect(command, run)
