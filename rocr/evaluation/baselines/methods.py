"""Compare rocr with other unlearning methods on the same targets and questions, as Table I of arXiv 2506.07795 does.

As in the paper, trained methods are trained on questions of the form "qa" and evaluated in all forms. Each method is a
file or a family in one, with the interface of `rocr.evaluation.baselines.method`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from torch import nn

from rocr.concepts import folded
from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.evaluation.baselines.advnpo import ADVNPO
from rocr.evaluation.baselines.closed_form import OFFICIAL, ROCR
from rocr.evaluation.baselines.jensun import JENSUN
from rocr.evaluation.baselines.low_rank import adapted_modules
from rocr.evaluation.baselines.method import Case, Method, MethodComparison, Unlearned, check_others
from rocr.evaluation.baselines.mrp import MRP
from rocr.evaluation.baselines.peak_memory import PeakMemory
from rocr.evaluation.baselines.preference import PREFERENCE_METHODS
from rocr.evaluation.baselines.relearning import kept_share, knowledge, tuned
from rocr.evaluation.baselines.rmu import RMU
from rocr.evaluation.baselines.unchanged import IN_CONTEXT_UNLEARNING, ORIGINAL
from rocr.evaluation.baselines.unierase import UNIERASE
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.fade import Fade, FadeMeasure, FadeOptions, Observation
from rocr.evaluation.probes.probe import split_by_subject
from rocr.evaluation.scores import Evaluation
from rocr.model.architecture import find_architecture
from rocr.model.layers import chosen_layers
from rocr.progress import ProgressCallback, silent

__all__ = ["METHODS", "MethodComparison", "MethodResult", "Robustness", "compare_methods", "layers_to_edit"]

_ALL = (
    ORIGINAL,
    IN_CONTEXT_UNLEARNING,
    *PREFERENCE_METHODS,
    ADVNPO,
    JENSUN,
    RMU,
    MRP,
    UNIERASE,
    OFFICIAL,
    ROCR,
)
METHOD = {method.name: method for method in _ALL}
METHODS = tuple(METHOD)
"""The names of the methods, in the order of tables."""


@dataclass(frozen=True)
class Robustness:
    """What is measured of each method beside the scores.

    Attributes:
        fade_samples: Number of continuations of each question for FADE; 0 leaves it out.
        fade_references: Names that the unedited model is asked about for FADE, beside the redirects and the target.
        relearning_steps: Number of steps of fine-tuning on questions about others, after which the target is asked
            about again; 0 leaves it out.
    """

    fade_samples: int = 0
    fade_references: tuple[str, ...] = ()
    relearning_steps: int = 0


@dataclass(frozen=True)
class MethodResult:
    """The result of one method for one target.

    Attributes:
        method: Name of the method, from METHODS.
        target: Subject to forget; in a sequence the last one so far.
        evaluation: Scores of the target, or of all targets so far, as forget set, and of all others as retain set.
        seconds: Duration of the unlearning, without the evaluation.
        peak_bytes: Peak memory of the unlearning in bytes, the model included; see `PeakMemory`.
        fade: FADE by the name of the reference; empty if it was not measured, or the method adds a token, which the
            reference cannot write.
        reference: The reference of the method: its redirect, or for other methods that of rocr.
        relearned: Scores of the forget set after fine-tuning; None if it was not measured.
        kept: Share of the forgotten that fine-tuning leaves forgotten; see `kept_share`.
    """

    method: str
    target: str
    evaluation: Evaluation
    seconds: float
    peak_bytes: int
    fade: dict[str, Fade] = field(default_factory=dict)
    reference: str = ""
    relearned: Evaluation | None = None
    kept: float | None = None


def compare_methods(
    comparison: MethodComparison,
    targets: Sequence[str],
    methods: Sequence[str] = METHODS,
    progress: ProgressCallback = silent,
    robustness: Robustness | None = None,
) -> Iterator[MethodResult]:
    """Unlearn each target with each method, one at a time, and yield its evaluation.

    In a sequence (`comparison.sequential`), each method unlearns one target after another in the same model, and is
    asked about all targets so far after each.

    Args:
        comparison: Inputs of the methods.
        targets: Subjects to forget, one after the other.
        methods: Names of methods, from METHODS.
        progress: Function that is called as in `evaluate`, `unlearn` and `trained`.
        robustness: What is measured beside the scores; None measures nothing.

    Raises:
        InputError: If a method is unknown or cannot unlearn in a sequence, no probe is about a target, or an input of a
            method is missing or invalid.
        RocrError: If a score or a loss is not a finite number.
    """
    robustness = robustness or Robustness()
    check_methods(methods, comparison.sequential)
    check_inputs(comparison, targets, methods, robustness)
    groups = [tuple(targets[: i + 1]) for i in range(len(targets))] if comparison.sequential else []
    asked = [_Asked(comparison, group, robustness, progress) for group in groups]
    if comparison.sequential:
        for method in methods:
            yield from _in_sequence(METHOD[method], asked)
        return
    for target in targets:
        alone = _Asked(comparison, (target,), robustness, progress)
        for method in methods:
            yield from _in_sequence(METHOD[method], [alone])


def check_methods(methods: Sequence[str], sequential: bool = False) -> None:
    """Raise InputError unless all methods are known, and defined for a sequence of targets if one is wanted."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise InputError(
            f"Unknown methods: {', '.join(unknown) or 'none given'}; the methods are {', '.join(METHODS)}."
        )
    able = sequential_methods()
    unable = [method for method in methods if method not in able]
    if sequential and unable:
        raise InputError(
            f"{', '.join(unable)}: not defined for targets one after another; the methods that are: {', '.join(able)}."
        )


