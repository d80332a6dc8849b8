"""Train LoRA adapters on questions, for the unlearning methods that rocr is compared to and for relearning attacks.

The settings are those of ORT's authors (arXiv 2506.07795) for Llama-3: LoRA on q_proj and v_proj, 5 epochs, a cosine
schedule with a warm-up of 20 steps, seed 42. Training needs the package peft.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.errors import InputError, RocrError
from rocr.evaluation.forms import PromptStyle, build_items, item_texts
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scoring import check_vocabulary, tokenize_questions
from rocr.io.boundary import calling
from rocr.model.forward import forward, logits_of
from rocr.model.hub import offline
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

Loss = Literal["learn", "ascent", "npo", "dpo"]


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and answer to train on.

    Attributes:
        prompt: Token ids of the prompt.
        answer: Token ids of the answer whose probability the loss raises ("learn") or lowers (all others).
        preferred: Token ids of the answer that "dpo" prefers to `answer`; empty for other losses.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    preferred: tuple[int, ...] = ()


@dataclass(frozen=True)
class Training:
    """Settings of the training of an adapter.

    Attributes:
        loss: "learn": mean negative log-likelihood of the answer; "ascent": its negative (gradient ascent, Jang et al.,
            arXiv 2210.01504); "npo": negative preference optimisation (Zhang et al., arXiv 2404.05868); "dpo": direct
            preference optimisation (Rafailov et al., arXiv 2305.18290).
        learning_rate: Learning rate at the end of the warm-up.
        batch: Examples of an optimiser step.
        epochs: Passes over the examples.
        warmup: Optimiser steps of linear warm-up, limited to half of all steps.
        beta: Inverse temperature of "npo" and "dpo".
        rank: Rank of the adapter.
        seed: Seed of the adapter's initial weights and of the order of examples.
        least_steps: Minimum number of optimiser steps; epochs are added until it is reached.
        steps: Number of optimiser steps, whatever `epochs` and `least_steps` say; the last epoch may end early. None
            trains for whole epochs.
    """

    loss: Loss
    learning_rate: float
    batch: int = 16
    epochs: int = 5
    warmup: int = 20
    beta: float = 0.1
    rank: int = 8
    seed: int = 42
    least_steps: int = 0
    steps: int | None = None


GRADIENT_ASCENT = Training("ascent", 2e-5, batch=16)
NEGATIVE_PREFERENCE = Training("npo", 5e-5, batch=16, beta=0.0275)
REJECTION = Training("learn", 5e-5, batch=8)
DIRECT_PREFERENCE = Training("dpo", 1e-4, batch=8)


def question_examples(
    tokenizer: Any,
    probes: Sequence[Probe],
    preferred: Callable[[Probe], str] | None = None,
    style: PromptStyle | None = None,
    chat: ChatSettings = DEFAULT,
) -> list[Example]:
    """Tokenise the probes of the form "qa" as examples.

    Args:
        tokenizer: Tokenizer of the model.
        probes: Questions with their answers; other forms are left out.
        preferred: Function that gives the preferred answer to a probe; None leaves it empty.
        style: Details of the prompts; None uses the defaults of `PromptStyle`.
        chat: Settings of the chat template.

    Raises:
        InputError: If there are no probes of the form "qa", or tokenizer or chat template fail.
    """
    probes = [probe for probe in probes if probe.form == "qa"]
    items = build_items(probes, ["qa"], style)
    texts = item_texts(tokenizer, items, chat)
    answers = [(*item.answers, *((f" {preferred(probes[item.probe])}",) if preferred else ())) for item in items]
    questions = tokenize_questions(tokenizer, texts, answers)
    return [Example(q.prompt, q.answers[0], q.answers[1] if preferred else ()) for q in questions]


@contextmanager
def trained(
    model: nn.Module, examples: Sequence[Example], training: Training, progress: ProgressCallback = silent
) -> Iterator[nn.Module]:
    """Train an adapter on examples, and yield the model with it; leaving the context removes the adapter.

    The weights of the model itself do not change.

    Args:
        model: Causal language model of transformers.
        examples: One or more examples.
        training: Settings of the training.
        progress: Function that is called after every optimiser step.

    Raises:
        InputError: If peft is not installed, there are no examples, the model has no modules q_proj and v_proj, or it
            was loaded in inference mode.
        RocrError: If the loss is not a finite number.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("Training adapters needs the package peft: pip install 'rocr[lora]'.") from None
    if not examples:
        raise InputError("There are no examples to train on: training needs probes of the form qa.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            "The model was loaded inside torch.inference_mode(), so its parameters cannot be trained; load it outside "
            "of this context."
        )
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        config = LoraConfig(
            r=training.rank, lora_alpha=2 * training.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        adapting = calling("Adding a LoRA adapter to this model")
        with offline(), adapting, plain_arithmetic(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses transformers in ways that it warns about
            adapted = get_peft_model(model, config)
        try:
            with plain_arithmetic(), torch.enable_grad():
                _train(adapted, examples, training, progress)
            adapted.eval()
            yield adapted
        finally:
            with plain_arithmetic():
                adapted.unload()
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(frozen[name])
            model.eval()


def _train(model: Any, examples: Sequence[Example], training: Training, progress: ProgressCallback) -> None:
    """Optimise the adapter; examples run one by one, so that memory does not grow with the batch."""
    reference = _reference(model, examples) if training.loss in ("npo", "dpo") else {}
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    steps_of_epoch = math.ceil(len(examples) / training.batch)
    epochs = max(training.epochs, math.ceil(training.least_steps / steps_of_epoch))
    steps = steps_of_epoch * epochs if training.steps is None else training.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(min(training.warmup, steps // 2), steps))
    done = 0
    while done < steps:
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), training.batch)[: steps - done]:
            group = order[start : start + training.batch]
            for index in group:
                loss = _loss(model, examples[index], training, reference.get(index)) / len(group)
                if not torch.isfinite(loss):
                    raise RocrError(
                        "The training loss is not a finite number; lower the learning rate, which is "
                        f"{training.learning_rate:g}."
                    )
                with calling("The model's backward pass"):
                    loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            progress(Progress("training", done, steps, "steps"))


def cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate by step: a linear warm-up, then half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _loss(model: nn.Module, example: Example, training: Training, reference: tuple[float, float] | None) -> Tensor:
    """Return the loss of an example; `reference` has the two values of `_reference` for "npo" and "dpo"."""
    nll = answer_nll(model, example.prompt, example.answer)
    if training.loss == "learn":
        return nll / len(example.answer)
    if training.loss == "ascent":
        return -nll / len(example.answer)
    assert reference is not None
    lowered = nll - reference[0]
    if training.loss == "npo":
        return -(2 / training.beta) * nn.functional.logsigmoid(training.beta * lowered)
    raised = reference[1] - answer_nll(model, example.prompt, example.preferred)
    return -nn.functional.logsigmoid(training.beta * (raised + lowered))


@plain_arithmetic()
def _reference(model: Any, examples: Sequence[Example]) -> dict[int, tuple[float, float]]:
    """Return the negative log-likelihoods of each answer and preferred answer without the adapter, in nats."""
    with model.disable_adapter():
        return {
            i: (
                float(answer_nll(model, example.prompt, example.answer)),
                float(answer_nll(model, example.prompt, example.preferred)) if example.preferred else 0.0,
            )
            for i, example in enumerate(examples)
        }


def answer_nll(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Return the sum of the negative log-likelihoods of an answer's tokens, in nats."""
    tokens = torch.tensor([[*prompt, *answer]])
    logits = logits_of(forward(model, tokens, use_cache=False))[0, len(prompt) - 1 : -1].float()
    check_vocabulary(answer, logits)
    return nn.functional.cross_entropy(logits, tokens[0, len(prompt) :].to(logits.device), reduction="sum")
