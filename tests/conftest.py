import reprlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

MARGIN = 64
"""Numbers of NaN on either side of a guarded matrix."""


pytest_plugins = [
    "tests.support.models",
    "tests.support.limits",
    "tests.support.promises",
    "tests.support.hostile",
    "tests.support.golden",
    "tests.support.states",
    "tests.support.option_effects",
    "tests.support.of_0_1",
    "tests.support.vision",
]
"""Fixtures that several folders use."""


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name dtypes, lists and dictionaries in ids of tests by what they hold; pytest only numbers them."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, (tuple, list, dict)):
        # An address differs between the processes of pytest-xdist, which must name tests alike.
        return None if " at 0x" in repr(val) else reprlib.repr(val)
    return None


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let SIGINT raise KeyboardInterrupt: a shell starts a job in the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def guarded() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies of matrices that lie between NaNs, also between rows; every NaN must still be there at the end.

    A read beyond the matrix spoils the result with a NaN, a write beyond it spoils the margin.
    """
    memories: list[tuple[Tensor, Tensor]] = []

    def lay(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        memory = torch.full((rows + 2, MARGIN + columns + MARGIN), float("nan"), dtype=matrix.dtype)
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside[1:-1, MARGIN:-MARGIN] = True
        memories.append((memory, inside))
        return memory[1:-1, MARGIN:-MARGIN].copy_(matrix)

    yield lay
    for memory, inside in memories:
        assert memory[~inside].isnan().all(), "memory around a matrix was written"


@pytest.fixture
def with_threads() -> Iterator[Callable[..., Any]]:
    """with_threads(threads, function): what a function returns where torch has so many threads."""
    before = torch.get_num_threads()

    def run(threads: int, function: Callable[[], Any]) -> Any:
        torch.set_num_threads(threads)
        return function()

    yield run
    torch.set_num_threads(before)


@pytest.fixture
def left_alone() -> Callable[[Tensor], Tensor]:
    """Fills a float32 matrix with numbers that arithmetic may change: -0.0, NaNs with payloads, denormals."""
    patterns = (0x80000000, 0x7FC12345, 0xFFA54321, 0x7F800000, 0xFF800000, 0x00000123, 0x80000001)

    def fill(matrix: Tensor) -> Tensor:
        chosen = torch.tensor([each - (each >> 31 << 32) for each in patterns], dtype=torch.int32)
        matrix.view(torch.int32).copy_(chosen[torch.arange(matrix.numel()) % len(chosen)].view(matrix.shape))
        return matrix

    return fill
