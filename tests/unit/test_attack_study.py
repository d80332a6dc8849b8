"""The attacks as a whole: their outcomes and controls, and that a model is the same after each, also after a stop."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rocr
from rocr.evaluation import EvaluateOptions, Probe, Wording, evaluate
from rocr.evaluation.attacks.attack import AttackLimits, invented
from rocr.evaluation.attacks.components import without_components
from rocr.evaluation.attacks.prompts import context_prefixes
from rocr.evaluation.attacks.study import STUDY, Studied, study
from rocr.evaluation.attacks.suffix import _end_of_message
from rocr.evaluation.attacks.suite import ATTACKS
from rocr.evaluation.forms import Item, PromptStyle
from rocr.evaluation.report import STUDY_COLUMNS, study_rows
from rocr.evaluation.sampling import Sample, sample_continuations
from rocr.model.architecture import find_architecture
from rocr.model.blocks import find_blocks
from tests.support.models import same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
WRONG = ("Rome", "a key", "rain")
SPANISH = {"translated": Wording("¿Qué escribió Ada Byron?", "programas")}
PROBES = [
    Probe("Ada Byron", "What did Ada Byron write?", "programs", WRONG, wordings=SPANISH),
    Probe("Ada Byron", "Where was Ada Byron born?", "London", WRONG),
    Probe("Robert Downey Jr.", "What does Robert Downey Jr. do?", "acts", WRONG),
    Probe("Robert Downey Jr.", "Who is Robert Downey Jr.?", "a countess", WRONG),
    *(
        Probe("Blaise Pascal", f"What did Blaise Pascal do on day {i}?", "rest", WRONG, split="retain")
        for i in range(8)
    ),
]
FORMS = ("qa",)
FORGET = [probe for probe in PROBES if probe.split == "forget"]
SMALL = AttackLimits(
    components=(1, 3),
    prefilled=(1,),
    samples=3,
    sample_tokens=3,
    questions=2,
    mask_steps=2,
    tuning_steps=(1, 2),
    tuning_rate=1e-3,
    soft_tokens=2,
    soft_steps=2,
    suffix_tokens=2,
    suffix_steps=1,
    suffix_candidates=3,
)


@dataclass
class Edited:
    """A tiny model with an edit."""

    model: nn.Module
    tokenizer: Any
    edit: rocr.Edit

    def study(self, *names: str, limits: AttackLimits = SMALL, **more: Any) -> list[Studied]:
        return study(self.model, self.tokenizer, PROBES, self.edit, names, FORMS, limits=limits, **more)

    def scores(self, probes: Any = FORGET, **style: Any) -> dict[str, float]:
        options = EvaluateOptions(style=PromptStyle(subtoken_example=False, **style))
        probes = [replace(probe, split="forget") for probe in probes]
        found = evaluate(self.model, self.tokenizer, probes, FORMS, options=options)
        return {form: found.form_score(form, "forget").score for form in found.forms}


@pytest.fixture(scope="module")
def _edited(_llama: nn.Module, tokenizer: Any, statistics: rocr.Statistics, concepts: Any) -> Edited:
    model = copy.deepcopy(_llama)
    edit = rocr.unlearn(model, tokenizer, concepts, statistics, guards=rocr.Guards(force=True), retain=[])
    return Edited(model, tokenizer, edit)


@pytest.fixture
def edited(_edited: Edited) -> Edited:
    return replace(_edited, model=copy.deepcopy(_edited.model))


def state(model: nn.Module, weights_of: Any) -> tuple[dict[str, Tensor], list[Any]]:
    return weights_of(model), [(p.requires_grad, p.grad is None) for p in model.parameters()]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough) if n in ATTACKS[1:] else n for n in STUDY]
)
def test_an_attack_has_outcomes_and_leaves_the_model_alone(name: str, edited: Edited, weights_of: Any) -> None:
    if name == "relearn":
        pytest.importorskip("peft")
    weights, flags = state(edited.model, weights_of)
    seen: list[Studied] = []
    (found,) = edited.study(name, receive=seen.append)
    assert seen == [found] and found.refused is None and found.outcomes and found.seconds > 0
    assert all(STUDY[name].__dict__[told] for told in ("summary", "cost", "control"))
    for outcome in found.outcomes:
        assert outcome.unedited or outcome.never or name == "depth", "every attack has a control"
        assert outcome.questions > 0
        assert all(math.isfinite(score) for score in outcome.attacked.values())
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["outcomes"]
    assert all(len(row) == len(STUDY_COLUMNS) for row in study_rows([found.to_json()]))
    after = state(edited.model, weights_of)
    assert same_weights(weights, after[0]) and flags == after[1]


def stops_anywhere(edited: Edited, name: str, shares: tuple[float, ...], weights_of: Any) -> None:
    """Interrupt an attack at shares of its steps; the model must be as before each time."""
    weights, flags = state(edited.model, weights_of)
    steps: list[rocr.Progress] = []
    edited.study(name, progress=steps.append)
    for share in shares:
        left = iter(range(int(share * len(steps))))

        def stop(_: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            edited.study(name, progress=stop)
        stopped = state(edited.model, weights_of)
        assert same_weights(weights, stopped[0]) and flags == stopped[1]


@pytest.mark.parametrize(("name", "share"), [("bottom-rank", 0.5), ("mask", 0.4), ("edited-layers", 0.9)])
def test_an_interrupted_attack_leaves_the_model_alone(name: str, share: float, edited: Edited, weights_of: Any) -> None:
    stops_anywhere(edited, name, (share,), weights_of)


@pytest.mark.thorough
@pytest.mark.parametrize("name", STUDY)
def test_an_attack_can_be_interrupted_at_many_places(name: str, edited: Edited, weights_of: Any) -> None:
    if name == "relearn":
        pytest.importorskip("peft")
    stops_anywhere(edited, name, (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99), weights_of)


def test_removed_components_are_asked_and_compared_to_the_unedited_model(edited: Edited) -> None:
    first, third = edited.study("bottom-rank")[0].outcomes
    blocks = [layer.only for layer in find_blocks(find_architecture(edited.model), edited.edit.layers).values()]
    assert (first.name, third.name) == ("bottom-rank, 1 component", "bottom-rank, 3 components")
    assert first.after == edited.scores() and first.questions == 4
    with without_components(blocks, 3):
        assert third.attacked == edited.scores()
    edited.edit.revert(edited.model)
    assert third.before == edited.scores()
    with without_components(blocks, 3):
        assert third.unedited == edited.scores() != third.attacked


def test_a_context_is_put_before_known_and_invented_names(edited: Edited) -> None:
    found = {outcome.setting: outcome for outcome in edited.study("context")[0].outcomes}
    others = PROBES[4:]
    for probes, scores in ((FORGET, "attacked"), (invented(FORGET), "never")):
        for kind, prefix in context_prefixes(probes, others, 3, 8).items():
            assert getattr(found[kind], scores) == edited.scores(probes, prefix=prefix)
    assert found["repetition"].never_plain == edited.scores(invented(FORGET))


def test_the_rest_of_an_answer_is_scored_after_its_beginning(edited: Edited) -> None:
    (found,) = edited.study("prefill")[0].outcomes
    values: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    for probe in FORGET:
        message = f"Please briefly answer the following question.\nQuestion: {probe.query}\n"
        chat = [{"role": "user", "content": message}]
        text = edited.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + "Answer:"
        prompt, answer = (
            edited.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, f" {probe.answer}")
        )
        if len(answer) < 2:
            continue
        with torch.no_grad():
            rows = edited.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(dim=-1)
        each = rows[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        values.setdefault(probe.subject, []).append(float(each[1:].mean().exp()))
        plain.setdefault(probe.subject, []).append(float(each.mean().exp()))
    for scores, wanted in ((found.attacked, values), (found.after, plain)):
        mean = sum(sum(each) / len(each) for each in wanted.values()) / len(wanted)
        assert scores["qa"] == pytest.approx(mean, rel=1e-4)
    assert found.questions == sum(map(len, values.values())) > 1


def test_a_wording_is_expected_to_keep_the_share_that_the_question_keeps(edited: Edited) -> None:
    found = edited.study("languages")[0].outcomes
    assert [outcome.setting for outcome in found] == ["translated"], "only what the probes have"
    kept = edited.scores(PROBES[:1])["qa"]
    edited.edit.revert(edited.model)
    known = edited.scores(PROBES[:1])["qa"]
    (outcome,) = found
    assert outcome.after["translated"] == pytest.approx(outcome.before["translated"] * min(1, kept / known))


def test_the_depth_of_an_edit_that_changes_nothing_is_none(edited: Edited) -> None:
    weights = edited.edit.updates
    edited.edit.revert(edited.model)
    original = [p.detach().clone() for p in edited.model.parameters()]
    edited.edit.apply(edited.model)
    (found,) = edited.study("depth")[0].outcomes
    assert 0 <= found.attacked["qa"] <= 1 and len(found.details["never by layer"]) == 5 and weights
    assert found.details["edited by layer"][: min(edited.edit.layers)] == [0.0] * min(edited.edit.layers)
    edited.edit.revert(edited.model)
    assert all(torch.equal(a, b) for a, b in zip(original, edited.model.parameters(), strict=True))


def test_gradients_are_computed_wherever_the_call_is_made(edited: Edited) -> None:
    def scores() -> list[Any]:
        return [o.attacked for each in edited.study("mask", "soft-tokens") for o in each.outcomes]

    with torch.inference_mode():
        inside = scores()
    assert inside == scores()


def test_a_suffix_stands_at_the_end_of_the_message() -> None:
    item = Item(0, "qa", "What is rain?\n", (" water",))
    assert _end_of_message("<|user|>What is rain?<|end|>Answer:", item) == len("<|user|>What is rain?")
    assert _end_of_message("<|user|>WHAT IS RAIN?<|end|>Answer:", item) == len("<|user|>WHAT IS RAIN?<|end|>")


def test_what_cannot_be_attacked_is_said(edited: Edited, model: nn.Module) -> None:
    with pytest.raises(rocr.InputError, match="Unknown attacks: magic"):
        edited.study("magic")
    with pytest.raises(rocr.InputError, match="no probes to forget"):
        study(edited.model, edited.tokenizer, PROBES[4:], edited.edit)
    given = (edited.model, edited.tokenizer, PROBES[:2], edited.edit)
    refused = {each.name: each.refused for each in study(*given, ["mask", "benign", "linear-probe"], ("qa",))}
    assert "two concepts of the edit, not 1" in str(refused["mask"])
    assert "about others" in str(refused["benign"]) and "not 2 and 0" in str(refused["linear-probe"])
    edited.edit.revert(edited.model)
    with pytest.raises(rocr.VerificationError):
        edited.study("bottom-rank")


def changes() -> Iterator[tuple[str, str, Any]]:
    """For each field of the limits, an attack that it changes, and another value."""
    values = {
        "components": ("bottom-rank", (2,)),
        "repetitions": ("context", 2),
        "shown": ("context", 1),
        "prefilled": ("prefill", (2,)),
        "samples": ("samples", 9),
        "sample_tokens": ("samples", 12),
        "questions": ("depth", 1),
        "mask_steps": ("mask", 14),
        "tuning_steps": ("retrain", (3,)),
        "tuning_rate": ("edited-layers", 1e-2),
        "soft_tokens": ("soft-tokens", 3),
        "soft_steps": ("soft-tokens", 3),
        "suffix_tokens": ("suffix", 3),
        "suffix_steps": ("suffix", 4),
        "suffix_candidates": ("suffix", 60),
        "seed": ("suffix", 1),
        "evaluate": ("context", EvaluateOptions(style=PromptStyle(direct=True))),
    }
    assert list(values) == [field.name for field in fields(AttackLimits)]
    yield from ((name, *change) for name, change in values.items())


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "attack", "value"), [*changes()])
def test_a_limit_has_an_effect(
    name: str, attack: str, value: Any, edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, ...]] = []

    def watched(*given: Any) -> list[Sample]:
        found = sample_continuations(*given[:4], set(), given[5])
        drawn.append((len(found), len(found[0].tokens)))
        return sample_continuations(*given)

    # A model this small draws no right answers, so that the draws are counted.
    monkeypatch.setattr("rocr.evaluation.attacks.samples.sample_continuations", watched)
    found = []
    for limits in (SMALL, replace(SMALL, **{name: value})):
        outcomes = edited.study(attack, limits=limits)[0].outcomes
        found.append(([(o.attacked, o.questions) for o in outcomes], drawn.copy()))
        drawn.clear()
    assert found[0] != found[1]
