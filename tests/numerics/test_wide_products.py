"""Products of 16-bit weights in float32, where the CPU has no instructions for them."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rocr
from rocr import CollectOptions
from rocr.model.forward import forward, logits_of
from rocr.model.generate import ask
from rocr.ops import cpp_backend
from rocr.ops import wide_products as module
from rocr.ops.wide_products import slow_dtypes, wide_products

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def old_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(module, "PIECE", 500)


PATHS = ["torch", *(cpp_backend.simd_names() if cpp_backend.is_available(torch.device("cpu")) else [])]


@pytest.fixture(params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies: the kernel of an instruction set, or torch where there is no kernel."""
    if request.param == "torch":
        monkeypatch.setattr(cpp_backend, "is_available", lambda device: False)
    else:
        monkeypatch.setenv(cpp_backend.SIMD_VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights whose products are computed in float32."""
    found: list[tuple[int, ...]] = []

    def spy(multiply: Callable[..., Tensor], rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(tuple(weight.shape))
        return multiply(rows, weight, bias)

    for place, name in ((module, "product_in_pieces"), (cpp_backend, "wide_product")):
        monkeypatch.setattr(place, name, partial(spy, getattr(place, name)))
    return found


def matrices(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


def inside(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad(), wide_products():
        return function()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", ["AVX2", "avx512_core", "AVX512_CORE_VNNI", "SSE41"])
def test_a_set_without_16_bit_products_makes_both_dtypes_slow(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert slow_dtypes() == set(HALVES)


def test_a_chip_with_bfloat16_instructions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    for name, has in (("avx512_bf16", True), ("amx_tile", False)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=has: has, raising=False)
    assert torch.bfloat16 not in slow_dtypes()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert torch.bfloat16 in slow_dtypes(), "oneDNN converts there"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(8, 1, 1), (9, 7, 33), (257, 129, 65), (8, 700, 3), (3, 9000, 5), (5, 130, 70)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_errs_no_more_than_one_rounding(
    dtype: torch.dtype, shape: tuple[int, int, int], biased: bool, guarded: Callable[[Tensor], Tensor]
) -> None:
    rows, d_in, d_out = shape
    given, weight = (guarded(matrices(dtype, *size)) for size in ((rows, d_in), (d_out, d_in)))
    bias = matrices(dtype, d_out) if biased else None
    exact = functional.linear(*(None if t is None else t.double() for t in (given, weight, bias)))
    found = inside(lambda: functional.linear(given, weight, bias))
    assert found.dtype == dtype
    rounded = error(exact.to(dtype), exact)
    assert error(found, exact) <= 1.01 * rounded + 1e-6, "float32 sums, rounded once"


def test_shapes_of_more_dimensions_and_transposed_weights(products: list[tuple[int, ...]]) -> None:
    given, weight = matrices(torch.bfloat16, 2, 3, 5, 16), matrices(torch.bfloat16, 16, 40).T
    found = inside(lambda: functional.linear(given, weight))
    assert products == [(40, 16)]
    assert found.shape == (2, 3, 5, 40)
    exact = given.double() @ weight.double().T
    assert error(found, exact) <= 1.01 * error(exact.bfloat16(), exact)


def test_rows_that_share_memory() -> None:
    given, weight = matrices(torch.bfloat16, 1, 16).expand(9, 16), matrices(torch.bfloat16, 1, 16).expand(5, 16)
    own = matrices(torch.bfloat16, 9, 16)
    for one, other in ((given, own), (own, weight)):
        exact = one.double() @ other.double().T
        assert error(inside(lambda one=one, other=other: functional.linear(one, other)), exact) <= 1e-2


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="this torch has no products of experts")
def test_each_expert_multiplies_its_own_rows(path: str, products: list[tuple[int, ...]]) -> None:
    given, weight = matrices(torch.bfloat16, 30, 16), matrices(torch.bfloat16, 4, 24, 16).transpose(1, 2)
    offsets = torch.tensor([9, 9, 12, 28], dtype=torch.int32)
    found = inside(lambda: functional.grouped_mm(given, weight, offs=offsets))
    assert products == [(24, 16)] * (2 if path == "torch" else 3), "of the experts with enough rows"
    for expert, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        exact = given[start:end].double() @ weight[expert].double()
        assert torch.allclose(found[start:end].double(), exact, atol=0.05, rtol=0.01)
    assert not found[28:].any(), "rows after the last expert belong to none"


def test_what_is_not_slow_or_records_gradients_is_left_to_torch(products: list[tuple[int, ...]]) -> None:
    half, single = matrices(torch.bfloat16, 20, 16), matrices(torch.float32, 20, 16)
    with wide_products():
        functional.linear(half, half.clone().requires_grad_()).sum().backward()
        with torch.no_grad():
            functional.linear(single, single)
            functional.linear(half[:2], half)
    assert not products


def test_few_rows_are_multiplied_by_the_kernel_alone(path: str, products: list[tuple[int, ...]]) -> None:
    weight = matrices(torch.bfloat16, 20, 16)
    inside(lambda: functional.linear(weight[:3], weight))
    inside(lambda: functional.linear(weight[:7], weight))
    assert len(products) == (0 if path == "torch" else 2)
    inside(lambda: functional.linear(weight[:8], weight))
    assert products[-1] == (20, 16)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_kernel_reads_a_large_weight_for_one_row_too(
    path: str, rows: int, products: list[tuple[int, ...]], guarded: Callable[[Tensor], Tensor]
) -> None:
    columns = 1000
    for height, is_large in ((module.LARGE_WEIGHT // columns + 1, True), (module.LARGE_WEIGHT // columns, False)):
        products.clear()
        given, weight = (guarded(matrices(torch.bfloat16, *size)) for size in ((rows, columns), (height, columns)))
        found = inside(lambda given=given, weight=weight: functional.linear(given, weight))
        assert len(products) == (1 if is_large and path != "torch" else 0)
        if products:
            exact = given.double() @ weight.double().T
            assert error(found, exact) <= 1.01 * error(exact.bfloat16(), exact)


def test_a_kernels_bytes_do_not_depend_on_the_threads(path: str) -> None:
    given, weight = matrices(torch.bfloat16, 30, 700), matrices(torch.bfloat16, 900, 700)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(inside(lambda: functional.linear(given, weight)))
    finally:
        torch.set_num_threads(threads)
    assert path == "torch" or torch.equal(*found)


@pytest.mark.skipif(len(PATHS) == 1, reason="the extension was not compiled")
def test_the_operator_is_traced_with_the_shape_of_its_result() -> None:
    given, weight = matrices(torch.bfloat16, 3, 16), matrices(torch.bfloat16, 20, 16)
    for bias in (None, weight[:, 0]):
        torch.library.opcheck(
            cpp_backend.wide_product_op, (given, weight, bias), test_utils=("test_schema", "test_faketensor")
        )


def test_the_context_ends_with_an_exception(products: list[tuple[int, ...]]) -> None:
    half = matrices(torch.bfloat16, 20, 16)
    with pytest.raises(ZeroDivisionError), wide_products():
        raise ZeroDivisionError
    with torch.no_grad():
        functional.linear(half, half)
    assert not products


def test_all_passes_of_a_model_are_inside(
    model: Any, tokenizer: Any, products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = model.to(torch.bfloat16)
    tokens = torch.randint(0, 40, (2, 9))
    text = "Ada Byron wrote the first program, and more than one letter about it. " * 4
    passes: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(half, tokens),
        "generate": lambda: ask(half, tokenizer, [text], max_tokens=2),
        "run_through": lambda: rocr.collect_statistics(half, tokenizer, [text], (1,), CollectOptions(tokens=32)),
    }
    for name, run in passes.items():
        products.clear()
        with torch.no_grad():
            run()
        assert products, name
    with torch.no_grad():
        wide = logits_of(forward(half, tokens)).double()
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
        exact = logits_of(forward(model.double(), tokens))
        own = logits_of(forward(half.to(torch.bfloat16), tokens)).double()
    assert error(wide, exact) <= 1.2 * error(own, exact)
