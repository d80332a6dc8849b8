"""Exact undo of stacked edits, and the same bytes from the same inputs, threads and instruction sets."""

import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Edit, EditConfig, VerificationError, ops
from rocr.model.fingerprint import tensor_digest
from rocr.solve.factors import Factors

pytestmark = pytest.mark.thorough

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER_SETS = ((1,), (2,), (1, 2), (3,), (2, 3))
STACKED = 10
WITH_FMA = {"amx", "avx512", "avx2", "neon"}
"""Instruction sets that multiply and add with one rounding."""
ONE_PANEL = 192
"""Tokens that every one of them adds up in one piece: the depth of a panel of AVX2."""


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weight_digests(model):
    return {name: tensor_digest(parameter) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def edits(_llama, tokenizer, statistics, concepts):
    """Edits of the tiny model, each of other layers; none is applied."""
    model = copy.deepcopy(_llama)
    found = []
    for layers in LAYER_SETS:
        found.append(rocr.unlearn(model, tokenizer, concepts, statistics, EditConfig(layers=layers)))
        found[-1].revert(model)
    return found


@pytest.fixture
def stack(model, edits, tmp_path):
    """stack(dtype): a model with ten edits of overlapping layers, their files, and the weights' digests in between."""

    def build(dtype):
        model.to(dtype)
        states, paths = [weight_digests(model)], []
        for i, edit in enumerate(itertools.islice(itertools.cycle(edits), STACKED)):
            updates = [
                replace(update, factors=Factors(update.factors.left * (1 + i / 7), update.factors.right))
                for update in edit.updates
            ]
            stacked = replace(edit, updates=updates)
            stacked.apply(model, allow_fingerprint_mismatch=True)  # of float16, values are rounded twice
            paths.append(tmp_path / f"edit-{i}")
            stacked.save(paths[-1])
            states.append(weight_digests(model))
        assert len({tuple(state.values()) for state in states}) == STACKED + 1
        return model, paths, states

    return build


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_edits_come_off_one_after_the_other(stack, dtype, tally):
    model, paths, states = stack(dtype)
    for path, state in zip(reversed(paths), states[-2::-1], strict=True):
        Edit.load(path).revert(model)
        assert weight_digests(model) == state
    tally("stacked edits taken off to the last bit", STACKED)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_come_off_in_any_order_that_is_the_reverse_for_each_weight(stack, dtype, tally):
    model, paths, states = stack(dtype)
    choose = random.Random(5)
    orders, left = [], list(enumerate(map(Edit.load, paths)))
    while left:
        top = {layer: i for i, edit in left for layer in edit.layers}  # the last edit of each layer
        free = [(i, edit) for i, edit in left if all(top[layer] == i for layer in edit.layers)]
        for i, edit in left:
            if (i, edit) not in free:
                before = weight_digests(model)
                with pytest.raises(VerificationError, match="Revert later edits first"):
                    edit.revert(model)
                assert weight_digests(model) == before, "a refused revert changed a weight"
        chosen = choose.choice(free)
        chosen[1].revert(model)
        orders.append(chosen[0])
        left.remove(chosen)
    assert orders != sorted(orders, reverse=True), "the order was the plain reverse"
    assert weight_digests(model) == states[0]
    tally("stacked edits taken off to the last bit", STACKED)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", pytest.param("float16", marks=pytest.mark.slow)],
)
def test_commands_repeat_their_bytes_and_take_them_off(files, command, concept, digests, tmp_path, dtype, with_threads):
    settings = (*concept, "--text", files.text, "--tokens", 300)
    first, second, back = tmp_path / "1 thread", tmp_path / "stacked", tmp_path / "back"

    def run(*arguments):
        done = command(*arguments)
        assert done.code == 0, done.errors

    def written(folder):
        return {name: digest for name, digest in digests(folder).items() if name != "report.json"}

    with_threads(2)  # with another number of threads, products of torch's may round otherwise
    for out in (first, tmp_path / "again"):
        run("unlearn", files.model, *settings, "--dtype", dtype, "--save", "model,edit,lora", "--out", out)
    assert {"edit.safetensors", "model.safetensors"} < set(written(first))
    assert written(first) == written(tmp_path / "again")

    with_threads(1)
    run("unlearn", first, *settings, "--layers", "2,3", "--out", second)
    early = command("revert", second, "--edit", first / "edit.safetensors", "--out", back)
    assert early.code == 3 and "Revert later edits first" in early.errors and not back.exists()
    run("revert", second, "--out", back)
    assert written(back)["model.safetensors"] == written(first)["model.safetensors"]
    run("revert", back, "--edit", first / "edit.safetensors", "--out", tmp_path / "first")
    run("verify", tmp_path / "first", "--edit", first / "edit.safetensors")


def operands(tokens, rank, whole):
    """Random keys, weight, left and right, scaled; whole numbers are so small that every sum of theirs is exact."""
    found = (torch.randn(tokens, 130), torch.randn(70, 200), torch.randn(70, rank), torch.randn(rank, 200))
    return [(8 * each).round().clamp(-20, 20) for each in found] if whole else list(found)


def moment(keys, backend="cpp"):
    return tensor_digest(ops.accumulate_second_moment(torch.zeros(130, 130), keys, backend=backend))


def updated(weight, left, right, rounding="nearest", backend="cpp"):
    weight = weight.clone()
    ops.low_rank_update(weight, left, right, scale=0.5, rounding=rounding, seed=2, backend=backend)
    return tensor_digest(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rank", [1, 5, 300])
def test_instruction_sets_update_to_the_same_bytes(by_simd, dtype, rounding, rank):
    _, weight, left, right = operands(1, rank, whole=False)
    # Without a fused multiply-add every product is rounded, which is no matter where there is one.
    names = () if rank == 1 else WITH_FMA
    assert len(set(by_simd(lambda: updated(weight.to(dtype), left, right, rounding), names).values())) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_add_up_short_batches_to_the_same_bytes(by_simd, dtype):
    keys = operands(ONE_PANEL, 1, whole=False)[0].to(dtype)
    # Products of 16-bit numbers are exact, so that it is no matter either whether they are rounded before the sum.
    names = WITH_FMA - {"amx"} if dtype == torch.float32 else WITH_FMA - {"amx"} | {"plain"}
    assert len(set(by_simd(lambda: moment(keys), names).values())) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_sums_have_the_same_bytes_on_every_path(by_simd, dtype):
    keys, weight, left, right = operands(1700, 5, whole=True)
    keys, weight = keys.to(dtype), weight.to(dtype)
    found = by_simd(lambda: (moment(keys), updated(weight, left, right)))
    assert set(found.values()) == {(moment(keys, "torch"), updated(weight, left, right, backend="torch"))}