def check_inputs(
    comparison: MethodComparison, targets: Sequence[str], methods: Sequence[str], robustness: Robustness
) -> None:
    """Raise InputError unless methods can change the model and have what they train on, before any of them runs."""
    for name in methods:
        METHOD[name].check(comparison.model)
    others = [name for name in methods if METHOD[name].trains_on_others]
    if robustness.relearning_steps:
        adapted_modules(comparison.model)
        others.append("fine-tuning")
    if others and not comparison.retain:
        for forgotten in [targets] if comparison.sequential else [[target] for target in targets]:
            names = {folded(target) for target in forgotten}
            asked = [probe for probe in comparison.probes if folded(probe.subject) not in names]
            check_others(asked, ", ".join(others))


def sequential_methods() -> tuple[str, ...]:
    """Return the methods that unlearn targets one after another, and the unedited model."""
    return tuple(method.name for method in _ALL if method.sequential or method is ORIGINAL)


def layers_to_edit(model: nn.Module, config: EditConfig | None = None, methods: Sequence[str] = METHODS) -> list[int]:
    """Return the layers that "rocr", "official ROCR" and others of the methods edit, and need statistics of."""
    architecture = find_architecture(model)
    layers = [chosen_layers(each, architecture) for each in (config or EditConfig(), EditConfig.official())]
    extra = [METHOD[name].extra_layers for name in methods]
    layers += [tuple(each(architecture.depth)) for each in extra if each is not None]
    return sorted({layer for chosen in layers for layer in chosen})


_Answered = tuple[MethodResult, Observation | None]


class _Asked:
    """Asks unlearned models about some targets."""

    def __init__(
        self, comparison: MethodComparison, targets: tuple[str, ...], robustness: Robustness, progress: ProgressCallback
    ) -> None:
        self.comparison, self.target, self.robustness, self.progress = comparison, targets[-1], robustness, progress
        self.probes = split_by_subject(comparison.probes, targets)
        """All probes, those about the targets so far being to forget."""
        earlier = {folded(target) for target in targets[:-1]}
        own = [probe for probe in comparison.probes if folded(probe.subject) not in earlier]
        self.own = split_by_subject(own, targets[-1:])
        """The probes without those about earlier targets, those about the last target being to forget."""
        self.forget = [probe for probe in self.probes if probe.split == "forget"]
        self._before: float | None = None
        self._fade: FadeMeasure | None = None

    def case(self, model: nn.Module, earlier: object) -> Case:
        """Return the case of unlearning the last target from a model."""
        return Case(self.comparison, model, self.target, self.own, self.progress, earlier)

    def prepare(self) -> None:
        """Ask the unedited model what later measures are relative to, once for all methods."""
        comparison, robustness = self.comparison, self.robustness
        model, tokenizer = comparison.model, comparison.tokenizer
        if robustness.relearning_steps and self._before is None:
            options = EvaluateOptions(seed=comparison.seed, chat=comparison.chat)
            before = evaluate(model, tokenizer, self.forget, comparison.forms, options=options, progress=self.progress)
            self._before = knowledge(before)
        if robustness.fade_samples and self._fade is None:
            references = (comparison.redirect, comparison.official_redirect, self.target, *robustness.fade_references)
            options_of_fade = FadeOptions(robustness.fade_samples, seed=comparison.seed, chat=comparison.chat)
            own = [probe for probe in self.own if probe.split == "forget"]
            self._fade = FadeMeasure.of(model, tokenizer, own, list(dict.fromkeys(references)), options_of_fade)

    def ask(self, method: Method, case: Case, unlearned: Unlearned, seconds: float, peak: int) -> _Answered:
        """Ask an unlearned model everything that needs it."""
        comparison, robustness, model = self.comparison, self.robustness, unlearned.model
        style = method.style(case)
        options = EvaluateOptions(style=style, seed=comparison.seed, chat=comparison.chat)
        given = (model, comparison.tokenizer)
        evaluation = evaluate(*given, self.probes, comparison.forms, options=options, progress=self.progress)
        observation = None
        if self._fade is not None and not unlearned.extra_tokens:
            observation = self._fade.observe(model, style)
        relearned = kept = None
        if robustness.relearning_steps:
            steps = robustness.relearning_steps
            with tuned(model, case.retain(), steps, comparison.seed, self.progress):
                relearned = evaluate(*given, self.forget, comparison.forms, options=options, progress=self.progress)
            assert self._before is not None
            kept = kept_share(self._before, knowledge(evaluation), knowledge(relearned))
        reference = comparison.official_redirect if method is OFFICIAL else comparison.redirect
        result = MethodResult(
            method.name,
            self.target,
            evaluation,
            seconds,
            peak,
            reference=reference,
            relearned=relearned,
            kept=kept,
        )
        return result, observation

    def finish(self, answered: _Answered) -> MethodResult:
        """Add what needs the unedited model again."""
        result, observation = answered
        if observation is None or self._fade is None:
            return result
        return replace(result, fade=self._fade.finish(self.comparison.model, observation))


def _in_sequence(method: Method, asked: Sequence[_Asked]) -> Iterator[MethodResult]:
    """Unlearn the targets one after another in one model, ask after each, and yield the results in the end."""
    answered = []
    for each in asked:
        each.prepare()
    with ExitStack() as stack:
        model: nn.Module = asked[0].comparison.model
        state: object = None
        for each in asked:
            case = each.case(model, state)
            memory, start = PeakMemory(model), time.perf_counter()
            unlearned = stack.enter_context(method.unlearned(case))
            seconds, peak = time.perf_counter() - start, memory.bytes()
            model, state = unlearned.model, unlearned.state
            answered.append(each.ask(method, case, unlearned, seconds, peak))
    for each, found in zip(asked, answered, strict=True):
        yield each.finish(found)
