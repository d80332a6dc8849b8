"""The backends of NVIDIA GPUs as seen without one: chosen when they can run, silent when they cannot."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rocr import ops
from rocr.errors import InputError
from rocr.ops import checks as operands
from rocr.ops import cuda_backend as backend_cuda
from rocr.ops import dispatch, reference
from rocr.ops import torch_backend as backend_torch
from rocr.ops import triton_backend as backend_triton
from rocr.ops.interfaces import UpdateBackend

GPU_BACKENDS = (backend_triton, backend_cuda)


def test_importing_them_starts_nothing() -> None:
    code = (
        "import sys, torch, rocr.ops.triton_backend, rocr.ops.cuda_backend\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'rocr._C' not in sys.modules\n"
        "assert not any(name.startswith('rocr_kernels') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("backend", GPU_BACKENDS, ids=lambda backend: backend.__name__)
def test_they_do_not_run_on_the_cpu(backend) -> None:
    assert not backend.is_available(torch.device("cpu"))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_asking_for_them_on_the_cpu_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' cannot run on cpu here; available are"):
        ops.accumulate_second_moment(torch.zeros(3, 3), torch.zeros(2, 3), backend=name)


@pytest.mark.parametrize("backend", GPU_BACKENDS, ids=lambda backend: backend.__name__)
def test_fake_tensors_pass_through(backend) -> None:
    with FakeTensorMode():
        totals = [torch.empty(64, 64, device="cuda") for _ in range(2)]
        keys = [torch.empty(9, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        assert backend.second_moments_op(totals, keys) is None
        if isinstance(backend, UpdateBackend):
            lefts, rights = [torch.empty(64, 2, device="cuda")] * 2, [torch.empty(2, 64, device="cuda")] * 2
            backend.low_rank_update(totals, lefts, rights, 1.0, "nearest", 0)


@pytest.mark.parametrize(
    ("shapes", "dtype", "device", "name"),
    [
        ([(8192, 576)], torch.bfloat16, "cuda", "torch"),
        ([(8192, 1536)], torch.float16, "cuda", "torch"),
        ([(8192, 1536)] * 5, torch.bfloat16, "cuda", None),
        ([(8192, 3072)], torch.bfloat16, "cuda", "torch"),
        ([(8192, 4096)], torch.bfloat16, "cuda", None),
        ([(8192, 576)] * 3, torch.bfloat16, "cuda", None),
        ([(131072, 576)], torch.bfloat16, "cuda", None),
        ([(8192, 576)], torch.float32, "cuda", None),
        ([(8192, 576)], torch.bfloat16, "cpu", None),
    ],
)
def test_cublas_is_chosen_for_small_products_alone(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: str, name: str | None
) -> None:
    with FakeTensorMode():
        assert ops.second_moment_backend([torch.empty(shape, dtype=dtype, device=device) for shape in shapes]) == name


def test_what_cublas_is_asked_for_fits_together() -> None:
    keys, total = torch.empty(900, 500, device="meta", dtype=torch.bfloat16), torch.empty(500, 500, device="meta")
    product = backend_torch._product(keys[:, 200:400], keys[:, :200])
    assert (product.shape, product.dtype) == ((200, 200), torch.float32)
    backend_torch._add_product(total[200:400, :200], keys[:, 200:400], keys[:, :200])


def test_fake_tensors_are_told_apart() -> None:
    with FakeTensorMode():
        weight, left, right = (torch.empty(8, 8, device="cuda") for _ in range(3))
        operands.check_low_rank_update([weight], [left], [right])
        operands.check_second_moments([weight, left], [right, right])
        with pytest.raises(InputError, match=r"weights\[0\] and weights\[1\] share memory"):
            operands.check_low_rank_update([weight, weight], [left, left], [right, right])


def test_plain_tensors_go_past_the_dispatcher_and_autograd_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_one(weights, *rest) -> None:
        weights[0].numpy()[:] += 1  # as a kernel does: unknown to torch

    monkeypatch.setattr(backend_triton, "_update_low_rank", add_one)
    monkeypatch.setattr(backend_triton, "low_rank_update_op", None)
    weight, left, right = torch.zeros(8, 8), torch.zeros(8, 1), torch.zeros(1, 8)
    before = weight._version
    backend_triton.low_rank_update([weight], [left], [right], 1.0, "nearest", 0)
    assert weight.eq(1).all()
    assert weight._version > before


def test_a_cuda_second_moment_without_triton_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rocr_kernels._common", None)  # its import fails, as where Triton is missing
    with pytest.raises(InputError, match=r"shares its schedule with the Triton kernels.*Install triton, or use"):
        backend_cuda._load_schedule()


def test_several_layers_at_once_are_several_calls() -> None:
    keys = [torch.randn(20, 12).to(torch.bfloat16), torch.randn(33, 7), torch.empty(0, 5)]
    totals = [torch.randn(12, 12), torch.randn(7, 7), torch.randn(5, 5)]
    expected = [total.double() + reference.second_moment(each) for total, each in zip(totals, keys, strict=True)]
    ops.accumulate_second_moments(totals, keys)
    for total, right in zip(totals, expected, strict=True):
        torch.testing.assert_close(total.tril().double(), right.tril(), rtol=1e-5, atol=1e-5)


def test_one_total_for_two_layers_is_refused() -> None:
    total = torch.zeros(4, 4)
    with pytest.raises(InputError, match=r"totals\[0\] and totals\[1\] share memory"):
        ops.accumulate_second_moments([total, total], [torch.zeros(2, 4), torch.zeros(2, 4)])


def test_totals_without_keys_are_refused() -> None:
    with pytest.raises(InputError, match="2 totals and 1 keys"):
        ops.accumulate_second_moments([torch.zeros(4, 4), torch.zeros(4, 4)], [torch.zeros(2, 4)])


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside torch.cuda.graph, which needs a GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


def test_triton_refuses_the_capture_of_a_graph_in_a_sentence(capturing) -> None:
    pytest.importorskip("triton")
    with FakeTensorMode():
        total, keys = torch.empty(64, 64, device="cuda"), torch.empty(9, 64, device="cuda", dtype=torch.bfloat16)
        left, right = torch.empty(64, 2, device="cuda"), torch.empty(2, 64, device="cuda")
        with pytest.raises(InputError, match=r"cannot be captured in a CUDA graph.*or use the backend 'torch'\."):
            backend_triton._add_second_moments([total], [keys])
        with pytest.raises(InputError, match="cannot be captured in a CUDA graph"):
            backend_triton._update_low_rank([total], [left], [right], 1.0, False, 0)


def test_a_solve_refuses_the_capture_of_a_graph_in_a_sentence(capturing) -> None:
    with FakeTensorMode(), pytest.raises(InputError, match="solve_update cannot be captured"):
        ops.solve_update(torch.empty(3, 8, device="cuda"), torch.empty(3, 4, device="cuda"), None, 1.0)
    with FakeTensorMode(), pytest.raises(InputError, match="solve_on_support cannot be captured"):
        keys, residuals = torch.empty(3, 8, device="cuda"), torch.empty(3, 4, device="cuda")
        ops.solve_on_support(torch.empty(4, 8, device="cuda"), keys, residuals, keys, 1.0)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_the_operators_that_no_graph_may_hold_say_so_to_torch() -> None:
    for operator in (backend_triton.second_moments_op, backend_triton.low_rank_update_op):
        assert torch.Tag.cudagraph_unsafe in operator._opoverload.tags
    # Its operands go by value, not in a table.
    assert torch.Tag.cudagraph_unsafe not in backend_cuda.second_moments_op._opoverload.tags


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """As where torch is built for ROCm and there is an AMD GPU, whose chip and version of Triton a test may change."""
    given = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", triton={"triton": "3.6.0"})

    def version(package: str) -> str:
        if package in given.triton:
            return given.triton[package]
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: given)
    monkeypatch.setattr(importlib.metadata, "version", version)
    backend_triton._is_recent.cache_clear()
    yield given
    backend_triton._is_recent.cache_clear()


@pytest.mark.parametrize(
    ("chip", "installed", "offered"),
    [
        ("gfx942:sramecc+:xnack-", {"triton": "3.6.0"}, True),
        ("gfx90a", {"pytorch-triton-rocm": "3.9.1+gitabc"}, True),
        ("gfx90a", {"triton-rocm": "3.7.0"}, True),
        ("gfx1100", {"triton": "3.6.0"}, False),
        ("gfx942", {"triton": "3.5.1"}, False),
        ("gfx942", {}, False),
    ],
)
def test_amd_gpus_are_offered_triton_and_get_torch(
    amd: SimpleNamespace, chip: str, installed: dict[str, str], offered: bool
) -> None:
    amd.gcnArchName, amd.triton = chip, installed
    names = ops.available_backends("cuda")
    assert names == ["torch", *(["triton"] if offered else []), "reference"]
    assert dispatch._choose(None, torch.device("cuda")) is backend_torch
    if not offered:
        with pytest.raises(InputError, match="'triton' cannot run on cuda here; available are torch, reference"):
            dispatch._choose("triton", torch.device("cuda"))


@pytest.mark.parametrize(
    ("version", "hip", "sixteen_bits"),
    [("2.10.0+cu130", None, True), ("2.9.1+cu130", None, False), ("2.13.0+rocm7.0", "7.0.51831", False)],
)
def test_torch_multiplies_in_16_bits_where_its_version_can(
    monkeypatch: pytest.MonkeyPatch, version: str, hip: str | None, sixteen_bits: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():
        keys = torch.empty(9, 64, device="cuda", dtype=torch.bfloat16)
        assert backend_torch.multiplies_in_16_bits(keys) is sixteen_bits
        assert not backend_torch.multiplies_in_16_bits(keys.float())


def test_the_torch_backend_on_rocm_multiplies_in_float32(amd: SimpleNamespace) -> None:
    keys, total = torch.randn(300, 40).to(torch.bfloat16), torch.zeros(40, 40)
    ops.accumulate_second_moment(total, keys, backend="torch")
    torch.testing.assert_close(total.double(), reference.second_moment(keys).tril(), rtol=1e-5, atol=1e-4)


def test_kernels_on_an_amd_gpu_move_everything_through_pointers(amd: SimpleNamespace) -> None:
    pytest.importorskip("triton")
    from rocr_kernels import _common

    device = torch.device("cuda", 7)  # capability is cached by device
    assert _common.backend_of(device) == "hip"
    assert _common.capability(device) == _common.POINTERS_ONLY
    _common.capability.cache_clear()
    assert _common.register_limit("hip", 1, 8) == {} and _common.register_limit("cuda", 1, 8) == {"maxnreg": 255}
    assert _common.steps_ahead("hip", 4) == 2 and _common.steps_ahead("cuda", 4) == 4
