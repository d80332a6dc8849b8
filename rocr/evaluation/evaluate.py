"""Evaluate a model: ask every probe in every form, score the answers, and take the other measures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import nn

from rocr.argument_checks import NAMES, check_kind, check_list, check_reader
from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import folded
from rocr.errors import InputError, RocrError
from rocr.evaluation.forms import ORT_FORMS, Item, PromptStyle, build_items, item_texts
from rocr.evaluation.measures import (
    ChoiceQuestion,
    TextSample,
    choice_accuracy,
    free_answers,
    measures_of_answers,
    perplexity,
)
from rocr.evaluation.probes.probe import Probe, check_probes, split_by_subject
from rocr.evaluation.scores import Evaluation, FreeAnswer, ItemScore
from rocr.evaluation.scoring import AnswerScore, score_answers, tokenize_questions
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json
from rocr.keys.continuations import TOKEN_BUDGET
from rocr.model.causality import check_writes_text
from rocr.model.chat import with_date
from rocr.model.fingerprint import tensor_digest, tokenizer_digest
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

PROBES, FORM_NAMES = "a list of rocr.Probe", "a list of forms"
MAX_JOURNAL_BYTES = 1024 * 2**20
MAX_HEAD_BYTES = 2**20
"""Largest length of the first line of a journal, which holds digests and the settings of the chat template."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Settings of an evaluation, and further measures to take.

    Attributes:
        seed: Seed of the order of multiple-choice options and of misspellings.
        orders: Number of orders (cyclic shifts) in which the options of a multiple-choice question are asked.
        token_budget: Maximum number of tokens in a batch, padding included.
        generate: Whether the model also answers the questions in free text, to measure the share of answers that
            contain the right one, and their n-gram entropy.
        text: Ordinary text, to measure perplexity; None leaves it out.
        utility: Multiple-choice questions about any subject, to measure accuracy; an empty sequence leaves it out.
        journal: File to which the scores are written as they are computed. If it exists, the evaluation continues from
            it.
        style: Details of the prompts; None uses those of ORT's authors for the model's name.
        chat: Settings of the chat template.
    """

    seed: int = 0
    orders: int = 1
    token_budget: int = TOKEN_BUDGET
    generate: bool = False
    text: TextSample | None = None
    utility: Sequence[ChoiceQuestion] = ()
    journal: str | os.PathLike[str] | None = None
    style: PromptStyle | None = None
    chat: ChatSettings = DEFAULT


@plain_arithmetic()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    forms: Sequence[str] = ORT_FORMS,
    *,
    targets: Sequence[str] | None = None,
    known: float | None = None,
    base: Evaluation | None = None,
    options: EvaluateOptions | None = None,
    progress: ProgressCallback = silent,
) -> Evaluation:
    """Score how well a model answers probes, asked in several forms.

    The score of an answer is exp(-mean negative log-likelihood of its tokens), from 0 to 1. It is averaged over the
    items of each target, then over targets, for each form and split.

    Args:
        model: Causal language model of transformers. It is set to evaluation mode for the time of the call.
        tokenizer: Its tokenizer.
        probes: Questions with known answers; see `load_probes`.
        forms: Forms in which the probes are asked, from `rocr.evaluation.FORMS`: "qa" (the plain question), "fb" (fill
            in the blank), "mcp" (multiple choice), "subtoken" (the answer character by character), "adversarial",
            "misspelt", "abbreviated", "lower" and "surname" (the name written in another way), "described" (in place of
            the name), "translated" and the names of languages, such as "chinese", and "reverse", "reverse-fb" and
            "reverse-mcp" (questions whose answer is the name). A probe that cannot be asked in a form is left out
            there.
        targets: Subjects whose probes form the forget set; all other probes form the retain set. None uses the `split`
            of each probe.
        known: Score from 0 to 1; only probes that the base model knows with at least this score are kept. None keeps
            all probes.
        base: Evaluation of the base model with the same probes and settings, for `known`; None uses the evaluation of
            `model` itself.
        options: Settings and further measures; None uses the defaults of `EvaluateOptions`.
        progress: Function that is called after every item.

    Returns:
        The scores of every item, their means by form, split and target, and the further measures.

    Raises:
        InputError: If probes, forms or settings are invalid, `known` leaves no probe of the forget set, or the model is
            a text encoder or an encoder-decoder.
        RocrError: If a score is not a finite number, or the journal cannot be written.

    Source:
        ORT: Ye, Zhang and Wu, "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795, section V.
    """
    check_reader(model, tokenizer, progress)
    check_list("probes", probes, Probe, PROBES, advice="Read a file of probes with rocr.load_probes(path).")
    check_list("forms", forms, str, FORM_NAMES)
    check_list("targets", targets, str, NAMES, optional=True)
    check_kind("known", known, (int, float), "a number from 0 to 1", optional=True)
    check_kind("base", base, Evaluation, "a rocr.Evaluation", optional=True)
    check_kind("options", options, EvaluateOptions, "a rocr.evaluation.EvaluateOptions", optional=True)
    probes = list(probes)
    options = options or EvaluateOptions()
    if known is not None and not 0 <= known <= 1:
        raise InputError(f"known must be between 0 and 1, not {known!r}.")
    check_probes(probes)
    check_writes_text(model, "Asking questions")
    if targets is not None:
        probes = split_by_subject(probes, targets)
    start = time.perf_counter()
    options = replace(options, chat=with_date(options.chat, tokenizer))
    items = build_items(probes, forms, options.style or PromptStyle.of(model), options.seed, options.orders)
    scores = _scores(model, tokenizer, items, options, progress)
    # Spellings of a subject that `folded` makes equal are one target, named as in the first of its probes.
    subjects: dict[str, str] = {}
    for probe in probes:
        subjects.setdefault(folded(probe.subject), probe.subject)
    found = [_item_score(item, probes[item.probe], scores[i], subjects) for i, item in enumerate(items)]
    settings: dict[str, Any] = {"forms": list(forms), "seed": options.seed, "orders": options.orders}
    if options.chat != DEFAULT:
        settings["chat"] = options.chat.to_json()
    evaluation = Evaluation(found, probes=len({item.probe for item in items}), settings=settings)
    if known is not None:
        evaluation = evaluation.restricted((base or evaluation).known_probes(known), known)
    if options.generate:
        asked = sorted({item.probe for item in evaluation.items})
        found_answers = free_answers(model, tokenizer, {i: probes[i] for i in asked}, progress, options.chat)
        evaluation.answers = [replace(each, subject=subjects[folded(each.subject)]) for each in found_answers]
    evaluation.measures.update(_measures(model, tokenizer, evaluation.answers, options))
    evaluation.seconds = time.perf_counter() - start
    return evaluation


def _scores(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], options: EvaluateOptions, progress: ProgressCallback
) -> dict[int, list[AnswerScore]]:
    """Return the scores of every item's answers, read from the journal or computed."""
    texts = item_texts(tokenizer, items, options.chat)
    questions = tokenize_questions(tokenizer, texts, [item.answers for item in items])
    scores: dict[int, list[AnswerScore]] = {}
    identity = _identity(model, tokenizer, items, options.chat) if options.journal is not None else {}
    with _Journal(options.journal, identity) if options.journal is not None else nullcontext() as journal:
        resumed = len(journal.done) if journal is not None else 0
        if journal is not None:
            scores = {i: [AnswerScore(*values) for values in found] for i, found in journal.done.items()}
        left = [i for i in range(len(items)) if i not in scores]

        def receive(index: int, found: list[AnswerScore]) -> None:
            scores[left[index]] = found
            if journal is not None:
                journal.add(left[index], [[s.nll, s.accuracy, s.extraction] for s in found])
            progress(Progress("questions", len(scores), len(items), "questions", resumed))

        score_answers(model, [questions[i] for i in left], receive, options.token_budget)
    return scores


