import contextlib
import copy
import functools
import gc
import inspect
import os
import random
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, EditConfig, GuardError
from rocr.edit.guards import Guards
from rocr.model.architecture import find_architecture
from tests.support.models import same_weights

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
CONFIG = EditConfig(layers=[1, 2], key_tokens="last", templates=("Who is {}?",))


@pytest.fixture
def unchanged(weights_of):
    """unchanged(model): a function that returns whether the model's bits are the same as now."""

    def remember(model):
        before = weights_of(model)
        return lambda: same_weights(before, weights_of(model))

    return remember


@pytest.fixture(scope="module")
def statistics_in(make_model, tokenizer, texts):
    """statistics_in(dtype): those of the tiny Llama at layers 1 and 2, computed once for each dtype."""
    return functools.cache(
        lambda dtype: rocr.collect_statistics(make_model("Llama").to(dtype), tokenizer, texts, [1, 2])
    )


PLACES = {
    "embedding": lambda model: model.model.embed_tokens.weight,
    "attention of a layer before": lambda model: model.model.layers[0].self_attn.o_proj.weight,
    "edited weight": lambda model: model.model.layers[1].mlp.down_proj.weight,
    "last edited weight": lambda model: model.model.layers[2].mlp.down_proj.weight,
    "keys": lambda model: model.model.layers[2].mlp.up_proj.weight,
    "norm": lambda model: model.model.layers[2].post_attention_layernorm.weight,
    "layer after the edited ones": lambda model: model.model.layers[4].mlp.up_proj.weight,
    "output matrix": lambda model: model.lm_head.weight,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_is_not_finite_stops_the_edit(
    model, tokenizer, statistics_in, concepts, place, value, dtype, unchanged
):
    model, statistics = model.to(dtype), statistics_in(dtype)
    with torch.no_grad():
        PLACES[place](model).view(-1)[7 if "norm" in place else 40 :] = value
    # A broken model is another model, which would stop the edit before anything is measured.
    mark = rocr.statistics.collect.fingerprint(find_architecture(model), tokenizer, 2)
    statistics = replace(statistics, fingerprint=mark, provenance=replace(statistics.provenance, down_projections=()))
    is_unchanged = unchanged(model)
    with pytest.raises(GuardError, match="not finite"):
        rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    assert is_unchanged()


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_statistics_that_are_not_finite_stop_the_edit(model, tokenizer, statistics, concepts, layer, value, unchanged):
    moments = dict(statistics.moments)
    moments[layer] = torch.full_like(moments[layer], value)
    is_unchanged = unchanged(model)
    with pytest.raises(GuardError, match="second moment of ordinary keys is not finite or zero"):
        rocr.unlearn(model, tokenizer, concepts, replace(statistics, moments=moments), CONFIG)
    assert is_unchanged()


def test_keys_that_overflow_float16_are_named_with_their_concepts(model, tokenizer, statistics_in, unchanged):
    model, statistics = model.half(), statistics_in(torch.float16)
    (token,) = tokenizer(" Pascal", add_special_tokens=False)["input_ids"]
    gate, up = model.model.layers[2].mlp.gate_proj, model.model.layers[2].mlp.up_proj

    def overflow(_module, inputs, output):
        # Only at " Pascal": a real overflow of float16, in the product of gate and up.
        return output * torch.where(model.seen == token, 3e4, 1.0).half()[..., None]

    model.model.embed_tokens.register_forward_pre_hook(lambda _module, inputs: setattr(model, "seen", inputs[0]))
    for module in (gate, up):
        module.register_forward_hook(overflow)
    is_unchanged = unchanged(model)
    named = [Concept("Ada Byron", "a gardener"), Concept("Blaise Pascal", "rain")]
    with pytest.raises(GuardError, match=r"at layer 1 are not finite for Blaise Pascal: the model overflows there"):
        rocr.unlearn(model, tokenizer, named, statistics, CONFIG)
    assert is_unchanged()


def test_weights_that_overflow_float16_stop_the_edit(model, tokenizer, statistics_in, concepts, unchanged):
    model, statistics = model.half(), statistics_in(torch.float16)
    is_unchanged = unchanged(model)
    with pytest.raises(GuardError, match=r"layers\.1\.mlp\.down_proj\.weight overflow torch\.float16"):
        rocr.unlearn(model, tokenizer, concepts, statistics, replace(CONFIG, strength=1e7), guards=Guards(force=True))
    assert is_unchanged()


def test_a_system_without_free_directions_stops_the_edit(model, tokenizer, statistics, concepts, unchanged):
    is_unchanged = unchanged(model)
    config = replace(CONFIG, method="projected", threshold=1e-9)
    with pytest.raises(GuardError, match="No direction is free"):
        rocr.unlearn(model, tokenizer, concepts, statistics, config)
    assert is_unchanged()


def test_an_exception_from_any_progress_report_leaves_the_first_bytes(
    model, tokenizer, statistics, concepts, unchanged
):
    steps = []
    rocr.unlearn(copy.deepcopy(model), tokenizer, concepts, statistics, CONFIG, steps.append)
    is_unchanged = unchanged(model)
    for number in range(len(steps)):
        calls = []

        def stop(step, calls=calls, number=number):
            calls.append(step)
            if len(calls) > number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG, stop)
        assert is_unchanged(), steps[number]
    assert {step.stage for step in steps} >= {"targets", "edit", "check"}


