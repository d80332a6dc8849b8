import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rocr import ops
from rocr.errors import InputError
from rocr.ops import reference
from rocr.ops.cpp_backend import SIMD_VARIABLE

kernels = pytest.importorskip("rocr._C", reason="the extension was not compiled")
ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=kernels.simd_names())
def simd(request, monkeypatch):
    monkeypatch.setenv(SIMD_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, size", [(1, 1), (63, 123), (700, 250), (1100, 600)])
def test_second_moment_of_every_instruction_set(guarded, simd, dtype, tokens, size):
    keys = torch.randn(tokens, size).to(dtype)
    total = guarded(torch.zeros(size, size))
    ops.accumulate_second_moment(total, guarded(keys), backend="cpp")
    exact = reference.second_moment(keys).tril()
    assert (total.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_above_the_diagonal_stays(left_alone, simd, dtype):
    total = left_alone(torch.empty(300, 300))
    lower = torch.ones(300, 300, dtype=torch.bool).tril()
    total[lower] = 0.0
    before = total.view(torch.int32).clone()
    ops.accumulate_second_moment(total, torch.randn(40, 300).to(dtype), backend="cpp")
    assert torch.equal(total.view(torch.int32)[~lower], before[~lower])
    assert total[lower].any()


def test_a_second_moment_of_keys_of_every_size_keeps_to_the_norms_of_its_columns(guarded, simd):
    tails = torch.distributions.StudentT(1.0).sample((1300, 90)).clamp(-1e6, 1e6)
    scales = torch.exp2(torch.linspace(-50, 50, 90))  # times the largest number, squares still fit float32
    keys = tails * scales
    keys[:, 7], keys[5, 8], keys[:, 9] = 0.0, 3e38, 1e-30
    keys[5, torch.arange(90) != 8] = 0.0  # else products with the largest number overflow
    total = guarded(torch.zeros(90, 90))
    ops.accumulate_second_moment(total, guarded(keys), backend="cpp")
    kept = torch.arange(90) != 8
    exact, total = reference.second_moment(keys)[kept][:, kept].tril(), total[kept][:, kept].double()
    norms = keys.double().norm(dim=0)[kept]
    bound = 1e-6 * norms[:, None] * norms + torch.finfo(torch.float32).tiny
    assert ((total - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rows, columns, rank", [(1, 1, 1), (63, 123, 5), (50, 400, 300)])
def test_low_rank_update_of_every_instruction_set(guarded, simd, dtype, rounding, rows, columns, rank):
    start, left, right = torch.randn(rows, columns).to(dtype), torch.randn(rows, rank), torch.randn(rank, columns)
    weight = guarded(start)
    ops.low_rank_update(weight, guarded(left), guarded(right), rounding=rounding, backend="cpp")
    exact = reference.updated_weight(start, left, right)
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    terms = start.double().abs() + left.double().abs() @ right.double().abs()
    # Float32 sums are wrong by half a rounding of the sum of magnitudes for each term at most, in any order.
    assert ((weight.double() - exact).abs() <= spacing + rank / 2 * torch.finfo(torch.float32).eps * terms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_16_bit_number_is_read_and_every_rounding_is_that_of_torch(simd, dtype):
    values = torch.randn(128, 256) * torch.exp2(torch.randint(-28, 17, (128, 256)).float())
    weight = torch.zeros(128, 256, dtype=dtype)
    ops.low_rank_update(weight, torch.eye(128), values, backend="cpp")
    assert torch.equal(weight, values.to(dtype))
    if dtype == torch.float32:
        return
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, torch.zeros((), dtype=dtype))
    total = torch.zeros(256, 256)
    for block in numbers.view(256, 1, 256):
        total.zero_()
        ops.accumulate_second_moment(total, block, backend="cpp")
        squares = block[0].float().square()
        if simd == "amx":  # its products below the smallest normal number are zero
            squares = squares.where(squares >= torch.finfo(torch.float32).tiny, 0.0)
        assert torch.equal(total.diagonal(), squares)


@pytest.mark.parametrize("name", ["mmx", "AVX2", "plain,avx2"])
def test_an_instruction_set_that_is_not_there_is_refused_in_a_sentence(monkeypatch, name):
    monkeypatch.setenv(SIMD_VARIABLE, name)
    total, weight = torch.zeros(4, 4), torch.zeros(3, 4)
    for call in (
        lambda: ops.accumulate_second_moment(total, torch.ones(3, 4)),
        lambda: ops.low_rank_update(weight, torch.ones(3, 1), torch.ones(1, 4)),
    ):
        with pytest.raises(InputError, match=f"ROCR_SIMD is '{name}', but must name an instruction set.*plain"):
            call()
    assert not total.any() and not weight.any()


def test_threads_do_not_change_a_byte(simd, with_threads):
    keys, start = torch.randn(1500, 333), torch.randn(333, 333)
    weight, left, right = torch.randn(500, 700).bfloat16(), torch.randn(500, 9), torch.randn(9, 700)

    def both():
        total = ops.accumulate_second_moment(start.clone(), keys, backend="cpp")
        updated = weight.clone()
        ops.low_rank_update(updated, left, right, rounding="stochastic", seed=1, backend="cpp")
        return total, updated

    results = [with_threads(threads, both) for threads in (1, 2, 2, 5)]
    for total, updated in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.equal(updated, results[0][1])


def test_the_interpreter_runs_on_during_a_call(with_threads):
    keys, total = torch.randn(8192, 2048), torch.zeros(2048, 2048)
    is_over = threading.Event()

    def work():
        with_threads(1, lambda: ops.accumulate_second_moment(total, keys, backend="cpp"))  # a tenth of a second or more
        is_over.set()

    worker = threading.Thread(target=work)
    worker.start()
    steps = 0
    while not is_over.is_set():
        time.sleep(0.001)
        steps += 1
    worker.join()
    assert steps >= 5


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": -1}, "-1 tokens"),
        ({"size": 5}, "size 5.*total_stride 4"),
        ({"keys_stride": 3}, "keys_stride 3"),
        ({"threads": 0}, "0 threads"),
        ({"simd": "mmx"}, "no instruction set 'mmx' here; there are .*plain"),
    ],
)
def test_second_moments_that_are_refused(change, words):
    total, keys = torch.zeros(4, 4), torch.ones(3, 4)
    sizes = {"total_stride": 4, "keys_stride": 4, "tokens": 3, "size": 4, "threads": 1} | change
    with pytest.raises(ValueError, match=words):
        kernels.accumulate_second_moment(
            total=total.data_ptr(), keys=keys.data_ptr(), dtype=kernels.DType.float32, **sizes
        )
    assert not total.any()


@pytest.mark.parametrize("change, words", [({"rank": -2}, "rank -2"), ({"stride": 3}, "4 columns.*stride 3")])
def test_updates_that_are_refused(change, words):
    weight, left, right = torch.zeros(3, 4), torch.ones(3, 2), torch.ones(2, 4)
    sizes = {"rows": 3, "columns": 4, "stride": 4, "rank": 2} | change
    pointers = {"weight": weight.data_ptr(), "left": left.data_ptr(), "right": right.data_ptr()}
    update = kernels.LowRankUpdate(dtype=kernels.DType.float32, **pointers, **sizes)
    with pytest.raises(ValueError, match=words):
        kernels.low_rank_update(updates=[update], scale=1.0, stochastic=False, seed=0, threads=1)
    assert not weight.any()


def test_without_a_compiler_the_build_goes_on_and_says_so(tmp_path):
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    missing = {"CC": str(tmp_path / "no-cc"), "CXX": str(tmp_path / "no-cxx"), "ROCR_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path / 'objects'}"],
        cwd=ROOT,
        env=os.environ | missing,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rocr runs on torch instead" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("_C*"))
