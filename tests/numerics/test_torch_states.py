"""Results do not depend on the caller's settings of torch, and these are unchanged afterwards."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rocr
from rocr import Concept, Edit, EditConfig, Probe, Statistics, ops
from rocr.edit.record import EditRecord
from rocr.evaluation import EvaluateOptions
from rocr.evaluation.attacks.suite import AttackOptions, attack
from rocr.evaluation.attacks.weights import rounded
from rocr.evaluation.lora_training import Example, Training, trained
from rocr.evaluation.measures import TextSample, divergence, perplexity
from rocr.model.generate import ask
from rocr.statistics.self_generated import sample_sequences
from tests.support.models import same_weights
from tests.support.states import STATES, surroundings

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
CONFIG = EditConfig(layers=[1, 2], key_tokens="last", templates=("Who is {}?",))
OTHER = [Concept("Robert Downey Jr.", "a gardener")]
PROBES = [
    Probe("Ada Byron", "Where was Ada Byron born?", "London", ("Rome", "Oslo")),
    Probe("Ada Byron", "What did Ada Byron write?", "programs", ("songs", "a key")),
    Probe("Blaise Pascal", "What did Blaise Pascal weigh?", "the air", ("gold", "salt"), split="retain"),
]


@dataclass
class Bench:
    """What public functions are called with; every run has its own.

    Attributes:
        model, edited: without an edit, and with it.
        edit: of the concepts, on `edited`.
        folder: an empty one.
    """

    model: nn.Module
    edited: nn.Module
    edit: Edit
    tokenizer: Any
    statistics: Statistics
    concepts: list[Concept]
    texts: list[str]
    folder: Path

    def other(self) -> Edit:
        """An edit of another concept."""
        return rocr.unlearn(self.model, self.tokenizer, OTHER, self.statistics, CONFIG)


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


# Made before any state is set.
KEYS, RESIDUALS, WIDE_KEYS, WEIGHT, LEFT, RIGHT = map(matrix, (6, 6, 70, 40, 40, 5), (64, 32, 50, 60, 5, 60))
TINY = 1e-39  # below it float32 has denormal numbers alone
TINY_WEIGHT, TINY_LEFT = WEIGHT * TINY, LEFT * TINY
HALF_WEIGHT = WEIGHT.to(torch.bfloat16)
SPARSE, SPARSE_RESIDUALS = WEIGHT.relu(), matrix(5, 40)
METRIC = matrix(64, 64) @ matrix(64, 64).T
TOTAL = torch.zeros(50, 50)
OFFSETS = torch.tensor([0, 30, 30, 70])


def fresh(tensor: Tensor) -> Tensor:
    """Copy a tensor so that it is an ordinary one also in inference mode."""
    with torch.inference_mode(False):
        return tensor.clone()


def second_moments(_: Bench) -> list[Tensor]:
    found = []
    for backend in ops.available_backends("cpu"):
        one, two, three = (fresh(TOTAL) for _ in range(3))
        ops.accumulate_second_moment(one, WIDE_KEYS, backend)
        ops.accumulate_second_moments([two, three], [WIDE_KEYS, -WIDE_KEYS], backend)
        found += [ops.symmetrize(one), two, three]
    return found


def grouped_second_moments(_: Bench) -> list[Tensor]:
    found = []
    for backend in ops.available_backends("cpu"):
        totals = fresh(TOTAL.expand(3, -1, -1))
        found.append(ops.accumulate_grouped_second_moment(totals, WIDE_KEYS, OFFSETS, backend))
    return found


def supported_coefficients(_: Bench) -> list[Tensor]:
    backends = [backend for backend in ops.available_backends("cpu") if backend != "cuda"]
    return [ops.solve_on_support(SPARSE, RIGHT, SPARSE_RESIDUALS, RIGHT, 9.0, backend) for backend in backends]


def updated_weights(_: Bench) -> list[Tensor]:
    found = []
    for backend in ops.available_backends("cpu"):
        for rounding in ("nearest", "stochastic"):
            weights = [fresh(WEIGHT), fresh(HALF_WEIGHT)]
            ops.low_rank_update(weights, [LEFT] * 2, [RIGHT] * 2, 0.7, rounding, 3, backend)
            found += weights
        tiny = fresh(TINY_WEIGHT)
        ops.low_rank_update(tiny, TINY_LEFT, RIGHT, backend=backend)
        found.append(tiny)
    return found


def saved(bench: Bench, what: Edit | Statistics) -> Any:
    what.save(bench.folder / "saved")
    return type(what).load(bench.folder / "saved")


def attacked(bench: Bench) -> Any:
    pytest.importorskip("peft")
    options = AttackOptions(taught=1, epochs=(1,), prefixes=("Now! ",), examples=1)
    return attack(bench.model, bench.tokenizer, PROBES, forms=["qa"], layers=[1], options=options)


def reverted(bench: Bench) -> None:
    with bench.edit.applied(bench.model):
        pass
    bench.edit.apply(bench.model)
    bench.edit.revert(bench.model)


def restored(bench: Bench) -> None:
    with bench.edit.reverted(bench.edited):
        pass


def evaluated(bench: Bench) -> Any:
    sample = TextSample.take(bench.texts, bench.tokenizer, tokens=96, length=32)
    options = EvaluateOptions(generate=True, text=sample)
    return rocr.evaluate(bench.model, bench.tokenizer, PROBES, options=options)


def measured(bench: Bench) -> Any:
    sample = TextSample.take(bench.texts, bench.tokenizer, tokens=96, length=32)
    bench.edit.revert(bench.edited)
    return (
        perplexity(bench.model, sample),
        divergence(bench.model, sample, lambda: bench.edit.applied(bench.model)),
        ask(bench.model, bench.tokenizer, ["Who is Ada Byron?"], max_tokens=5),
        sample_sequences(bench.model, bench.tokenizer, 40, seed=1),
    )


CASES: dict[str, Callable[[Bench], Any]] = {
    "collect_statistics": lambda b: rocr.collect_statistics(b.model, b.tokenizer, b.texts[:6], layers=[1, 2]),
    "unlearn": lambda b: rocr.unlearn(b.model, b.tokenizer, b.concepts, b.statistics, CONFIG),
    "evaluate": evaluated,
    "choose_redirects": lambda b: rocr.choose_redirects(b.model, b.tokenizer, PROBES[:2], ["rain", "roses"], ["qa"]),
    "propose_aliases": lambda b: rocr.propose_aliases(b.model, b.tokenizer, b.concepts[:1], ["Greek"]),
    "Edit.revert": lambda b: b.edit.revert(b.edited),
    "Edit.apply": lambda b: (b.edit.apply(b.model), b.edit),
    "Edit.applied": reverted,
    "Edit.reverted": restored,
    "Edit.remove": lambda b: b.edit.remove("Ada Byron", b.edited),
    "Edit.add, add_concepts": lambda b: b.edit.remove("Ada Byron", b.edited).add(
        b.concepts[:1], b.edited, b.tokenizer, b.statistics
    ),
    "Edit.merge": lambda b: b.edit.remove(OTHER[0].name, b.edited).merge(b.other()),
    "Edit.save, Edit.load": lambda b: saved(b, b.edit),
    "Edit.export_lora": lambda b: (b.edit.export_lora(b.folder / "adapter", rank=1), files_of(b.folder)),
    "Edit.mismatch": lambda b: b.edit.mismatch(b.model),
    "Statistics.merge": lambda b: b.statistics.merge(b.statistics),
    "Statistics.save, Statistics.load": lambda b: saved(b, b.statistics),
    "ops.accumulate_second_moment, ops.accumulate_second_moments, ops.symmetrize": second_moments,
    "ops.accumulate_grouped_second_moment": grouped_second_moments,
    "ops.low_rank_update": updated_weights,
    "ops.solve_on_support": supported_coefficients,
    "ops.solve_update": lambda _: ops.solve_update(KEYS, RESIDUALS, METRIC, 9.0),
}
"""Every public function that computes, some together."""

MORE = {"measures and answers": measured, "attacks": attacked}

WITHOUT_ARITHMETIC = {
    *(
        "ChatSettings",
        "CollectOptions",
        "Concept",
        "EditConfig",
        "EditedModel",
        "Evaluation",
        "Guards",
        "Probe",
        "Progress",
        "Template",
    ),
    *("GuardError", "InputError", "RocrError", "VerificationError", "load", "load_concepts", "load_probes"),
    *("Edit.set_applied", "Edit.with_own_names"),
    *("Statistics.check_model", "Statistics.second_moment", "Statistics.second_moments", "Statistics.summary"),
    *("ops.available_backends", "ops.second_moment_backend"),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def public_names() -> set[str]:
    """All of rocr's, with the functions of rocr.ops, and the methods of the two classes that hold tensors."""
    found = set(rocr.__all__) - {"ops", "Edit", "Statistics"}
    for owner, members in (
        ("Edit", vars(EditRecord) | vars(Edit)),
        ("Statistics", vars(Statistics)),
        ("ops", vars(ops)),
    ):
        for name, value in members.items():
            function = value.__func__ if isinstance(value, classmethod) else value
            is_own = inspect.isfunction(function) and (owner != "ops" or function.__module__.startswith("rocr.ops."))
            if is_own and not name.startswith("_"):
                found.add(f"{owner}.{name}")
    return found


