"""FADE: how alike two models answer, by the probabilities that each gives to what the other one writes.

For a question x to the unlearned model p and a question r to the reference q,

    FADE = E_{y~p(·|x)}[log p(y|x) − log q(y|r)] + E_{y~q(·|r)}[log q(y|r) − log p(y|x)]

is the sum of both KL divergences, estimated by sampled continuations y (Cho et al., arXiv 2510.12981). 0 is the best.
Their normalisation is not public: here each expectation is the sum over the samples of a question divided by the number
of their tokens, in nats per token, averaged over questions. As the number of samples grows, it tends to the divergence
divided by the mean length of a continuation. Continuations end at an end token or after `FadeOptions.tokens` tokens.

The authors' reference is a model that was never trained on the target. For a redirection, the reference is the unedited
model that is asked the same question about the redirect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import holds_name
from rocr.errors import InputError, RocrError
from rocr.evaluation.forms import PromptStyle, build_items, item_texts
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.redirects import replace_subject
from rocr.evaluation.sampling import Sample, sample_continuations
from rocr.evaluation.scores import mean
from rocr.keys.continuations import log_probabilities
from rocr.model.tokenizer import tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic


@dataclass(frozen=True)
class FadeOptions:
    """Settings of FADE.

    Attributes:
        samples: Continuations of each question, from each model.
        tokens: Largest number of tokens of a continuation.
        seed: Seed of the samples.
        chat: Settings of the chat template.
    """

    samples: int = 8
    tokens: int = 16
    seed: int = 0
    chat: ChatSettings = DEFAULT


@dataclass(frozen=True)
class Fade:
    """FADE of a model, in nats per token.

    Attributes:
        value: The estimate from all samples.
        error: Its standard error over samples, by the jackknife; None with one sample.
        by_samples: The estimate from the first 1, 2, 4, ... samples of each question.
        questions: Number of questions.
    """

    value: float
    error: float | None
    by_samples: dict[int, float]
    questions: int


@dataclass(frozen=True)
class Reference:
    """What the unedited model writes about a name.

    Attributes:
        name: The name in the place of the target's; that of the target itself for the same questions.
        prompts: Token ids of each question.
        samples: The continuations of each question.
    """

    name: str
    prompts: list[list[int]]
    samples: list[list[Sample]]


@dataclass(frozen=True)
class Observation:
    """What an unlearned model writes, and how likely it finds what the references wrote.

    Attributes:
        samples: The continuations of each question about the target.
        likelihoods: For each reference the log-probabilities of its samples, by question.
    """

    samples: list[list[Sample]]
    likelihoods: list[list[list[float]]]


@dataclass
class FadeMeasure:
    """FADE of unlearned models about one target, with several references.

    The order is `of` and `finish` on the unedited model, `observe` on an unlearned one.
    """

    tokenizer: Any
    probes: Sequence[Probe]
    options: FadeOptions
    references: list[Reference] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        probes: Sequence[Probe],
        names: Sequence[str],
        options: FadeOptions | None = None,
    ) -> FadeMeasure:
        """Sample what the unedited model answers to questions about names in place of the target's.

        Args:
            model: The unedited causal language model.
            tokenizer: Its tokenizer.
            probes: Questions about the target; those of the form "qa" that hold its name are asked.
            names: The names.
            options: Settings; None uses the defaults.

        Raises:
            InputError: No question holds the name, or the model fails.
        """
        options = options or FadeOptions()
        if options.samples < 1 or options.tokens < 1:
            raise InputError(
                f"FADE needs at least 1 sample and 1 token, not {options.samples} samples of {options.tokens} tokens."
            )
        asked = [probe for probe in probes if probe.form == "qa" and holds_name(probe.query, probe.subject)]
        if not asked:
            raise InputError(
                "FADE asks questions of the form qa that hold the target's name, and there are none: give such probes, "
                "or leave FADE out."
            )
        measure = cls(tokenizer, asked, options)
        for name in names:
            named = [replace_subject(probe, name) for probe in asked]
            prompts = measure.prompts(named, PromptStyle.of(model))
            measure.references.append(Reference(name, prompts, measure._sampled(model, prompts)))
        return measure

    def prompts(self, probes: Sequence[Probe], style: PromptStyle) -> list[list[int]]:
        """Return the token ids of questions."""
        items = build_items(probes, ["qa"], style)
        return [tokenize_prompt(self.tokenizer, text) for text in item_texts(self.tokenizer, items, self.options.chat)]

    @plain_arithmetic()
    def observe(self, model: nn.Module, style: PromptStyle) -> Observation:
        """Sample answers of an unlearned model, and score those of the references by it.

        Args:
            model: The unlearned model.
            style: Details of the prompts, which for in-context unlearning hold the instruction.
        """
        prompts = self.prompts(self.probes, style)
        likelihoods = [likelihood(model, prompts, reference.samples) for reference in self.references]
        return Observation(self._sampled(model, prompts), likelihoods)

    @plain_arithmetic()
    def finish(self, model: nn.Module, observation: Observation) -> dict[str, Fade]:
        """Return FADE by the reference's name.

        Args:
            model: The unedited model.
            observation: Of the unlearned model.

        Raises:
            RocrError: A log-probability is not a finite number.
        """
        found = {}
        for reference, scored in zip(self.references, observation.likelihoods, strict=True):
            opposite = likelihood(model, reference.prompts, observation.samples)
            ways = [_differences(observation.samples, opposite), _differences(reference.samples, scored)]
            found[reference.name] = fade_of(ways)
        return found

    def _sampled(self, model: nn.Module, prompts: Sequence[list[int]]) -> list[list[Sample]]:
        options, ends = self.options, end_tokens(model, self.tokenizer)
        return [
            sample_continuations(model, prompt, options.samples, options.tokens, ends, options.seed + i)
            for i, prompt in enumerate(prompts)
        ]


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, of the model's generation settings and of the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = [*(found if isinstance(found, list) else [found]), getattr(tokenizer, "eos_token_id", None)]
    return {token for token in tokens if isinstance(token, int) and not isinstance(token, bool)}


def likelihood(
    model: nn.Module, prompts: Sequence[Sequence[int]], samples: Sequence[Sequence[Sample]]
) -> list[list[float]]:
    """Return the log-probabilities of the samples of each question after other prompts, in nats."""
    pairs = [(prompt, sample.tokens) for prompt, given in zip(prompts, samples, strict=True) for sample in given]
    found = [0.0] * len(pairs)

    def receive(index: int, values: torch.Tensor) -> None:
        wanted = torch.tensor(pairs[index][1], device=values.device)
        found[index] = float(values.double().gather(1, wanted[:, None]).sum())

    log_probabilities(model, [p for p, _ in pairs], [tokens for _, tokens in pairs], receive=receive)
    rest = iter(found)
    return [[next(rest) for _ in given] for given in samples]


Differences = list[list[tuple[float, int]]]
"""For each question, the difference of log-probabilities and the number of tokens of each sample."""


def _differences(samples: Sequence[Sequence[Sample]], other: Sequence[Sequence[float]]) -> Differences:
    return [
        [(sample.log_probability - value, len(sample.tokens)) for sample, value in zip(given, values, strict=True)]
        for given, values in zip(samples, other, strict=True)
    ]


def fade_of(ways: Sequence[Differences]) -> Fade:
    """Return FADE from the differences of both directions.

    Raises:
        RocrError: A difference is not a finite number.
    """
    if not all(math.isfinite(value) for way in ways for question in way for value, _ in question):
        raise RocrError(
            "FADE is not a finite number: a model gives the probability 0 to what the other one writes, or its logits "
            "are not finite."
        )
    count = len(ways[0][0])

    def estimate(chosen: Sequence[int]) -> float:
        return sum(mean(_ratio([question[i] for i in chosen]) for question in way) for way in ways)

    steps = [1]
    while steps[-1] * 2 < count:
        steps.append(steps[-1] * 2)
    by_samples = {step: estimate(range(step)) for step in sorted({*steps, count})}
    error = None
    if count > 1:
        without = [estimate([i for i in range(count) if i != left]) for left in range(count)]
        center = mean(without)
        error = math.sqrt((count - 1) / count * sum((value - center) ** 2 for value in without))
    return Fade(by_samples[count], error, by_samples, len(ways[0]))


def _ratio(question: Sequence[tuple[float, int]]) -> float:
    return sum(value for value, _ in question) / sum(tokens for _, tokens in question)
