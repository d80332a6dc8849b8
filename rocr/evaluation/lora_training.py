"""Train LoRA adapters on questions: the unlearning methods that rocr is compared to, and relearning as an attack.

Settings are those of ORT's authors for Llama-3 (LoRA on q_proj and v_proj, 5 epochs, cosine schedule, warm-up of 20
steps, seed 42). Needs peft.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rocr.errors import InputError, RocrError
from rocr.evaluation.scoring import check_vocabulary
from rocr.io.boundary import calling
from rocr.model.forward import forward, logits_of
from rocr.model.hub import offline
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

Loss = Literal["learn", "ascent", "npo", "dpo"]


@dataclass(frozen=True)
class Example:
    """A tokenised prompt with the answer to raise or lower, and for "dpo" the answer to prefer to it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    preferred: tuple[int, ...] = ()


@dataclass(frozen=True)
class Training:
    """How an adapter is trained.

    Attributes:
        loss: "learn": mean NLL of the answer; "ascent": minus that (GA, Jang et al., arXiv 2210.01504); "npo": negative
            preference (Zhang et al., arXiv 2404.05868); "dpo": direct preference (Rafailov et al., arXiv 2305.18290).
        learning_rate: at the end of the warm-up.
        batch: examples of an optimiser step.
        epochs: passes over the examples.
        warmup: optimiser steps of linear warm-up; at most half of all.
        beta: inverse temperature of "npo" and "dpo".
        rank: of the adapter.
        seed: of the adapter and of the order of examples.
        least_steps: optimiser steps at least; with few examples there are more epochs, until there are as many.
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


GRADIENT_ASCENT = Training("ascent", 2e-5, batch=16)
NEGATIVE_PREFERENCE = Training("npo", 5e-5, batch=16, beta=0.0275)
REJECTION = Training("learn", 5e-5, batch=8)
DIRECT_PREFERENCE = Training("dpo", 1e-4, batch=8)


@contextmanager
def trained(
    model: nn.Module, examples: Sequence[Example], training: Training, progress: ProgressCallback = silent
) -> Iterator[nn.Module]:
    """Within the context the model with a trained adapter; after it the model as it was, its weights never touched.

    Raises:
        InputError: peft is missing, there are no examples, or the model has no q_proj and v_proj or was loaded in
            inference mode.
        RocrError: the loss is not a number.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("Training adapters needs the package peft: pip install 'rocr[lora]'.") from None
    if not examples:
        raise InputError("There are no examples to train on.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            "The model was loaded in torch.inference_mode(), where torch keeps nothing that training needs; load it "
            "outside."
        )
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        config = LoraConfig(
            r=training.rank, lora_alpha=2 * training.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        adapting = calling("The attempt to put an adapter on this model")
        with offline(), adapting, plain_arithmetic(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft's use of transformers
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
    """Optimise the adapter; each example runs alone and its gradient is added, so memory does not grow with batch."""
    reference = _reference(model, examples) if training.loss in ("npo", "dpo") else {}
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    steps_of_epoch = math.ceil(len(examples) / training.batch)
    epochs = max(training.epochs, math.ceil(training.least_steps / steps_of_epoch))
    steps = steps_of_epoch * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(min(training.warmup, steps // 2), steps))
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), training.batch):
            group = order[start : start + training.batch]
            for index in group:
                loss = _loss(model, examples[index], training, reference.get(index)) / len(group)
                if not torch.isfinite(loss):
                    raise RocrError("The training loss is not a number; lower the learning rate.")
                with calling("The model's backward pass"):
                    loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            progress(Progress("training", done, steps, "steps"))


def _cosine(warmup: int, steps: int) -> Any:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _loss(model: nn.Module, example: Example, training: Training, reference: tuple[float, float] | None) -> Tensor:
    nll = _answer_nll(model, example.prompt, example.answer)
    if training.loss == "learn":
        return nll / len(example.answer)
    if training.loss == "ascent":
        return -nll / len(example.answer)
    assert reference is not None
    lowered = nll - reference[0]
    if training.loss == "npo":
        return -(2 / training.beta) * nn.functional.logsigmoid(training.beta * lowered)
    raised = reference[1] - _answer_nll(model, example.prompt, example.preferred)
    return -nn.functional.logsigmoid(training.beta * (raised + lowered))


@plain_arithmetic()
def _reference(model: Any, examples: Sequence[Example]) -> dict[int, tuple[float, float]]:
    """NLL of each answer and preferred answer without the adapter."""
    with model.disable_adapter():
        return {
            i: (
                float(_answer_nll(model, example.prompt, example.answer)),
                float(_answer_nll(model, example.prompt, example.preferred)) if example.preferred else 0.0,
            )
            for i, example in enumerate(examples)
        }


def _answer_nll(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Sum of the negative log-likelihoods of an answer's tokens, in nats."""
    tokens = torch.tensor([[*prompt, *answer]])
    logits = logits_of(forward(model, tokens, use_cache=False))[0, len(prompt) - 1 : -1].float()
    check_vocabulary(answer, logits)
    return nn.functional.cross_entropy(logits, tokens[0, len(prompt) :].to(logits.device), reduction="sum")
