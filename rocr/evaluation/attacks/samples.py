"""Best of many samples: draw answers at temperature 1, and count the one that holds most of the right answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rocr.concepts import folded
from rocr.evaluation.attacks.attack import Attack, Outcome, Target, invented, mean_by_subject
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.sampling import sample_continuations
from rocr.model.tokenizer import calling_tokenizer
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


def drawn_recalls(target: Target, probes: Sequence[Probe], form: str) -> list[tuple[Probe, list[float]]]:
    """Return for each probe the recall of each drawn answer, up to its first end-of-text token and line break."""
    limits, found = target.limits, []
    pairs = target.questions(probes, form)
    with calling_tokenizer(target.tokenizer):
        ends = set(target.tokenizer.all_special_ids)
    for index, (probe, question) in enumerate(pairs):
        size = (limits.samples, limits.sample_tokens)
        drawn = sample_continuations(target.model, question.prompt, *size, ends, limits.seed + index)
        with calling_tokenizer(target.tokenizer):
            answers = target.tokenizer.batch_decode([_without_end(each.tokens, ends) for each in drawn])
        found.append((probe, [recall(probe.answer, answer.strip().partition("\n")[0]) for answer in answers]))
        target.progress(Progress("samples", index + 1, len(pairs), "questions"))
    return found


def _without_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Return a continuation without the end token that it may end with."""
    return [token for token in tokens if token not in ends]


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
