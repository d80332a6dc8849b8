import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rocr import ops
from rocr.errors import InputError
from rocr.ops.dispatch import BACKENDS


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_backends_of_the_cpu():
    names = ops.available_backends("cpu")
    assert names[-2:] == ["torch", "reference"]
    assert names == ops.available_backends(torch.device("cpu"))
    assert set(names) <= set(BACKENDS)


def test_nothing_compiled_is_imported_before_it_is_used_and_a_missing_extension_is_no_error():
    code = (
        "import sys, torch; from rocr import ops\n"
        "print([name for name in sys.modules if name == 'rocr._C' or 'rocr_kernels' in name])\n"
        "sys.modules['rocr._C'] = None\n"
        "print(ops.available_backends('cpu'))\n"
        "print(ops.accumulate_second_moment(torch.zeros(1, 1), torch.full((3, 1), 2.0)).item())"
    )
    assert run_python(code) == "[]\n['torch', 'reference']\n12.0\n"


@pytest.mark.parametrize("name", ["cuda", "fastest"])
def test_a_backend_that_is_not_there(name):
    with pytest.raises(InputError, match=f"backend '{name}'"):
        ops.accumulate_second_moment(torch.zeros(2, 2), torch.zeros(3, 2), backend=name)


@pytest.mark.parametrize(
    "total, keys, words",
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), r"total must be a square matrix, but is \(2, 3\)"),
        (torch.zeros(3, 3), torch.zeros(4, 2), r"keys must be \(tokens, 3\).*are \(4, 2\)"),
        (torch.zeros(3, 3), torch.zeros(3), r"are \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.bfloat16), torch.zeros(4, 3), "total must be float32"),
        (torch.zeros(3, 3), torch.zeros(4, 3).double(), "keys must be float32, bfloat16 or float16.*float64"),
        (torch.zeros(3, 3), torch.zeros(4, 3, device="meta"), "total is on cpu and keys on meta"),
        (torch.zeros(1, 3).expand(3, 3), torch.zeros(4, 3), r"share memory.*\(0, 1\)"),
    ],
)
def test_second_moments_that_are_refused(total, keys, words):
    with pytest.raises(InputError, match=words):
        ops.accumulate_second_moment(total, keys)


def test_keys_in_the_memory_of_the_total_are_refused():
    total = torch.zeros(3, 3)
    with pytest.raises(InputError, match="total and keys share memory"):
        ops.accumulate_second_moment(total, total)


@pytest.mark.parametrize(
    "weights, lefts, rights, words",
    [
        (torch.zeros(4, 5), torch.zeros(4, 2), torch.zeros(3, 5), r"weights\[0\].*\(4, 5\), \(4, 2\) and \(3, 5\)"),
        (torch.zeros(4, 5), torch.zeros(2, 4), torch.zeros(2, 5), r"\(2, 4\)"),
        (torch.zeros(4, 5), torch.zeros(4), torch.zeros(5), "must be matrices"),
        ([torch.zeros(4, 5)], [], [torch.zeros(2, 5)], "1 weights, 0 lefts and 1 rights"),
        (torch.zeros(4, 5).double(), torch.zeros(4, 2), torch.zeros(2, 5), r"weights\[0\] must be float32.*float64"),
        (
            torch.zeros(4, 5),
            torch.zeros(4, 2).int(),
            torch.zeros(2, 5),
            r"lefts\[0\] must be of a floating-point dtype",
        ),
        (torch.zeros(4, 5), torch.zeros(4, 2, device="meta"), torch.zeros(2, 5), "on cpu and .* on meta"),
        (torch.zeros(1, 5).expand(4, 5), torch.zeros(4, 2), torch.zeros(2, 5), "share memory"),
        (torch.zeros(9).as_strided((4, 5), (1, 1)), torch.zeros(4, 2), torch.zeros(2, 5), "share memory"),
    ],
)
def test_updates_that_are_refused(weights, lefts, rights, words):
    with pytest.raises(InputError, match=words):
        ops.low_rank_update(weights, lefts, rights)


def test_a_tied_weight_is_refused():
    weight = torch.zeros(4, 5)
    left, right = torch.ones(4, 2), torch.ones(2, 5)
    with pytest.raises(InputError, match=r"weights\[0\] and weights\[1\] share memory"):
        ops.low_rank_update([weight, weight.view(4, 5)], [left, left], [right, right])
    with pytest.raises(InputError, match=r"weights\[0\] and rights\[0\] share memory"):
        ops.low_rank_update(weight, left, weight[:2])
    assert not weight.any(), "a refused call wrote"
    ops.low_rank_update([weight, torch.zeros(4, 5)], [left, left], [right, right])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"seed": -1}, "seed is -1"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        ops.low_rank_update(torch.zeros(4, 5), torch.ones(4, 2), torch.ones(2, 5), **options)


def test_parameters_that_require_a_gradient_are_updated():
    weight = torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.bfloat16))
    ops.low_rank_update(weight, torch.ones(4, 2), torch.ones(2, 5))
    assert torch.equal(weight.detach(), torch.full((4, 5), 2.0, dtype=torch.bfloat16))
    assert weight.requires_grad


@pytest.mark.parametrize("backend", [name for name in ops.available_backends("cpu") if name != "reference"])
def test_operations_trace_and_compile(backend):
    def edit(weight, left, right, total):
        ops.low_rank_update(weight, left * 2, right, backend=backend)
        ops.accumulate_second_moment(total, weight, backend=backend)
        return weight.sum() + total.sum()

    operands = torch.randn(9, 7), torch.randn(9, 2), torch.randn(2, 7), torch.zeros(7, 7)
    others = [each.clone() for each in operands]
    with FakeTensorMode() as mode:
        assert edit(*[mode.from_tensor(each) for each in operands]).shape == ()
    expected = edit(*operands)
    torch.testing.assert_close(torch.compile(edit, backend="aot_eager")(*others), expected)
    for other, each in zip(others, operands, strict=True):
        torch.testing.assert_close(other, each)
