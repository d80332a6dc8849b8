"""Products of 16-bit weights in float32, where the CPU has no instructions for them."""

from collections.abc import Callable
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
from rocr.ops import wide_products as module
from rocr.ops.wide_products import product, slow_dtypes, wide_products

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def old_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(module, "PIECE", 500)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights whose products are computed in float32."""
    found: list[tuple[int, ...]] = []

    def spy(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(tuple(weight.shape))
        return product(rows, weight, bias)

    monkeypatch.setattr(module, "product", spy)
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
@pytest.mark.parametrize("shape", [(8, 1, 1), (9, 7, 33), (257, 129, 65), (8, 700, 3)])
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


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="this torch has no products of experts")
def test_each_expert_multiplies_its_own_rows(products: list[tuple[int, ...]]) -> None:
    given, weight = matrices(torch.bfloat16, 30, 16), matrices(torch.bfloat16, 4, 24, 16).transpose(1, 2)
    offsets = torch.tensor([9, 9, 12, 28], dtype=torch.int32)
    found = inside(lambda: functional.grouped_mm(given, weight, offs=offsets))
    assert products == [(24, 16)] * 2, "of the experts with eight rows or more"
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
            functional.linear(half[:7], half)
    assert not products


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
