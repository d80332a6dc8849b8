import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rocr
from rocr import InputError
from rocr.model.architecture import find_architecture
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN, INNER = 32, 48


@pytest.fixture(autouse=True)
def eager():
    """BitNet's layers are compiled when they run, which takes longer than all tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Mlp(nn.Module):
    """An MLP like those of Llama."""

    def __init__(self, inner=INNER, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, inner, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(inner, HIDDEN, bias=bias)

    def key(self, states):
        return torch.nn.functional.silu(self.gate_proj(states)) * self.up_proj(states)

    def forward(self, states):
        return self.down_proj(self.key(states))


class DownFirst(Mlp):
    """The down-projection is registered before the others."""

    def __init__(self):
        nn.Module.__init__(self)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER) for _ in range(2))


class Square(Mlp):
    """As many inner features as outer ones: every matrix returns the hidden size, the down-projection stands first."""

    def __init__(self):
        nn.Module.__init__(self)
        self.down_proj = nn.Linear(HIDDEN, HIDDEN)
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, HIDDEN) for _ in range(2))


class WithGateBehind(Mlp):
    """A matrix of the hidden size behind the down-projection that only makes a gate for the input."""

    def __init__(self):
        super().__init__()
        self.selector = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, states):
        return super().forward(states * torch.sigmoid(self.selector(states)))


class WithDropout(Mlp):
    def __init__(self):
        super().__init__()
        self.selector, self.dropout = nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.5)

    def forward(self, states):
        return self.dropout(super().forward(states + self.selector(states)))


class Scaled(WithGateBehind):
    """As Falcon-H1 multiplies by a number, and layer scale by a vector."""

    def forward(self, states):
        return 0.22 * super().forward(states) * torch.linspace(0.5, 2, HIDDEN).to(states.dtype)


class WithResidual(WithGateBehind):
    """As CPM-Ant's, whose blocks add their input."""

    def forward(self, states):
        return states + super().forward(states)


class WithResidualGiven(WithGateBehind):
    """As Bloom's, which adds a residual that it is given."""

    def forward(self, states, residual):
        return residual + super().forward(states)


class WithTuple(WithGateBehind):
    def forward(self, states):
        return super().forward(states), None


class TwoBranches(nn.Module):
    """Two MLPs whose outputs are summed."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Mlp(), Mlp()

    def forward(self, states):
        return self.one(states) + self.other(states)


class WithSecondOutput(Mlp):
    """The down-projection's output is turned by a function behind it."""

    def forward(self, states):
        return super().forward(states).square()


class Fused(Mlp):
    """As kernels do that read the weights and call no module."""

    def forward(self, states):
        return torch.nn.functional.linear(self.key(states), self.down_proj.weight)


@pytest.fixture
def with_mlp(model):
    """with_mlp(kind, dtype): the architecture of a model whose layer 1 has this MLP."""

    def make(kind, dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model.model.layers[1].mlp = kind()
        return find_architecture(model.to(dtype).train())

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind",
    [Mlp, DownFirst, Square, WithGateBehind, WithDropout, Scaled, WithResidual, WithResidualGiven, WithTuple],
)
def test_the_down_projection_is_the_matrix_whose_output_is_the_mlps(with_mlp, kind, dtype):
    architecture = with_mlp(kind, dtype)
    state = torch.get_rng_state()
    assert architecture.down_projection(1).parameter_name == "model.layers.1.mlp.down_proj.weight"
    architecture.check_down_projection(1)
    assert torch.equal(torch.get_rng_state(), state), "what is drawn later does not change"
    assert all(module.training for module in architecture.model.modules())
    assert not any(module._forward_hooks for module in architecture.model.modules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (TwoBranches, r"1\.mlp has several matrices that return 32 features \(one\.down_proj, other\.down_proj\)"),
        (WithSecondOutput, r"The output of model\.layers\.1\.mlp is not that of its last matrix .*1\.mlp\.down_proj"),
        (Fused, r"layers\.1\.mlp computes its output without calling model\.layers\.1\.mlp\.down_proj"),
    ],
)
def test_an_mlp_that_does_not_end_in_one_matrix_is_refused(with_mlp, kind, words, dtype):
    architecture = with_mlp(kind, dtype)
    with pytest.raises(InputError, match=words):
        architecture.check_down_projection(1)


