import pytest
import torch

from rocr import ops
from rocr.errors import InputError
from rocr.ops import cpp_backend, reference, torch_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = ([1], [0, 5, 0], [63, 0, 1, 700, 2], [7] * 17)
WIDTHS = (1, 63, 123, 300)

ERROR_OVER_TORCH = 1.1
"""Bound of a backend's error over that of addmm_ in float32; measured at most 1.02."""

BACKENDS = [name for name in ops.available_backends("cpu") if name != "reference"]
PATHS = [name for name in BACKENDS if name != "cpp"]
PATHS += [f"cpp {simd}" for simd in (cpp_backend.simd_names() if "cpp" in BACKENDS else [])]


@pytest.fixture(params=PATHS)
def backend(request, monkeypatch):
    """Each backend, the compiled one with every instruction set."""
    name, _, simd = request.param.partition(" ")
    if simd:
        monkeypatch.setenv(cpp_backend.SIMD_VARIABLE, simd)
    return name


def offsets_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def exact_totals(start, keys, sizes):
    groups = zip(start, keys.split(sizes), strict=True)
    return torch.stack([total.double() + reference.second_moment(each) for total, each in groups])


def error(totals, exact):
    return (totals.double() - exact).tril().norm().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_that_of_torch(guarded, backend, dtype, sizes, width):
    keys = torch.randn(sum(sizes), width).to(dtype)
    start = torch.randn(len(sizes), width, width)
    exact = exact_totals(start, keys, sizes)
    groups = zip(start, keys.float().split(sizes), strict=True)
    by_torch = torch.stack([total.addmm(each.T, each) for total, each in groups])
    totals = guarded(start.flatten(0, 1)).unflatten(0, (len(sizes), width))
    assert ops.accumulate_grouped_second_moment(totals, guarded(keys), offsets_of(sizes), backend) is totals
    rounding = torch.finfo(torch.float32).eps * exact.tril().norm().item()
    assert error(totals, exact) <= ERROR_OVER_TORCH * error(by_torch, exact) + rounding
    assert torch.equal(totals.triu(1), start.triu(1)), "an upper triangle was touched"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_formula_is_that_of_each_group(dtype):
    sizes, keys, start = [4, 0, 9], torch.randn(13, 7).to(dtype), torch.randn(3, 7, 7)
    totals = ops.accumulate_grouped_second_moment(start.clone(), keys, offsets_of(sizes), "reference")
    assert torch.equal(totals.tril(), exact_totals(start, keys, sizes).tril().float())
    assert torch.equal(totals.triu(1), start.triu(1))


@pytest.mark.parametrize("sizes", [[3 * 8192 + 5], [3 * 8192 + 5, 0, 9000, 3]], ids=str)
def test_more_tokens_than_an_accumulator_may_hold(backend, sizes):
    # Equal keys: one float32 number as accumulator is off by 2e-4 here, shorter ones are not.
    keys = torch.full((sum(sizes), 65), 0.1)
    totals = ops.accumulate_grouped_second_moment(torch.zeros(len(sizes), 65, 65), keys, offsets_of(sizes), backend)
    exact = exact_totals(torch.zeros(len(sizes), 65, 65), keys, sizes)
    assert ((totals.double() - exact).tril().abs() <= 2e-6 * exact).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_group_has_the_bytes_of_a_call_of_its_own(backend, with_threads, dtype):
    # Groups that all threads share and groups of one thread.
    sizes = [3000, 0, 20, 700, 1, 1700]
    keys, start = torch.randn(sum(sizes), 290).to(dtype), torch.randn(len(sizes), 290, 290)

    def grouped():
        return ops.accumulate_grouped_second_moment(start.clone(), keys, offsets_of(sizes), backend)

    def alone():
        totals = start.clone()
        for total, each in zip(totals, keys.split(sizes), strict=True):
            ops.accumulate_second_moment(total, each, backend)
        return totals

    assert torch.equal(with_threads(1, grouped), with_threads(1, alone))
    if backend == "cpp":  # torch's products may depend on the number of threads
        results = [with_threads(threads, grouped) for threads in (1, 2, 2, 5, 16)]
        assert all(torch.equal(totals, results[0]) for totals in results)


