"""Runs of commands without and with an option, and checks that it has an effect."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rocr.cli.main import main
from tests.support.changed_lists import changed_lists

WEIGHTS = "model.safetensors"
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
        self.comparison = base / "comparison"  # statistics of the layers of both editing methods
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
            "ask": ("Who is Ada Byron?", "--answer-tokens", 4),
            **dict.fromkeys(("revert", "verify", "info"), ()),
        }
        of_lists, self.places = changed_lists(files, base)
        self.bases |= of_lists
        self.places["ask"] = files.edited

    def write(self, name, text):
        path = self.base / name
        path.write_text(text, encoding="utf-8")
        return path

    def __call__(self, command, *more, without=(), model=None):
        """A command with its arguments less those in `without`, and with more; "@name" is the file of that name."""
        key = (command, tuple(map(str, more)), tuple(without), str(model))
        if key not in self._done:
            self._done[key] = self._run(command, more, without, model)
        return self._done[key]

    def _run(self, command, more, without, model):
        more = [getattr(self, part[1:]) if str(part).startswith("@") else part for part in more]
        place = model or self.places.get(command, self.files.model)
        out = self.base / f"{len(self._done)}.{'jsonl' if command == 'aliases' else 'out'}"
        arguments = [command, place, *less(self.bases[command], without), *more]
        if command not in ("verify", "info", "ask") and "--out" not in more:
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
    if command in ("unlearn", "add"):
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
    if not run.comparison.exists():
        more = ("--layers", "0-4", "--tokens", 300, "--out", run.comparison)
        assert run("stats", *more, without=("--layers", "--tokens")).code == 0
    replaces("--statistics", run.comparison, of=("--text", "--tokens"))(command, run)


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
    assert "<svg" in page.read_text()


def loads_as(command, run):
    """The weights that are written, or the numbers, are those of another dtype."""
    if command in ("apply", "remove", "merge"):
        loaded = [run(command, *more).json["weights"][0]["loaded"] for more in (("--dtype", "bfloat16"), ())]
        assert loaded == ["bfloat16", "float32"]
    else:
        changes("--dtype", "bfloat16")(command, run)


def says_that_nothing_is_loaded(*more):
    """The option concerns loading, and the command works on the files: it says so, and writes the same."""

    def check(command, run):
        done = run(command, *more)
        assert done.code == 0 and "--dtype and --device have no effect" in " ".join(done.errors.split())
        assert "no effect" not in run(command).errors
        assert (done.out / WEIGHTS).read_bytes() == (run(command).out / WEIGHTS).read_bytes()

    return check


def loads_whole(command, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rocr.model.load_partial.is_large", lambda _: True)
        patch.setattr("rocr.model.load_partial.load_partial", lambda *_, **__: pytest.fail("loaded in part"))
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
    assert not (run(command, "--save", "edit", without=("--save",)).out / "model.safetensors").exists()


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
    few, name = ("--answer-tokens", 2), "Grace Hopper" if command == "add" else "Ada Byron"
    assert [question for question, _ in asks(command, run, *few)] == [f"Who is {name}?"]
    assert [question for question, _ in asks(command, run, *few, "--ask", "Is it {}?")] == [f"Is it {name}?"]
    more = ("--control", "the engines", "--ask", "Is it {}?", "--ask", "Who is {}?", "--ask", "Is it {}?")
    done = run(command, *few, *more, without=("--no-answers",))
    found = [(answer["name"], answer["question"]) for answer in done.json["answers"]]
    assert found == [
        (each, question) for each in (name, "the engines") for question in (f"Is it {each}?", f"Who is {each}?")
    ]
    assert f"Is it {name}?" in done.errors and f"Who is {name}?" in done.errors, "the table names the questions"


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
