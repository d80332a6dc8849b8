"""Statistics and edits on a GPU: what the CPU computes, the same bytes every time, and no large matrix on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rocr
from rocr import Concept, Edit, EditConfig

ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)
CONFIGS = {
    "whitened": EditConfig(),
    "projected": EditConfig(method="projected", threshold=0.5, relative_threshold=True),
}

ERROR_OF_TWO_FORWARD_PASSES = 1e-3
"""Between the updates of two devices, which round a forward pass in their own ways; kept on an H200."""


class CopiesToHost(TorchDispatchMode):
    """Keeps the shapes of the tensors that are copied from the GPU to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        comes_from_gpu = any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves((args, kwargs)))
        if comes_from_gpu and isinstance(result, Tensor) and result.device.type == "cpu":
            self.shapes.append(tuple(result.shape))
        return result


def unlearn_on(
    device: str, model: nn.Module, tokenizer: Any, texts: Sequence[str], concepts: Sequence[Concept], method: str
) -> tuple[nn.Module, Edit]:
    own = copy.deepcopy(model).to(device)
    statistics = rocr.collect_statistics(own, tokenizer, texts)
    assert all(moment.device.type == device for moment in statistics.moments.values())
    return own, rocr.unlearn(own, tokenizer, concepts, statistics, CONFIGS[method])


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_an_edit_repeats_bit_for_bit_and_is_taken_back(
    device: str,
    method: str,
    model: nn.Module,
    tokenizer: Any,
    texts: list[str],
    concepts: list[Concept],
    weights_of: Callable[[nn.Module], dict[str, Tensor]],
) -> None:
    before = weights_of(copy.deepcopy(model).to(device))
    (first, edit), (second, _) = (unlearn_on(device, model, tokenizer, texts, concepts, method) for _ in range(2))
    edited = weights_of(first)
    assert all(torch.equal(*pair) for pair in zip(edited.values(), weights_of(second).values(), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(edited.values(), before.values(), strict=True))
    edit.revert(first)
    assert all(torch.equal(*pair) for pair in zip(weights_of(first).values(), before.values(), strict=True))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("device", [ON_GPU])
def test_an_edit_is_that_of_the_cpu(
    device: str, method: str, model: nn.Module, tokenizer: Any, texts: list[str], concepts: list[Concept]
) -> None:
    (_, there), (_, here) = (unlearn_on(each, model, tokenizer, texts, concepts, method) for each in (device, "cpu"))
    for ours, expected in zip(there.updates, here.updates, strict=True):
        assert ours.factors.left.device.type == device
        exact = expected.factors.left.double() @ expected.factors.right.double()
        error = (ours.factors.left.double() @ ours.factors.right.double()).cpu() - exact
        assert error.norm() <= ERROR_OF_TWO_FORWARD_PASSES * exact.norm()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("device", [ON_GPU])
def test_no_matrix_of_the_size_of_a_second_moment_comes_to_the_host(
    device: str, method: str, model: nn.Module, tokenizer: Any, texts: list[str], concepts: list[Concept]
) -> None:
    with CopiesToHost() as copies:
        _, edit = unlearn_on(device, model, tokenizer, texts, concepts, method)
        size = edit.updates[0].factors.right.shape[1]
        assert copies.shapes, "the digests of weights, at least, are made on the host"
        assert (size, size) not in copies.shapes
        torch.zeros(size, size, device=device).cpu()
    assert (size, size) in copies.shapes