def test_a_group_reads_its_own_rows_and_writes_its_own_triangle(left_alone, backend):
    totals = left_alone(torch.empty(3 * 300, 300)).view(3, 300, 300)
    lower = torch.ones(300, 300, dtype=torch.bool).tril()
    totals[1, lower] = 0.0
    before, keys = totals.view(torch.int32).clone(), torch.randn(2100, 300)
    keys[:700], keys[1400:] = torch.nan, torch.inf
    ops.accumulate_grouped_second_moment(totals[1:2], keys[700:1400], torch.tensor([0, 700]), backend)
    ops.accumulate_grouped_second_moment(totals, keys[700:1400], torch.tensor([0, 0, 700, 700]), backend)
    bits = totals.view(torch.int32)
    written = torch.zeros(3, 300, 300, dtype=torch.bool)
    written[1, lower] = True
    assert torch.equal(bits[~written], before[~written])
    assert totals[written].isfinite().all() and totals[written].any()


def test_keys_that_are_not_finite_stay_in_their_group(backend):
    keys = torch.randn(900, 40)
    keys[:300], keys[600:] = torch.nan, torch.inf
    totals = ops.accumulate_grouped_second_moment(torch.zeros(3, 40, 40), keys, offsets_of([300] * 3), backend)
    exact = reference.second_moment(keys[300:600]).tril()
    torch.testing.assert_close(totals[1].double(), exact, rtol=1e-5, atol=1e-5)
    lower = torch.ones(40, 40, dtype=torch.bool).tril()
    assert totals[0, lower].isnan().all()
    assert not totals[2, lower].isfinite().any()


@pytest.mark.parametrize("groups, tokens, width", [(0, 0, 5), (2, 0, 5), (2, 5, 0), (3, 0, 0)])
def test_nothing_to_add(backend, groups, tokens, width):
    totals = torch.randn(groups, width, width)
    before = totals.clone()
    offsets = torch.tensor([0] * groups + [tokens])
    ops.accumulate_grouped_second_moment(totals, torch.randn(tokens, width), offsets, backend)
    assert torch.equal(totals, before)


@pytest.mark.parametrize(
    "view",
    [lambda keys: keys[:, ::2], lambda keys: keys[::3], lambda keys: keys.T, lambda keys: keys[:1].expand(30, -1)],
    ids=["columns", "rows", "transposed", "expanded"],
)
def test_views_of_keys(backend, view):
    keys = view(torch.randn(60, 60))
    sizes = [len(keys) - 3, 3]
    totals = torch.zeros(2, keys.shape[1], keys.shape[1])
    ops.accumulate_grouped_second_moment(totals, keys, offsets_of(sizes), backend)
    exact = exact_totals(torch.zeros_like(totals), keys, sizes).tril()
    torch.testing.assert_close(totals.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda totals: totals.mT,
        lambda totals: totals[::2],
        lambda totals: totals.transpose(0, 1).contiguous().transpose(0, 1),
        lambda totals: totals[:, 2:20, 2:20],
    ],
    ids=["transposed", "every second", "groups within rows", "inner part"],
)
def test_views_of_totals(backend, view):
    totals = view(torch.zeros(4, 40, 40))
    groups, width = totals.shape[:2]
    sizes = [*range(1, groups), 20]
    keys = torch.randn(sum(sizes), width)
    ops.accumulate_grouped_second_moment(totals, keys, offsets_of(sizes), backend)
    exact = exact_totals(torch.zeros_like(totals), keys, sizes).tril()
    torch.testing.assert_close(totals.double(), exact, rtol=1e-5, atol=1e-5)


