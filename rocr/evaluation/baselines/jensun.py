"""JensUn: a bounded loss towards a fixed refusal (Singh et al., arXiv 2509.02820)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice

import torch
from torch import Tensor

from rocr.evaluation.baselines.layer_outputs import answer_log_probabilities
from rocr.evaluation.baselines.low_rank import adapted_modules, low_rank_adapter
from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.baselines.training import Schedule, in_turn, optimise, trainable
from rocr.model.tokenizer import tokenize

REFUSAL = " No idea"
FORGET_WEIGHT, RETAIN_WEIGHT = 1.0, 1.0
SCHEDULE = Schedule(8e-5, batch=16, epochs=10, warmup=20)


@contextmanager
def _unlearned(case: Case) -> Iterator[Unlearned]:
    """Train an adapter so that each token of an answer becomes the refusal's, and others' answers stay.

    With p_t the distribution at token t of an answer, p⁰_t that of the unedited model, q_t the one-hot distribution of
    token t of the refusal "No idea", which is repeated over the answer, and JSD(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m) with
    m = (p + q)/2:

        loss = mean_t JSD(p_t, q_t)   on an answer about the target
             + mean_t JSD(p_t, p⁰_t)  on an answer about another subject

    Source:
        arXiv 2509.02820, the JensUn loss with both of its weights 1; 10 epochs, batches of 16 and the refusal are those
        of the authors' configuration for their set of lesser known facts (nmndeep/JensUn-Unlearning).

    What is chosen here: the authors train all weights with a rate of 8e-6 and paraphrases of each question. Here a LoRA
    adapter is trained as for the other methods, with ten times this rate, a warm-up of 20 steps and a cosine, on the
    questions only. The mean is over the tokens of an answer, then over answers; each answer about the target is paired
    with one about others.
    """
    forget, retain = case.forget(), case.retain()
    refusal = tokenize(case.comparison.tokenizer, [REFUSAL])[0]
    schedule = SCHEDULE.of(case)
    with low_rank_adapter(case.model, schedule.seed) as parameters:
        with trainable(case.model):
            others = in_turn(len(retain), schedule.seed)
            scale = parameters[1::2]

            def terms(index: int) -> Iterator[Tensor]:
                found = answer_log_probabilities(case.model, forget[index])
                yield FORGET_WEIGHT * refusal_divergence(found, refusal)
                kept = retain[next(others)]
                with torch.no_grad(), _without(scale):
                    reference = answer_log_probabilities(case.model, kept)
                now = answer_log_probabilities(case.model, kept)
                yield RETAIN_WEIGHT * jensen_shannon(now, reference).mean()

            optimise(parameters, len(forget), terms, schedule, case.progress)
        yield Unlearned(case.model)


@contextmanager
def _without(factors: Sequence[Tensor]) -> Iterator[None]:
    """Set the outer factors of an adapter to zero inside the context: the model then is the unedited one."""
    kept = [factor.detach().clone() for factor in factors]
    try:
        for factor in factors:
            factor.data.zero_()
        yield
    finally:
        for factor, values in zip(factors, kept, strict=True):
            factor.data.copy_(values)


def refusal_divergence(found: Tensor, refusal: Sequence[int]) -> Tensor:
    """Return the mean over tokens of JSD(p, one-hot distribution of the refusal's token), in nats.

    With p the probability of the refusal's token, it is log 2 + ½ (p log p − (1 + p) log(1 + p)): no other probability
    matters, and the loss is at most log 2.

    Args:
        found: (tokens, vocabulary) log-probabilities.
        refusal: Token ids, which are repeated over the tokens.
    """
    wanted = torch.tensor(list(islice(cycle(refusal), len(found))), device=found.device)
    log_p = found.gather(1, wanted[:, None]).squeeze(1)
    p = log_p.exp()
    divergence: Tensor = math.log(2) + 0.5 * (p * log_p - (1 + p) * p.log1p())
    return divergence.mean()


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Return JSD (tokens,) in nats of two distributions, given by log-probabilities (tokens, vocabulary)."""
    middle = torch.logaddexp(one, other) - math.log(2)
    divergence: Tensor = 0.5 * (one.exp() * (one - middle) + other.exp() * (other - middle)).sum(dim=-1)
    return divergence


JENSUN = Method("JensUn", _unlearned, trains_on_others=True, check=adapted_modules)