def test_every_public_function_is_tried_or_computes_nothing() -> None:
    tried = {name for names in CASES for name in names.split(", ")}
    assert public_names() == tried | WITHOUT_ARITHMETIC
    assert not tried & WITHOUT_ARITHMETIC


def plain(value: Any) -> Any:
    """A result in values that can be compared, tensors by their bytes; without durations."""
    if isinstance(value, Tensor):
        stored = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return value.dtype, tuple(value.shape), value.is_inference(), stored
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value).__name__, plain({name: each for name, each in fields.items() if name != "seconds"})
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return repr(value)


@pytest.fixture(scope="module")
def make_bench(
    make_model: Callable[..., nn.Module],
    tokenizer: Any,
    statistics: Statistics,
    concepts: list[Concept],
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Bench]:
    model = make_model("Llama")
    edited = copy.deepcopy(model)
    edit = rocr.unlearn(edited, tokenizer, concepts, statistics, CONFIG)

    def make() -> Bench:
        folder = tmp_path_factory.mktemp("bench")
        copies = copy.deepcopy((model, edited, edit))
        return Bench(*copies, tokenizer, statistics, concepts, texts, folder)

    return make


@pytest.fixture(scope="module")
def outside(make_bench: Callable[[], Bench]) -> Callable[[str], Any]:
    """Results of the cases outside of any state, and the weights after them."""
    known: dict[str, Any] = {}

    def result(name: str) -> Any:
        if name not in known:
            known[name] = run(name, make_bench())
        return known[name]

    return result