def overlapping():
    return torch.zeros(10, 4).as_strided((3, 4, 4), (8, 4, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"totals": torch.zeros(4, 4)}, r"totals must be square matrices \(groups, d, d\), but are \(4, 4\)"),
        ({"totals": torch.zeros(2, 4, 3)}, r"totals must be square matrices \(groups, d, d\), but are \(2, 4, 3\)"),
        ({"totals": torch.zeros(2, 4, 4).bfloat16()}, "totals must be float32, but are torch.bfloat16: a sum of lower"),
        ({"totals": overlapping(), "offsets": [0, 1, 2, 6]}, "totals has elements that share memory"),
        ({"keys": torch.ones(6, 5)}, r"keys must be \(tokens, 4\) for totals of \(2, 4, 4\), but are \(6, 5\)"),
        ({"keys": torch.ones(6, 4).double()}, "keys must be float32, bfloat16 or float16, but has dtype torch.float64"),
        ({"keys": torch.ones(6, 4, device="meta")}, "totals is on cpu and keys on meta"),
        ({"offsets": [0, 6]}, r"offsets must be \(3,\) for totals of \(2, 4, 4\).*but are \(2,\)"),
        ({"offsets": [[0, 2, 6]]}, r"offsets must be \(3,\) for totals.*but are \(1, 3\)"),
        ({"offsets": torch.tensor([0, 2, 6]).int()}, "offsets must be int64, but are torch.int32"),
        ({"offsets": torch.tensor([0, 2, 6], device="meta")}, "totals is on cpu and offsets on meta"),
        ({"offsets": [1, 2, 6]}, "offsets must begin with 0, but begin with 1"),
        ({"offsets": [-1, 2, 6]}, "offsets must begin with 0, but begin with -1"),
        ({"offsets": [0, 7, 6]}, r"offsets must not descend, but offsets\[1\] is 7 and offsets\[2\] is 6"),
        ({"offsets": [0, -2, 6]}, r"offsets must not descend, but offsets\[0\] is 0 and offsets\[1\] is -2"),
        ({"offsets": [0, 2, 5]}, "offsets must end with the number of tokens, 6, but end with 5"),
        ({"offsets": [0, 2, 2**62]}, f"offsets must end with the number of tokens, 6, but end with {2**62}"),
        ({"backend": "cuda"}, "The backend 'cuda' (has no grouped second moment|cannot run on cpu)"),
        ({"backend": "fast"}, "There is no backend 'fast'"),
    ],
)
def test_operands_that_are_refused(change, words):
    operands = {"totals": torch.zeros(2, 4, 4), "keys": torch.ones(6, 4), "offsets": [0, 2, 6]} | change
    if isinstance(operands["offsets"], list):
        operands["offsets"] = torch.tensor(operands["offsets"])
    with pytest.raises(InputError, match=words):
        ops.accumulate_grouped_second_moment(**operands)
    assert not operands["totals"].any()


def test_operands_that_share_memory_are_refused():
    memory = torch.zeros(200)
    totals, keys = memory[:32].view(2, 4, 4), memory[31:55].view(6, 4)
    with pytest.raises(InputError, match="totals and keys share memory"):
        ops.accumulate_grouped_second_moment(totals, keys, torch.tensor([0, 2, 6]))
    with pytest.raises(InputError, match="totals and offsets share memory"):
        ops.accumulate_grouped_second_moment(totals, torch.ones(0, 4), memory[:6].view(torch.int64))
    assert not memory.any()


def test_a_backend_without_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.delattr(torch_backend, "accumulate_grouped_second_moment")
    with pytest.raises(
        InputError, match=r"The backend 'torch' has no grouped second moment; choose one of .*reference"
    ):
        ops.accumulate_grouped_second_moment(torch.zeros(1, 2, 2), torch.ones(1, 2), torch.tensor([0, 1]), "torch")


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension was not compiled")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": []}, "offsets that begin at 0 or more and ascend"),
        ({"offsets": [-1, 2, 3]}, "offsets that begin at 0 or more and ascend"),
        ({"offsets": [0, 3, 2]}, "offsets that begin at 0 or more and ascend"),
        ({"size": 5}, "size 5.*total_stride 4"),
        ({"keys_stride": 3}, "keys_stride 3"),
        ({"threads": 0}, "0 threads"),
    ],
)
def test_calls_of_the_compiled_kernel_that_are_refused(change, words):
    import rocr._C as kernels

    totals, keys = torch.zeros(2, 4, 4), torch.ones(3, 4)
    sizes = {"group_stride": 16, "total_stride": 4, "keys_stride": 4, "offsets": [0, 1, 3], "size": 4, "threads": 1}
    with pytest.raises(ValueError, match=words):
        kernels.accumulate_grouped_second_moment(
            totals=totals.data_ptr(), keys=keys.data_ptr(), dtype=kernels.DType.float32, **(sizes | change)
        )
    assert not totals.any()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension was not compiled")
def test_the_operator_is_what_torch_expects_of_it():
    operands = torch.zeros(2, 8, 8), torch.randn(5, 8), [0, 2, 5]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(cpp_backend.grouped_second_moment_op, operands, test_utils=checks)
