"""Checks of options that say how a command runs: threads, progress, warnings, and steps of training."""

import importlib
import logging
import warnings

import pytest
import torch

from tests.support.option_effects import measured


def computes_with_threads(command, run):
    """Torch has so many threads where the model is located, and as many as before at the end of the command."""
    seen, before = [], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda: seen.append(torch.get_num_threads()))
        done = run(command, "--threads", before + 2)
    assert done.code == 0, done.errors
    assert set(seen) == {before + 2}
    assert torch.get_num_threads() == before


def shows_no_progress(command, run):
    assert any(line.startswith("load: ") for line in run(command).errors.splitlines())
    done = run(command, "--quiet")
    assert done.code == 0, done.errors
    assert not [line for line in done.errors.splitlines() if line.startswith("load")]


def shows_library_warnings(command, run):
    """Python warnings, and messages of loggers with and without a handler of their own."""

    def warn():
        warnings.warn("a warning of a library", FutureWarning, stacklevel=1)
        for name in ("a.library", "transformers.modeling_utils"):
            logging.getLogger(name).warning("a message of a library")

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, warn)
        verbose, usual = (run(command, *more) for more in (("--quiet", "-v"), ("--quiet", "--json")))
    assert (verbose.code, usual.code) == (0, 0), verbose.errors
    for line in (
        "FutureWarning: a warning of a library",
        "a.library: a message",
        "transformers.modeling_utils: a mess",
    ):
        assert f"\n{line}" in f"\n{verbose.errors}"
    assert "of a library" not in usual.errors


def watch(patch, see):
    """Call a function before a model is loaded, wholly, in part or without weights."""
    for name in ("load.load_model", "load_partial.load_partial", "load_partial.empty_model"):
        module, _, function = name.rpartition(".")
        module = importlib.import_module(f"rocr.model.{module}")

        patch.setattr(module, function, _after(see, getattr(module, function)))


def _after(see, function):
    def watched(*arguments, **more):
        see()
        return function(*arguments, **more)

    return watched


def trains_for_steps(command, run):
    pytest.importorskip("peft")
    train = ("--methods", "gradient ascent")
    usual, few, many = (
        run(command, *train, *more, without=("--methods",)) for more in ((), ("--steps", 2), ("--steps", 12))
    )
    for done, steps in ((usual, 5), (few, 2), (many, 12)):
        assert f"training: {steps} steps in" in done.errors
    assert measured(command, usual) != measured(command, many)


def unlearns_in_a_sequence(command, run):
    """The second target is unlearned on top of the first, and both are asked about then."""
    more = ("--targets", "Ada Byron", "Blaise Pascal")
    alone, after = (run(command, *more, *given, without=("--targets",)) for given in ((), ("--sequential",)))
    assert (alone.json["sequential"], after.json["sequential"]) == (False, True)

    def forgotten(done):
        items = done.json["results"][1]["evaluation"]["items"]
        return {item["subject"]: item["score"] for item in items if item["split"] == "forget"}

    assert forgotten(alone).keys() == {"Blaise Pascal"}
    assert forgotten(after).keys() == {"Ada Byron", "Blaise Pascal"}
    assert forgotten(after)["Blaise Pascal"] != forgotten(alone)["Blaise Pascal"]
    refused = run(command, "--sequential", "--methods", "JensUn", without=("--methods",))
    assert refused.code == 2
    assert "JensUn: not defined for targets one after another" in refused.errors


def samples_answers(command, run):
    """FADE is measured with so many samples, and with further references."""
    assert "fade" not in run(command).json["results"][0]
    (result,) = run(command, "--fade", 3).json["results"]
    assert set(result["fade"]) == {"a gardener", "Donald Trump", "Ada Byron"}
    assert list(result["fade"]["a gardener"]["by_samples"]) == ["1", "2", "3"]
    (named,) = run(command, "--fade", 3, "--references", "the rain").json["results"]
    assert set(named["fade"]) - set(result["fade"]) == {"the rain"}
    refused = run(command, "--references", "the rain")
    assert refused.code == 2
    assert "give --fade N too" in refused.errors


def tunes_for_steps(command, run):
    found = []
    for steps in (2, 5):
        done = run(command, "--relearn", steps)
        assert f"training: {steps} steps in" in done.errors
        found.append(done.json["results"][0]["relearned"]["forms"])
    assert found[0] != found[1]
    assert "relearned" not in run(command).json["results"][0]