def run(name: str, bench: Bench) -> Any:
    found = (CASES | MORE)[name](bench)
    with torch.inference_mode(False):
        return plain([found, dict(bench.model.named_parameters()), dict(bench.edited.named_parameters())])


@pytest.mark.parametrize(
    ("name", "state"),
    [
        *((name, state) for name in CASES for state in STATES),
        *((name, state) for name in MORE for state in ("autocast", "inference", "meta")),
    ],
)
def test_results_are_those_of_torch_as_it_starts(
    make_bench: Callable[[], Bench], outside: Callable[[str], Any], name: str, state: str
) -> None:
    expected, bench = outside(name), make_bench()
    with STATES[state]():
        before = surroundings()
        found = run(name, bench)
        assert surroundings() == before
    assert found == expected


def test_a_model_that_was_loaded_in_inference_mode_is_edited_as_any_other(
    make_model: Callable[..., nn.Module],
    tokenizer: Any,
    make_bench: Callable[[], Bench],
    weights_of: Callable[..., Any],
) -> None:
    with torch.inference_mode():
        model = make_model("Llama")
    assert all(parameter.is_inference() for parameter in model.parameters())
    before, bench = weights_of(model), make_bench()
    edit = rocr.unlearn(model, tokenizer, bench.concepts, bench.statistics, CONFIG)
    assert plain(edit.updates) == plain(bench.edit.updates)
    after = weights_of(model)
    assert same_weights(weights_of(bench.edited), after)
    smaller = edit.remove("Ada Byron", model)
    smaller.revert(model)
    assert same_weights(weights_of(model), before)
    edit.apply(model)
    with rounded(model, [1], 4):
        assert not torch.equal(weights_of(model)[edit.updates[0].parameter], after[edit.updates[0].parameter])
    assert same_weights(weights_of(model), after)

    def stop(step: rocr.Progress) -> None:
        if step.stage == "check":
            raise KeyboardInterrupt

    edit.revert(model)
    with pytest.raises(KeyboardInterrupt):
        rocr.unlearn(model, tokenizer, bench.concepts, bench.statistics, CONFIG, stop)
    assert same_weights(weights_of(model), before)


def test_no_adapter_is_trained_on_a_model_that_was_loaded_in_inference_mode(
    make_model: Callable[..., nn.Module],
) -> None:
    pytest.importorskip("peft")
    with torch.inference_mode():
        model = make_model("Llama")
    with (
        pytest.raises(rocr.InputError, match=r"loaded inside torch.inference_mode\(\).*load it outside"),
        trained(model, [Example((5, 6), (7,))], Training("learn", 1e-3)),
    ):
        pass


def test_autocast_sees_a_weight_that_was_changed_inside_it(make_bench: Callable[[], Bench]) -> None:
    bench = make_bench()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = bench.edited(tokens).logits
    # Only weights that gradients are asked for are kept as cast.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = bench.model(tokens).logits
        bench.edit.apply(bench.model)
        second = bench.model(tokens).logits
    assert torch.equal(second, expected) and not torch.equal(first, second)


def test_a_callback_may_change_and_ask_for_what_it_likes(make_bench: Callable[[], Bench], outside: Any) -> None:
    bench, seen = make_bench(), []

    def change(_: rocr.Progress) -> None:
        seen.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.set_grad_enabled(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second_moments(bench)
        if len(seen) == 2:
            raise ValueError("of the callback")

    before = surroundings()
    with pytest.raises(ValueError, match="of the callback"):
        rocr.collect_statistics(
            bench.model, bench.tokenizer, bench.texts, [1], rocr.CollectOptions(batch_tokens=64), change
        )
    assert surroundings() == before
    assert seen[0] == torch.float32
