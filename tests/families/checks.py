"""Edit a tiny model, and check what came of it without trusting rocr's own report.

A result is "ok", "wrong" (an edit was made, and a check fails), "refused" (rocr.RocrError), "traceback" (any other
exception) or "unbuilt" (there is no tiny model).
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rocr
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.block import Block
from rocr.model.blocks import layer_blocks
from rocr.model.causality import with_kind
from tests.families.errors import last_line, where
from tests.families.kinds import kind_of
from tests.families.subject import (
    NAMES,
    QUESTION,
    REDIRECTS,
    SHARED_CONTEXT,
    Subject,
    editable_layers,
    experts_of,
    parameters_of,
    same_weights,
    weights_of,
)
from tests.families.tiny_models import Family, build, ordinary_texts

TOWERS = re.compile(r"vision|visual|audio|image|perceiver|qformer|speech|vqmodel|patcher|router|\bgate\.weight")
"""In names of parameters that no edit may change."""
NOT_REACHED = "The edit does not reach the states"
STEP = 0.3
"""The share of the way that the edit of one layer is asked for."""
GAIN = (0.4, 1.6)
"""Bounds of the share of the way that a nearly complete edit moves a layer's output. It is 1 to first order; in a tiny
model with a norm behind the MLP it is less, since the norm removes the radial part."""
SCALE = 100.0
"""A larger down-projection changes nothing where a norm follows it, so the gain must stay."""
MAX_SCALED_CHANGE = 3.0
LOOK_AHEAD = 1e-4


class CheckFailed(Exception):
    """A check that fails."""


class NotTested(Exception):
    """A check that does not apply, such as one of an adapter that peft cannot load."""


def require(condition: bool, message: str) -> None:
    """Raise CheckFailed with a message unless a condition holds."""
    if not condition:
        raise CheckFailed(message)


@dataclass
class Result:
    """What came of one family.

    Attributes:
        key: Its name among all families.
        class_name: The class.
        status: As the module's docstring says.
        kind: As `kind_of` says; empty without a model.
        part: What was edited: "" for the default layers, "encoder", or the numbers of other layers.
        message: The sentence that refuses it, the exception, or the failed checks.
        measures: Numbers that were measured.
        untested: Checks that do not apply, and why.
    """

    key: str
    class_name: str
    status: str = "unbuilt"
    kind: str = ""
    part: str = ""
    message: str = ""
    measures: dict[str, Any] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(family: Family, built: Callable[[], None] = lambda: None, without: Sequence[str] = ()) -> Result:
    """Build, edit and check a family; `built` is called when there is a model, and `without` names checks to leave out.

    A check that is left out counts as one that does not apply.
    """
    result = Result(family.key, family.class_name)
    try:
        model = build(family)
    except Exception as error:
        result.message = last_line(error)
        return result
    built()
    result.kind = kind_of(model)
    is_encoder = family.settings.get("is_decoder") is False
    _attempt(result, Subject(model, is_encoder), None, without)
    if result.status == "refused":
        _attempt_other_layers(result, model, is_encoder, without)
    return result


def _attempt_other_layers(result: Result, model: nn.Module, is_encoder: bool, without: Sequence[str]) -> None:
    """Edit other layers than the default ones, if some can be edited; what fails there is never accepted."""
    layers = editable_layers(model)
    if not layers:
        return
    other = Result(result.key, result.class_name, kind=result.kind, part=", ".join(map(str, layers)))
    _attempt(other, Subject(model, is_encoder), layers, without)
    if other.status in ("wrong", "traceback"):
        result.__dict__.update(other.__dict__)
    elif other.status == "ok":
        result.part, result.measures, result.untested = other.part, other.measures, other.untested


def _attempt(result: Result, subject: Subject, layers: Sequence[int] | None, without: Sequence[str]) -> None:
    """Collect statistics and edit with rocr, then check the edit."""
    first = weights_of(subject.model)
    before = subject.all_outputs()
    try:
        statistics = rocr.collect_statistics(subject.model, subject.tokenizer, ordinary_texts(), layers=layers)
        made = Made(subject, statistics, first, before, layers)
    except rocr.RocrError as error:
        result.status, result.message = "refused", str(error)
    except Exception as error:
        result.status, result.message = "traceback", f"{last_line(error)} [{where(error)}]"
    else:
        failed = made.failed_checks(without)
        stopped = [limit for limit in made.edit.report.limits_passed if limit.startswith(NOT_REACHED)]
        if "nearer" in failed and stopped and failed.keys() <= {"nearer", "gain", "gain_of_larger_weights"}:
            # Without `force`, a guard refuses the edit.
            result.status, result.message = "refused", stopped[0]
            return
        result.status, result.measures, result.untested = "wrong" if failed else "ok", made.measures, made.untested
        result.message = "; ".join(f"{name}: {message}" for name, message in failed.items())
        return
    if not same_weights(first, weights_of(subject.model)):
        result.status, result.message = "wrong", f"the weights are not the first ones after: {result.message}"


class Made:
    """An edit that rocr made, and the checks of it.

    The checks run in the order of `CHECKS`; the model has the edit first and its first weights from `reverts` on.
    """

    def __init__(
        self,
        subject: Subject,
        statistics: rocr.Statistics,
        first: dict[str, Tensor],
        before: list[Tensor] | None,
        layers: Sequence[int] | None,
    ) -> None:
        self.subject, self.model, self.statistics = subject, subject.model, statistics
        self.first, self.before = first, before
        self.measures: dict[str, Any] = {}
        self.untested: dict[str, str] = {}
        config = rocr.EditConfig(layers=tuple(layers)) if layers else None
        concepts = [rocr.Concept(name, REDIRECTS[i % 2]) for i, name in enumerate(NAMES)]
        self.edit = self._unlearn(concepts, config)
        self.architecture: Architecture = find_architecture(self.model)
        self.layer, self.last = self.edit.updates[0].layer, self.edit.updates[-1].layer
        self.edited = weights_of(self.model)
        self.after = subject.all_outputs()

    def _unlearn(self, concepts: list[rocr.Concept], config: rocr.EditConfig | None) -> rocr.Edit:
        guards = rocr.Guards(force=True)
        return rocr.unlearn(self.model, self.subject.tokenizer, concepts, self.statistics, config, guards=guards)

    def failed_checks(self, without: Sequence[str] = ()) -> dict[str, str]:
        """Run all checks but those in `without`; return the messages of those that fail."""
        failed = {}
        self.measures["layers"] = [update.layer for update in self.edit.updates]
        self.untested.update(dict.fromkeys(without, "left out"))
        for name in [name for name in CHECKS if name not in without]:
            try:
                getattr(self, name)()
            except CheckFailed as error:
                failed[name] = str(error)
            except NotTested as error:
                self.untested[name] = str(error)
            except Exception as error:
                failed[name] = f"{last_line(error)} [{where(error)}]"
        return failed

    def only_edited_blocks(self) -> None:
        """The changed parameters are those of the updates; other experts in them keep their bytes."""
        changed = {name for name, value in self.edited.items() if not torch.equal(value, self.first[name])}
        edited = {name for update in self.edit.updates for name in parameters_of(update)}
        require(changed == edited, f"changed and edited differ by {sorted(changed ^ edited)[:4]}")
        outside = [name for name in changed if TOWERS.search(name)]
        require(not outside, f"edited {', '.join(outside[:3])}")
        for update in self.edit.updates:
            for name, experts in experts_of(update).items():
                total = next(part.experts for part in update.parts if part.parameter == name)
                for expert in set(range(total)) - experts:
                    one, other = (weights[name].reshape(total, -1)[expert] for weights in (self.edited, self.first))
                    require(torch.equal(one, other), f"expert {expert} of {name} is changed but not in the edit")

    def _require_text(self) -> None:
        if self.before is None:
            raise NotTested("the model does not run on text alone")

    def outputs_moved(self) -> None:
        if self.before is None or self.after is None:
            raise NotTested("the model does not run on text alone")
        moved = max(float((a - b).abs().max()) for a, b in zip(self.after, self.before, strict=True))
        require(moved > 1e-6, f"the outputs moved by {moved:.1g}")

    def nearer(self) -> None:
        """An edit in one context moves the states there nearer to those of the redirects, over all names."""
        self._require_text()
        redirects = [REDIRECTS[i % 2] for i in range(len(NAMES))]
        self.edit.revert(self.model)
        starts, goals = self._last_states(NAMES), self._last_states(redirects)
        # Random weights read a name otherwise in each context, so that an edit for the mean of many shows in none.
        concepts = [rocr.Concept(*pair) for pair in zip(NAMES, redirects, strict=True)]
        layers = tuple(update.layer for update in self.edit.updates)
        edit = self._unlearn(concepts, rocr.EditConfig(layers=layers, templates=(rocr.Template(SHARED_CONTEXT),)))
        ends = self._last_states(NAMES)
        edit.revert(self.model)
        self.edit.apply(self.model)
        left = sum(float((goal - end).norm()) for goal, end in zip(goals, ends, strict=True))
        first = sum(float((goal - start).norm()) for goal, start in zip(goals, starts, strict=True))
        self.measures["left"] = round(left / first, 3)
        require(self.measures["left"] < 1, f"{self.measures['left']} of the distance is left")

    def _last_states(self, names: Sequence[str]) -> list[Tensor]:
        return [self.subject.state(self.last, name, SHARED_CONTEXT) for name in names]

    def saves(self) -> None:
        """The edit from its file reverts and applies bit for bit."""
        with tempfile.TemporaryDirectory() as folder:
            self.edit.save(Path(folder) / "edit.safetensors")
            loaded = rocr.Edit.load(Path(folder) / "edit.safetensors")
        loaded.revert(self.model)
        require(same_weights(self.first, weights_of(self.model)), "the loaded edit does not restore the weights")
        loaded.apply(self.model)
        require(same_weights(self.edited, weights_of(self.model)), "the loaded edit makes other weights")

    def reverts(self) -> None:
        self.edit.revert(self.model)
        require(same_weights(self.first, weights_of(self.model)), "the weights are not the first ones")

    def adapter(self) -> None:
        """The model with the exported adapter has the outputs of the edited one."""
        import peft

        self._require_text()
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.edit.export_lora(Path(folder) / "adapter")
            except rocr.RocrError as error:
                raise NotTested(str(error)) from error
            adapted = copy.deepcopy(self.model)
            try:
                adapted = peft.PeftModel.from_pretrained(adapted, Path(folder) / "adapter").eval()
            except Exception as error:
                raise self._peft_failure(error) from error
        outputs = self.subject.all_outputs(adapted)
        require(outputs is not None, "the model does not run with the adapter")
        assert outputs is not None
        pairs = zip(outputs, self.after, strict=True)
        apart = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
        self.measures["adapter"] = float(f"{apart:.1g}")
        require(apart < self.subject.tolerance, f"the outputs with the adapter differ by {apart:.1g}")

    def _peft_failure(self, error: Exception) -> Exception:
        """NotTested if peft cannot make an adapter of its own for these modules either."""
        import peft

        names = {name: name in experts_of(update) for update in self.edit.updates for name in parameters_of(update)}
        modules = sorted(name.rpartition(".")[0] for name, is_fused in names.items() if not is_fused)
        config = peft.LoraConfig(
            target_modules=modules, target_parameters=sorted(n for n, fused in names.items() if fused)
        )
        try:
            peft.get_peft_model(copy.deepcopy(self.model), config)
        except Exception as own:
            return NotTested(f"peft: {last_line(own)}")
        return CheckFailed(f"peft does not load the adapter: {last_line(error)}")

    def left_to_right(self) -> None:
        """The last token does not change the outputs before it."""
        reads_both_ways = with_kind(self.architecture, self.layer).kind.bidirectional
        if reads_both_ways or self.subject.is_encoder or self.before is None:
            raise NotTested("an encoder, or a model that does not run on text alone")
        tokens = self.subject.tokens("Who is Ada Byron? The winter in the north")
        other = tokens.clone()
        other[0, -1] = 300
        one, two = (self.subject.outputs(each)[:-1] for each in (tokens, other))
        apart = float((one - two).abs().max() / one.abs().max())
        require(apart < max(LOOK_AHEAD, 0.1 * self.subject.tolerance), f"later tokens change outputs by {apart:.1g}")

    def same_in_batches(self) -> None:
        """Padding, and a context that prompts share, change no key."""
        config = self._single(self.layer, template=SHARED_CONTEXT)
        pairs = [rocr.Concept(name, REDIRECTS[0]) for name in (NAMES[0], NAMES[-1], NAMES[3])]
        together = self._keys(pairs, config)
        for row, concept in enumerate(pairs):
            alone = self._keys([concept], config)
            for block in set(together) | set(alone):
                width = (alone if block in alone else together)[block].shape[1]
                one = together[block][row] if block in together else torch.zeros(width)
                other = alone[block][0] if block in alone else torch.zeros(width)
                apart = float((one - other).norm() / max(one.norm(), other.norm(), torch.tensor(1e-6)))
                require(apart < self.subject.tolerance, f"the keys of {concept.name} differ by {apart:.1g}")

    def _keys(self, concepts: list[rocr.Concept], config: rocr.EditConfig) -> dict[int, Tensor]:
        """The keys of an edit by block, (concepts, d_in) each; the edit is reverted."""
        edit = self._unlearn(concepts, config)
        edit.revert(self.model)
        update = edit.updates[0]
        if not update.parts:
            return {0: update.keys}
        return {part.block: update.keys[:, place] for part, place in zip(update.parts, update.columns, strict=True)}

    def _single(self, layer: int, template: str = QUESTION) -> rocr.EditConfig:
        """Settings of an edit of one layer that reaches its target: hardly any ridge, few protected keys."""
        return rocr.EditConfig(
            layers=(layer,),
            templates=(rocr.Template(template),),
            key_tokens="last",
            token_schedule="full",
            template_weight=0.0,
            ridge=1e-6,
            gamma=1e-3,
            strength=STEP,
        )

    def gain(self) -> None:
        """A nearly complete edit of one layer moves its output by the step that was asked for.

        The step is a part of the way, since an update is exact to first order where a norm follows the block.
        """
        self._require_text()
        gain = self._gain()
        self.measures["gain"] = round(gain, 3)
        require(GAIN[0] <= gain <= GAIN[1], f"the state moves {gain:.2f} of the way")

    def gain_of_larger_weights(self) -> None:
        self._require_text()
        blocks: Sequence[Block] = layer_blocks(self.architecture, self.layer).blocks
        kept = {block.parameter_name: block.parameter.data.clone() for block in blocks}
        parameters = {block.parameter_name: block.parameter for block in blocks}
        for parameter in parameters.values():
            parameter.data.mul_(SCALE)
        try:
            gain = self._gain()
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(kept[name])
        self.measures["gain_of_larger_weights"] = round(gain, 3)
        ratio = gain / self.measures["gain"]
        message = f"the state moves {gain:.2f} of the way where the weight is {SCALE:g} times as large"
        require(1 / MAX_SCALED_CHANGE <= ratio <= MAX_SCALED_CHANGE, message)

    def _gain(self) -> float:
        goal, start = (self.subject.state(self.layer, name) for name in (REDIRECTS[0], NAMES[0]))
        edit = self._unlearn([rocr.Concept(NAMES[0], REDIRECTS[0])], self._single(self.layer))
        try:
            end = self.subject.state(self.layer, NAMES[0])
        finally:
            edit.revert(self.model)
        way = goal - start
        return float((end - start) @ way / (way @ way)) / STEP

    def reverts_again(self) -> None:
        require(same_weights(self.first, weights_of(self.model)), "a later edit was not reverted bit for bit")


CHECKS = (
    "only_edited_blocks",
    "outputs_moved",
    "nearer",
    "saves",
    "reverts",
    "adapter",
    "left_to_right",
    "same_in_batches",
    "gain",
    "gain_of_larger_weights",
    "reverts_again",
)
