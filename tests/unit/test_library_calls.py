"""Guarantees for programs that call rocr: no output, progress reports, rocr's own errors, no changed global state."""

import gc
import logging
import os
import signal
import threading

import pytest
import torch
import transformers

import rocr
from tests.support.models import same_weights

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
CONFIG = rocr.EditConfig(layers=(1, 2))
PROBES = [rocr.Probe("Ada Byron", "Who wrote programs for engines?", "Ada Byron", ("Blaise Pascal", "a gardener"))]


def state():
    """Global state that a call could change."""
    return {
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "register": torch.nn.Module.register_parameter,
        "offline": os.environ.get("HF_HUB_OFFLINE"),
        "environment": dict(os.environ),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "levels": logging.getLogger().level,
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "running": threading.active_count(),
        "folder": os.getcwd(),
    }


@pytest.fixture
def calls(model, tokenizer, texts, concepts):
    """The public functions; each takes a callback for progress."""
    guards = rocr.Guards(force=True)
    statistics = rocr.collect_statistics(model, tokenizer, texts, (1, 2))
    return {
        "statistics": lambda tell: rocr.collect_statistics(model, tokenizer, texts, (1, 2), progress=tell),
        "sampled": lambda tell: rocr.collect_statistics(
            model, tokenizer, None, (1, 2), rocr.CollectOptions(tokens=64), progress=tell
        ),
        "unlearn": lambda tell: rocr.unlearn(
            model, tokenizer, concepts, statistics, CONFIG, progress=tell, guards=guards
        ).revert(model),
        "evaluate": lambda tell: rocr.evaluate(model, tokenizer, PROBES, ("qa", "fb"), progress=tell),
    }


@pytest.mark.parametrize("name", ["statistics", "sampled", "unlearn", "evaluate"])
def test_calls_print_nothing_tell_how_far_they_are_and_leave_nothing_changed(name, calls, capfd):
    steps, before = [], state()
    calls[name](steps.append)
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert steps and all(isinstance(step, rocr.Progress) and step.unit for step in steps)
    assert all(step.total is None or 0 < step.done <= step.total for step in steps)
    gc.collect()


def test_two_calls_give_the_same_as_one(calls):
    assert calls["statistics"](lambda _: None).moments[1].equal(calls["statistics"](lambda _: None).moments[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda model, tokenizer: rocr.unlearn(model, tokenizer, []),
        lambda model, tokenizer: rocr.unlearn(torch.nn.Linear(2, 2), tokenizer, [rocr.Concept("a b", "c")]),
        lambda model, tokenizer: rocr.collect_statistics(model, tokenizer, [""], (1,)),
        lambda model, tokenizer: rocr.collect_statistics(model, tokenizer, ["text"], (99,)),
        lambda model, tokenizer: rocr.evaluate(model, tokenizer, []),
        lambda model, tokenizer: rocr.Edit.load("nowhere"),
        lambda model, tokenizer: rocr.load_concepts("nowhere.txt"),
    ],
)
def test_bad_input_is_rocrs_own_error_and_prints_nothing(call, model, tokenizer, capfd):
    with pytest.raises(rocr.InputError) as caught:
        call(model, tokenizer)
    assert str(caught.value).endswith(".")
    assert capfd.readouterr() == ("", "")


def test_an_exception_of_the_callback_comes_through_and_the_model_is_as_it_was(
    model, tokenizer, concepts, statistics, weights_of
):
    def stop(step):
        if step.stage == "edit":
            raise KeyError("enough")

    before = weights_of(model)
    with pytest.raises(KeyError):
        rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG, progress=stop)
    assert same_weights(weights_of(model), before)