@pytest.mark.parametrize("call", ["statistics", "unlearn"])
@pytest.mark.parametrize("kind", [TwoBranches, WithSecondOutput, Fused])
def test_it_is_refused_before_anything_is_read(
    with_mlp, kind, call, model, tokenizer, texts, concepts, statistics, weights_of
):
    with_mlp(kind)
    before = weights_of(model)
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"layers\.1\.mlp"):
        if call == "statistics":
            rocr.collect_statistics(model, tokenizer, texts, [1])
        else:
            rocr.unlearn(model, tokenizer, concepts, statistics, rocr.EditConfig(layers=[1]))
    assert same_weights(weights_of(model), before)


def test_an_mlp_that_is_not_loaded_is_judged_by_its_structure(with_mlp):
    architecture = with_mlp(WithGateBehind)
    architecture.model.to("meta")
    assert architecture.down_projection(1).name == "model.layers.1.mlp.selector"  # the last that fits
    architecture.check_down_projection(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_left_to_later_checks(with_mlp, dtype):
    architecture = with_mlp(Square, dtype)
    with torch.no_grad():
        architecture.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    architecture.check_down_projection(1)


def test_an_mlp_that_fails_alone_is_checked_by_its_matrix(with_mlp):
    class NeedsMore(Mlp):
        def forward(self, states, lengths):
            return super().forward(states)[:, : lengths.longest]

    class BitNeedsMore(NeedsMore):
        def __init__(self):
            super().__init__()
            self.down_proj = packed(INNER, HIDDEN)

    with_mlp(NeedsMore).check_down_projection(1)
    with pytest.raises(InputError, match="is not its input times its weight"):
        with_mlp(BitNeedsMore).check_down_projection(1)


def packed(inputs, outputs, scale=3.0, online=False):
    """A layer of BitNet in memory: rounded inputs, and a scale behind the product, or weights that are rounded too."""
    from transformers.integrations.bitnet import AutoBitLinear  # it imports torch's compiler

    module = AutoBitLinear(inputs, outputs, bias=False, online_quant=online)
    if not online:
        module.weight.data = module.weight.data.sign()
        module.weight_scale.fill_(scale)
    return module


class TimesTwo(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


@pytest.mark.parametrize(
    "make",
    [
        lambda: packed(INNER, HIDDEN),
        lambda: packed(INNER, HIDDEN, online=True),
        lambda: Doubled(INNER, HIDDEN),
    ],
    ids=["BitNet", "BitNet rounded while it runs", "scaled"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_module_that_is_more_than_a_product_is_refused(model, make, dtype):
    model.model.layers[1].mlp.down_proj = make()
    with pytest.raises(
        InputError,
        match=r"down_proj, a (AutoBitLinear|Doubled), is not its input times its weight: the relative error is",
    ):
        find_architecture(model.to(dtype)).check_down_projection(1)


@pytest.mark.parametrize("kind", ["weight norm", "parametrized"])
def test_a_weight_that_is_computed_is_refused(model, kind):
    module = model.model.layers[1].mlp.down_proj
    if kind == "weight norm":
        parametrizations.weight_norm(module)
    else:
        parametrize.register_parametrization(module, "weight", TimesTwo())
    with pytest.raises(InputError, match="not quantised ones"):
        find_architecture(model).down_projection(1)


class Int8Tensor(Tensor):
    """As torchao's and quanto's: it holds integers and a scale, and calls itself bfloat16."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of quantised values")


@pytest.mark.parametrize("call", ["statistics", "unlearn"])
def test_quantised_values_that_call_themselves_bfloat16_are_refused(model, tokenizer, texts, concepts, call):
    model = model.bfloat16()
    statistics = rocr.collect_statistics(copy.deepcopy(model), tokenizer, texts, [1])
    for layer in model.model.layers:
        values = torch.ones(HIDDEN, INNER, dtype=torch.int8)
        layer.mlp.down_proj.weight = nn.Parameter(Int8Tensor(values, 0.5), requires_grad=False)
    with pytest.raises(
        InputError,
        match=r"down_proj is a Linear that holds a Int8Tensor that stands for torch\.bfloat16 .*not quantised",
    ):
        if call == "statistics":
            rocr.collect_statistics(model, tokenizer, texts, [1])
        else:
            rocr.unlearn(model, tokenizer, concepts, statistics, rocr.EditConfig(layers=[1]))


def test_autocast_around_it_does_not_matter(with_mlp):
    architecture = with_mlp(Square)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        architecture.check_down_projection(1)


def test_every_family_passes(family, make_model):
    architecture = find_architecture(make_model(family))
    for layer in range(architecture.depth):
        architecture.check_down_projection(layer)
