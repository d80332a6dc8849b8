"""Operands with unusual strides and alignment, concurrent callers and forks: the right result or rocr's own error."""

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch

from rocr import InputError, ops
from rocr.ops import reference
from rocr.ops.cpp_backend import SIMD_VARIABLE

BACKENDS = [name for name in ops.available_backends("cpu") if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAR = 2**30 + 7
"""Numbers between two rows: the third one begins beyond 2**31."""

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def simds():
    from rocr.ops.cpp_backend import simd_names

    return simd_names() if "cpp" in BACKENDS else []


def shifted(matrix, numbers):
    """Copy a matrix to a given number of elements after the start of a cache line."""
    memory = torch.empty(matrix.numel() + 64, dtype=matrix.dtype)
    start = (-memory.data_ptr() // matrix.element_size()) % (64 // matrix.element_size()) + numbers
    view = memory[start : start + matrix.numel()].view(matrix.shape)
    assert view.data_ptr() % 64 == numbers * matrix.element_size()
    return view.copy_(matrix)


def factors(rows, columns, rank=3):
    return torch.randn(rows, rank), torch.randn(rank, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_numbers_begin_does_not_change_a_byte(backend, dtype):
    keys, weight = torch.randn(50, 67).to(dtype), torch.randn(40, 67).to(dtype)
    left, right = factors(40, 67)
    results = []
    for numbers in (0, 1, 3, 9):
        total, changed = shifted(torch.zeros(67, 67), numbers), shifted(weight, numbers)
        ops.accumulate_second_moment(total, shifted(keys, numbers), backend=backend)
        ops.low_rank_update(changed, shifted(left, numbers), shifted(right, numbers), backend=backend)
        results.append((total, changed))
    if backend == "torch":  # its products may depend on the address
        exact = reference.second_moment(keys).tril()
        assert all((total.double() - exact).norm() <= 1e-6 * exact.norm() for total, _ in results)
    else:
        assert all(torch.equal(total, results[0][0]) for total, _ in results)
        assert all(torch.equal(changed, results[0][1]) for _, changed in results)


def test_numbers_at_odd_addresses_are_refused(backend):
    memory = bytearray(4 * 12 + 4)
    odd = torch.frombuffer(memory, dtype=torch.float32, offset=1, count=12).view(3, 4)
    with pytest.raises(InputError, match=r"weights\[0\] begins at an address that is not a multiple of the 4 bytes"):
        ops.low_rank_update(odd, *factors(3, 4), backend=backend)
    with pytest.raises(InputError, match=r"rights\[0\] begins at an address"):
        ops.low_rank_update(torch.zeros(2, 4), torch.zeros(2, 3), odd, backend=backend)
    with pytest.raises(InputError, match="keys begins at an address"):
        ops.accumulate_second_moment(torch.zeros(4, 4), odd, backend=backend)
    assert not any(memory)


def test_weights_of_one_storage_that_do_not_touch_are_updated(backend):
    memory = torch.randn(2 * 20 * 30 + 5)
    weights = [memory[: 20 * 30].view(20, 30), memory[20 * 30 : -5].view(30, 20).T]
    lefts, rights = zip(*(factors(20, 30) for _ in weights), strict=True)
    exact = [reference.updated_weight(*each) for each in zip(weights, lefts, rights, strict=True)]
    end = memory[-5:].clone()
    ops.low_rank_update(weights, lefts, rights, backend=backend)
    for weight, expected in zip(weights, exact, strict=True):
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(memory[-5:], end)


def test_memory_that_two_operands_share_is_refused_whoever_owns_it(backend):
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(100, dtype=numpy.float32)
    first, second = torch.from_numpy(array[:40]).view(5, 8), torch.from_numpy(array[39:79]).view(5, 8)
    left, right = factors(5, 8)
    with pytest.raises(InputError, match=r"weights\[0\] and weights\[1\] share memory"):
        ops.low_rank_update([first, second], [left, left], [right, right], backend=backend)
    with pytest.raises(InputError, match=r"weights\[0\] and rights\[1\] share memory"):
        ops.low_rank_update([first, torch.zeros(5, 8)], [left, torch.ones(5, 5)], [right, second], backend=backend)
    with pytest.raises(InputError, match=r"totals\[0\] and keys\[1\] share memory"):
        totals = [torch.from_numpy(array[:64]).view(8, 8), torch.zeros(8, 8)]
        ops.accumulate_second_moments(totals, [torch.ones(2, 8), second], backend=backend)
    assert not array.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beyond_2_31_numbers(backend, dtype, tmp_path):
    """In a sparse file, of which a few pages exist."""

    def far_matrix(name, rows, columns, dtype):
        memory = torch.from_file(str(tmp_path / name), shared=True, size=rows * FAR, dtype=dtype)
        return memory.as_strided((rows, columns), (FAR, 1)).copy_(torch.randn(rows, columns))

    weight, keys = far_matrix("weight", 4, 50, dtype), far_matrix("keys", 4, 50, dtype)
    left, right = factors(4, 50)
    exact = reference.updated_weight(weight, left, right)
    ops.low_rank_update(weight, left, right, backend=backend)
    torch.testing.assert_close(weight.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    total = far_matrix("total", 4, 4, torch.float32).zero_()
    ops.accumulate_second_moment(total, keys[:, :4], backend=backend)
    torch.testing.assert_close(total.double(), reference.second_moment(keys[:, :4]).tril(), rtol=1e-5, atol=1e-6)
    for path in tmp_path.iterdir():
        assert path.stat().st_blocks * 512 < 2**20
        path.unlink()


def test_eight_threads_at_once(backend, monkeypatch):
    keys, start = torch.randn(300, 130), torch.randn(70, 400).bfloat16()
    left, right = factors(70, 400)

    def both():
        weight = start.clone()
        ops.low_rank_update(weight, left, right, rounding="stochastic", seed=4, backend=backend)
        return ops.accumulate_second_moment(torch.zeros(130, 130), keys, backend=backend), weight

    for simd in simds() if backend == "cpp" else [""]:
        monkeypatch.setenv(SIMD_VARIABLE, simd)
        total, weight = both()
        results, together = [], threading.Barrier(8)

        def work(together=together, results=results):
            together.wait()
            results += [both() for _ in range(3)]

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 24
        assert all(torch.equal(weight, each) for _, each in results)
        exact = backend == "cpp"  # other products may depend on the address
        assert all((total - each).norm() <= (0 if exact else 1e-6) * total.norm() for each, _ in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_that_is_forked_while_others_compute(backend):
    if backend != "cpp":
        pytest.skip("torch's own threads do not survive a fork")
    code = """
import os, sys, threading, torch
from rocr import ops
torch.set_num_threads(2)
keys, weight = torch.randn(600, 150), torch.randn(80, 200).bfloat16()
left, right = torch.randn(80, 3), torch.randn(3, 200)
def both():
    changed = weight.clone()
    ops.low_rank_update(changed, left, right, backend="cpp")
    return ops.accumulate_second_moment(torch.zeros(150, 150), keys, backend="cpp"), changed
for os.environ["ROCR_SIMD"] in sys.argv[1].split(","):
    before, stop = both(), threading.Event()
    def work():
        while not stop.is_set(): both()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads: thread.start()
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(0 if all(map(torch.equal, both(), before)) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for thread in threads: thread.join()
"""
    names = simds()
    words = [sys.executable, "-c", code, ",".join(names)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.split() == ["0"] * 4 * len(names)


@pytest.mark.parametrize("sizes", list(itertools.product((0, 1, 3), repeat=3)), ids=str)
def test_no_rows_columns_or_rank(backend, sizes):
    rows, columns, rank = sizes
    weight, other = torch.randn(rows, columns), torch.randn(3, 3)
    lefts, rights = zip(factors(rows, columns, rank), factors(3, 3, 1), strict=True)
    exact = [reference.updated_weight(*each) for each in zip((weight, other), lefts, rights, strict=True)]
    ops.low_rank_update([weight, other], lefts, rights, backend=backend)
    for found, expected in zip((weight, other), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
