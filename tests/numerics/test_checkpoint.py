import json
import os
import signal
import threading
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import rocr
from rocr import CollectOptions, InputError
from rocr.statistics.checkpoint import Checkpoint
from rocr.statistics.sums import LayerSums

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
LAYERS = [1, 2]


class Stop(BaseException):
    pass


@pytest.fixture
def options(tmp_path):
    return CollectOptions(length=16, batch_tokens=64, text_sha256="of these texts", checkpoint=tmp_path / "state")


@pytest.fixture
def collect(model, tokenizer, texts, options):
    def run(progress=lambda _: None, **changes):
        used = CollectOptions(**(vars(options) | changes))
        return rocr.collect_statistics(model, tokenizer, iter(texts), LAYERS, used, progress)

    return run


@pytest.fixture
def whole(collect):
    """The statistics of a run that nothing interrupts."""
    return collect(checkpoint=None)


def assert_same_bytes(statistics, expected):
    assert (statistics.tokens, statistics.text, statistics.layers) == (expected.tokens, expected.text, expected.layers)
    for layer in expected.layers:
        assert torch.equal(statistics.second_moment(layer), expected.second_moment(layer))


def stopping_at(batch, error=Stop):
    steps = []

    def progress(step):
        steps.append(step)
        if len(steps) == batch:
            raise error

    return progress


def batches_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["rocr"])["batches"]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_collection_that_is_interrupted_and_resumed_ends_in_the_same_bytes(collect, whole, options, batch):
    with pytest.raises(Stop):
        collect(stopping_at(batch))
    assert batches_of(options.checkpoint) == batch
    steps = []
    assert_same_bytes(collect(steps.append), whole)
    assert steps[0].done > whole.tokens * batch / (batch + len(steps)) * 0.5, "the batches before are not run again"


def test_interrupted_again_and_again(collect, whole, options):
    interruptions = 0
    while True:
        try:
            statistics = collect(stopping_at(3))
            break
        except Stop:
            interruptions += 1
            assert batches_of(options.checkpoint) == 3 * interruptions
    assert interruptions > 3
    assert_same_bytes(statistics, whole)


@pytest.mark.parametrize(
    "module", ["layers.0.mlp", "layers.1.self_attn", "layers.2.mlp.act_fn", "layers.2.mlp.down_proj"]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_interrupted_within_a_batch(model, collect, whole, options, module, batch):
    calls = []

    def stop(*_):
        calls.append(None)
        if len(calls) == checks + batch:
            raise KeyboardInterrupt

    # Before any text, the down-projection of a layer that is read is checked, and that attention does not look ahead.
    checks = 1 + module.startswith("layers.2")
    handle = model.model.get_submodule(module).register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        collect()
    handle.remove()
    assert options.checkpoint.exists() == (batch > 1 or module.startswith("layers.2"))
    assert_same_bytes(collect(), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_signals_at_any_moment(collect, whole, options, number):
    def interrupt(*_):
        raise Stop

    handler = signal.signal(number, interrupt)
    try:
        for microseconds in range(2_000, 40_000, 4_000):
            with suppress(Stop):
                threading.Timer(microseconds / 1e6, os.kill, (os.getpid(), number)).start()
                while True:  # until the signal comes
                    collect()
    finally:
        signal.signal(number, handler)
    assert_same_bytes(collect(), whole)


def test_a_torn_sum_is_never_saved(tmp_path):
    state = Checkpoint.open(tmp_path / "state", {"text": "t"}, {1: LayerSums((torch.zeros(2, 2),))})
    with state.adding(1) as sums:
        sums.totals[0].add_(1)
    state.finish_batch(10)
    state.save()
    saved = (tmp_path / "state").read_bytes()
    with pytest.raises(MemoryError), state.adding(1) as sums:
        sums.totals[0].add_(1)
        raise MemoryError
    state.save()
    assert (tmp_path / "state").read_bytes() == saved


def test_nothing_is_written_before_the_first_batch_nor_without_a_path(tmp_path):
    Checkpoint.open(tmp_path / "state", {}, {1: LayerSums((torch.zeros(2, 2),))}).save()
    Checkpoint.open(None, {}, {1: LayerSums((torch.zeros(2, 2),))}).save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["length", "batch_tokens", "tokens", "text_sha256", "layers", "model", "tokenizer"])
def test_the_checkpoint_of_another_collection_is_refused(
    model, tokenizer, make_tokenizer, texts, collect, options, change
):
    with pytest.raises(Stop):
        collect(stopping_at(2))
    before = options.checkpoint.read_bytes()
    changed = {"length": 17, "batch_tokens": 65, "tokens": 10_000, "text_sha256": "of other texts"}
    if change == "model":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0] += 1.0
    used = CollectOptions(**(vars(options) | ({change: changed[change]} if change in changed else {})))
    layers = [0, 1, 2] if change == "layers" else LAYERS
    other = make_tokenizer(start=True) if change == "tokenizer" else tokenizer
    with pytest.raises(InputError, match="checkpoint of another collection"):
        rocr.collect_statistics(model, other, texts, layers, used)
    assert options.checkpoint.read_bytes() == before


def test_the_seed_of_sampled_text_belongs_to_the_collection(model, tokenizer, options):
    def sample(seed, progress=lambda _: None):
        used = CollectOptions(**(vars(options) | {"seed": seed, "tokens": 400}))
        return rocr.collect_statistics(model, tokenizer, None, LAYERS, used, progress)

    def stop(step):
        if step.stage == "statistics":
            raise Stop

    with pytest.raises(Stop):
        sample(1, stop)
    with pytest.raises(InputError, match="another collection"):
        sample(2)
    resumed = sample(1)
    options.checkpoint.unlink()
    assert_same_bytes(resumed, sample(1))


def test_a_model_that_moved_is_the_same_model(model, collect, whole, options):
    with pytest.raises(Stop):
        collect(stopping_at(2))
    model.config._name_or_path = "elsewhere"
    assert_same_bytes(collect(), whole)


def test_damaged_checkpoints_are_refused(collect, options):
    with pytest.raises(Stop):
        collect(stopping_at(2))
    whole_file = options.checkpoint.read_bytes()
    for damaged in (b"", whole_file[:100], whole_file[:-1], b"\xff" * 64):
        options.checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{options.checkpoint} is not a safetensors file"):
            collect()
    options.checkpoint.write_bytes(whole_file)
    with safe_open(options.checkpoint, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["rocr"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for field in ("batches", "tokens", "added"):
        lacking = {name: value for name, value in header.items() if name != field}
        save_file(tensors, options.checkpoint, metadata={"rocr": json.dumps(lacking)})
        with pytest.raises(InputError, match="not a complete checkpoint"):
            collect()
    save_file({"1": tensors["1"]}, options.checkpoint, metadata={"rocr": json.dumps(header)})
    with pytest.raises(InputError, match="not a complete checkpoint"):
        collect()
    save_file({"1": tensors["1"], "2": torch.zeros(3, 3)}, options.checkpoint, metadata={"rocr": json.dumps(header)})
    with pytest.raises(InputError, match="not a complete checkpoint"):
        collect()


def test_other_threads_get_no_signals_and_may_collect(collect, whole):
    found = []
    thread = threading.Thread(target=lambda: found.append(collect()))
    thread.start()
    thread.join()
    assert_same_bytes(found[0], whole)