def _identity(model: nn.Module, tokenizer: Any, items: Sequence[Item], chat: ChatSettings) -> dict[str, Any]:
    """Return the digests that identify an evaluation; all weights count, because an edit changes only a few of them."""
    weights = hashlib.sha256("".join(tensor_digest(parameter) for parameter in model.parameters()).encode())
    return {
        "model": weights.hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "questions": _digest(items),
        "chat": chat.to_json(),
    }


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps([asdict(item) for item in items], sort_keys=True).encode()).hexdigest()


def check_journal(path: str | os.PathLike[str], items: Sequence[Item]) -> None:
    """Check, before a model is loaded, that a journal is of an evaluation with the same questions, if there is one.

    Args:
        path: The path of the journal.
        items: The questions of the evaluation that would continue from it.

    Raises:
        InputError: The file is the journal of other questions.
    """
    if not Path(path).is_file():
        return
    with open(path, "rb") as file:
        first = file.readline(MAX_HEAD_BYTES)
    try:
        head = parse_json(first)
    except ValueError:
        return  # the evaluation itself says what is wrong with it
    if isinstance(head, dict) and "questions" in head and head["questions"] != _digest(items):
        raise _other_evaluation(path)


def _other_evaluation(path: str | os.PathLike[str]) -> InputError:
    return InputError(
        f"The journal {path} is of another evaluation (other model, probes or settings), which was interrupted: run "
        "its command again to finish it, remove the journal, or choose another file."
    )