def test_an_interruption_at_any_line_that_applies_leaves_the_first_bytes(
    model, tokenizer, statistics, concepts, unchanged
):
    """A trace function raises where a signal could: before each line after the first change, each in a fork."""
    is_unchanged, weight = unchanged(model), model.model.layers[1].mlp.down_proj.weight
    first = weight.clone()
    ends = "apply_updates", "_applied", "tensor_digest", "bits", "_record", "after", "unlearn"
    children, in_child = [], []

    def trace(frame, event, _argument):
        inside = frame.f_code.co_name in ends and frame.f_code.co_filename.endswith(
            ("apply.py", "update.py", "fingerprint.py", "rocr/unlearn.py")
        )
        if event == "line" and inside and not torch.equal(weight, first):
            child = os.fork()
            if not child:
                in_child.append(frame.f_lineno)
                sys.settrace(None)
                raise KeyboardInterrupt
            children.append((frame.f_lineno, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        return trace if inside or (event == "call" and frame.f_code.co_filename.endswith("rocr/unlearn.py")) else None

    code = 1
    sys.settrace(trace)
    try:
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
    except KeyboardInterrupt:
        # The state of torch is restored too.
        code = 0 if is_unchanged() and torch.is_grad_enabled() else 3
    finally:
        sys.settrace(None)
        if in_child:
            os._exit(code)
    edit.revert(model)
    assert is_unchanged()
    assert len(children) > 40
    assert {code for _, code in children} == {0}, children


class Stop(BaseException):
    """The exception of the signal handler."""


def stop_within_unlearn(_, frame):
    unlearn = inspect.unwrap(rocr.unlearn).__code__
    while frame is not None and frame.f_code is not unlearn:
        frame = frame.f_back
    if frame is not None:  # else the edit is made, and nobody has lost it
        raise Stop


@pytest.mark.parametrize("signals", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_signals_at_any_time_leave_the_first_bytes_and_a_model_that_runs(
    signals, model, tokenizer, statistics, concepts, unchanged
):
    is_unchanged, draw, stopped = unchanged(model), random.Random(0), 0
    start = time.process_time()
    rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG).revert(model)
    duration = time.process_time() - start
    handler = signal.signal(signal.SIGPROF, stop_within_unlearn)
    try:
        while stopped < signals:  # by the time of the processor that this process takes, whatever else is running
            signal.setitimer(signal.ITIMER_PROF, draw.uniform(0.05, 1.05) * duration)
            try:
                edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
                signal.setitimer(signal.ITIMER_PROF, 0)
                edit.revert(model)
            except Stop:
                stopped += 1
            assert is_unchanged(), f"after {stopped} signals"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def test_stops_at_any_start_or_end_of_a_context_leave_no_hook_behind(model, tokenizer, statistics, concepts, unchanged):
    """A trace function raises where Python enters an `__exit__` or leaves an `__enter__`, as a signal could.

    Each line that calls one is tried at its first call.
    """
    is_unchanged, first, seen = unchanged(model), _state(model), []

    def run(stop_at):
        seen.clear()

        def leaving(frame, event, _argument):
            if event == "return":
                return at(frame)
            return leaving

        def at(frame):
            back = frame.f_back
            seen.append((frame.f_code.co_name, back.f_code.co_filename, back.f_lineno))
            if len(seen) == stop_at:
                sys.settrace(None)
                raise Stop

        def trace(frame, event, _argument):
            name = frame.f_code.co_name
            if name == "__exit__":
                at(frame)
            return leaving if name == "__enter__" else None

        sys.settrace(trace)
        try:
            edit = rocr.unlearn(model, tokenizer, concepts, statistics, CONFIG)
        finally:
            sys.settrace(None)
        edit.revert(model)

    run(0)
    places = [len(seen) - index for index in {place: i for i, place in enumerate(reversed(seen))}.values()]
    assert len(places) > 50
    gc.disable()  # else the garbage collector ends the contexts, some time later
    try:
        for stop_at in places:
            with contextlib.suppress(Stop):
                run(stop_at)
            assert _state(model) == first, f"stopped at {seen[-1]}"
            assert is_unchanged()
    finally:
        gc.enable()
        sys.settrace(None)


def _state(model):
    """The hooks and modes of all modules, and torch's gradient mode."""
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), module.training, "forward" in vars(module))
        for module in model.modules()
    ]
    return hooks, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
