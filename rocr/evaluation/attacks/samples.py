"""Best of many samples: draw answers at temperature 1, and count the one that holds most of the right answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from rocr.concepts import folded
from rocr.errors import InputError
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, invented, mean_by_subject
from rocr.evaluation.probes.probe import Probe
from rocr.keys.prefix_cache import has_attention_only
from rocr.model.forward import accepts, forward, input_device, is_of_transformers, logits_of
from rocr.model.hooks import evaluating
from rocr.model.tokenizer import calling_tokenizer
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress


def recall(answer: str, text: str) -> float:
    """Return the share of an answer's words that a text holds in the same order (ROUGE-L recall), from 0 to 1."""
    wanted, given = _words(answer), _words(text)
    longest = [0] * (len(given) + 1)
    for word in wanted:
        row = [0]
        for i, other in enumerate(given):
            row.append(longest[i] + 1 if word == other else max(row[i], longest[i + 1]))
        longest = row
    return longest[-1] / len(wanted) if wanted else 0.0


def _words(text: str) -> list[str]:
    """Return the words of a text without case and punctuation."""
    return "".join(c if c.isalnum() else " " for c in folded(text)).split()


@plain_arithmetic()
def sample(
    model: nn.Module, prompt: Sequence[int], count: int, tokens: int, seed: int = 0, temperature: float = 1.0
) -> Tensor:
    """Draw continuations of a prompt, all in one batch; the prompt runs once.

    Args:
        model: Causal language model of transformers.
        prompt: Token ids.
        count: Number of continuations.
        tokens: Number of tokens of each.
        seed: Seed of the draws, which are made on the CPU.
        temperature: Divides the logits.

    Returns:
        (count, tokens) int64 token ids. Tokens after an end-of-text token are drawn like any other.

    Raises:
        InputError: A number is not at least 1, or the model fails.
    """
    if count < 1 or tokens < 1 or temperature <= 0:
        raise InputError(
            f"Samples need at least 1 continuation of at least 1 token and a temperature above 0, not {count}, "
            f"{tokens} and {temperature:g}."
        )
    draw = torch.Generator().manual_seed(seed)
    text, cache = torch.tensor([list(prompt)]), None
    if is_of_transformers(model) and accepts(model, "past_key_values") and has_attention_only(model):
        cache = DynamicCache()
    written: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        output = forward(model, text, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        logits = logits_of(output)[:, -1].expand(count, -1)
        if cache is not None:
            cache.batch_repeat_interleave(count)
        text = text.expand(count, -1)
        while True:
            odds = (logits.double() / temperature).softmax(dim=-1).cpu()
            written.append(torch.multinomial(odds, 1, generator=draw))
            if len(written) == tokens:
                return torch.cat(written, dim=1)
            text = torch.cat([text, written[-1]], dim=1)
            fresh = text if cache is None else written[-1]
            mask = torch.ones_like(text).to(input_device(model))
            arguments = {"past_key_values": cache, "use_cache": cache is not None, "attention_mask": mask}
            logits = logits_of(forward(model, fresh, logits_to_keep=1, **arguments))[:, -1]


def drawn_recalls(target: Target, probes: Sequence[Probe], form: str) -> list[tuple[Probe, list[float]]]:
    """Return for each probe the recall of each drawn answer, up to its first end-of-text token and line break."""
    limits, found = target.limits, []
    pairs = target.questions(probes, form)
    for index, (probe, question) in enumerate(pairs):
        rows = sample(target.model, question.prompt, limits.samples, limits.sample_tokens, limits.seed + index)
        with calling_tokenizer(target.tokenizer):
            ends = set(target.tokenizer.all_special_ids)
            answers = target.tokenizer.batch_decode([_until(row, ends) for row in rows.tolist()])
        found.append((probe, [recall(probe.answer, answer.strip().partition("\n")[0]) for answer in answers]))
        target.progress(Progress("samples", index + 1, len(pairs), "questions"))
    return found


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the tokens before the first of some end tokens."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def samples(target: Target) -> Iterator[Outcome]:
    """Compare the best of all drawn answers with the mean of one, in the first form that is answered in free text."""
    probes, forms = target.few(target.named), target.free_forms()[:1]
    never = invented(probes)
    best: dict[str, dict[str, float]] = {"edited": {}, "unedited": {}, "never": {}}
    one: dict[str, dict[str, float]] = {"edited": {}, "unedited": {}, "never": {}}

    def draw(who: str, asked: Sequence[Probe]) -> None:
        for form in forms:
            rows = drawn_recalls(target, asked, form)
            best[who][form] = mean_by_subject((probe, max(values)) for probe, values in rows)
            one[who][form] = mean_by_subject((probe, sum(values) / len(values)) for probe, values in rows)

    draw("edited", probes)
    draw("never", never)
    with target.without_edit():
        draw("unedited", probes)
    yield Outcome(
        *("samples", f"best of {target.limits.samples}", one["unedited"], one["edited"], best["edited"]),
        *(best["unedited"], best["never"], one["never"], "recall", len(probes)),
    )


SAMPLES = Attack(
    "draws many answers at temperature 1 and takes the one that holds most of the right answer",
    "one batch of sampled answers for each question; the attacker recognises the right answer",
    "the unedited model, and invented names, with as many samples",
    samples,
)