def _item_score(item: Item, probe: Probe, answers: list[AnswerScore], subjects: Mapping[str, str]) -> ItemScore:
    """Return the score of an item; `subjects` maps folded names of subjects to the names to report."""
    right = answers[item.correct]
    probabilities = [math.exp(-answer.nll) for answer in answers]
    total = sum(probabilities)
    return ItemScore(
        probe=item.probe,
        subject=subjects[folded(probe.subject)],
        form=item.form,
        split=probe.split,
        score=probabilities[item.correct],
        accuracy=right.accuracy,
        extraction=right.extraction,
        choice=probabilities[item.correct] / total if len(answers) > 1 and total > 0 else None,
        derived=item.derived,
        chance=item.chance,
        question=item.message,
        answer=probe.answer if item.form == "subtoken" else item.answers[item.correct].strip(),
    )


def _measures(
    model: nn.Module, tokenizer: Any, answers: Sequence[FreeAnswer], options: EvaluateOptions
) -> dict[str, Any]:
    """Take the further measures that the options ask for."""
    measures: dict[str, Any] = dict(measures_of_answers(answers))
    if options.text is not None:
        measures["perplexity"] = perplexity(model, options.text)
    if options.utility:
        measures["utility"] = choice_accuracy(model, tokenizer, options.utility, options.token_budget, options.chat)
    return measures


class _Journal:
    """A file of the scores so far, from which an interrupted evaluation continues.

    Its first line is a JSON object that identifies the evaluation, and every other line is the list [item, scores].
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Open the file and read its scores, or create it.

        Raises:
            InputError: If the file is not a journal of this evaluation.
            RocrError: If it cannot be written.
        """
        self.done: dict[int, Any] = {}
        self._path = Path(path)
        self._file: IO[str] | None = None
        head = json.dumps(dict(identity), sort_keys=True)
        try:
            whole = self._read(head) if self._path.exists() else 0
            self._file = self._path.open("a", encoding="utf-8", newline="\n")
            if whole:
                self._file.truncate(whole)  # removes an incomplete last line, left by a process that was killed
            else:
                self._file.write(head + "\n")
        except OSError as error:
            raise RocrError(f"The journal {path} cannot be written: {error.strerror or error}.") from error

    def __enter__(self) -> _Journal:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, item: int, scores: Any) -> None:
        """Write the scores of an item and flush them to the operating system."""
        assert self._file is not None
        self.done[item] = scores
        self._file.write(json.dumps([item, scores]) + "\n")
        self._file.flush()

    def _read(self, head: str) -> int:
        """Read the scores of an existing journal; return the length in bytes of its complete lines."""
        data = read_bounded(self._path, MAX_JOURNAL_BYTES)
        whole = data.rfind(b"\n") + 1
        first, *rest = data[:whole].decode("utf-8", "replace").split("\n") if whole else ("",)
        if data and first != head:
            raise _other_evaluation(self._path)
        for number, line in enumerate(filter(None, rest), start=2):
            try:
                item, scores = parse_json(line)
                self.done[int(item)] = scores
            except (ValueError, TypeError, OverflowError):
                raise InputError(
                    f"{self._path}:{number}: is not a line of a journal; remove the file to start again."
                ) from None
        return whole
