"""Propose aliases of concepts, and related things: a model proposes them, and says itself how well each fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from rocr.argument_checks import check_kind, check_list, check_reader
from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import AUTO, Concept, check_concepts, check_names, folded
from rocr.edit.alias_answers import (
    SCRIPTS,
    Cut,
    cut_descriptions,
    cut_full_name,
    cut_nicknames,
    cut_related,
    cut_spelling,
)
from rocr.edit.alias_checks import Check, check_proposals, maker_of
from rocr.edit.alias_examples import listed_names
from rocr.edit.automatic_redirects import kind_of
from rocr.errors import InputError
from rocr.model.architecture import Architecture, find_architecture
from rocr.model.causality import check_writes_text, with_kind
from rocr.model.generate import ask, continue_texts
from rocr.model.layers import layers_by_default
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent

LANGUAGES = ("Chinese", "Japanese", "Korean", "Russian", "Arabic", "Hindi", "Greek", "Hebrew")
"""The languages that are asked for by default."""
LEAST = 0.5
"""The default of the smallest share of an alias that is taken."""
NEAR = 0.5
"""The part of that share which is enough for an alias whose state is near the concept's."""
ANSWER_LENGTH, LISTED_LENGTH, RELATED_LENGTH = 32, 20, 60
"""Largest numbers of tokens of an answer with aliases, of a name that continues a list, and of related things."""
FULL_NAME, FULL_NAME_OF_THINGS = "What is the full birth name of {}?", "What is the full name of {}?"
NICKNAME = "What is the nickname of {}?"
SPELLING = 'Translate the name "{}" into [language].'
DESCRIPTION = "Complete the sentence: {} is the"
RELATED = "List five works, companies or inventions of {}. Only names, separated by commas."

ProposalKind = Literal["full name", "nickname", "script", "description", "related"]


@dataclass(frozen=True)
class Proposal:
    """What a model proposes for a concept, and whether it is taken.

    Attributes:
        concept: The name of the concept.
        kind: "full name", "nickname", "script" (a spelling in another language), "description", or "related": a work,
            a company or an invention of the concept, which becomes a concept of its own.
        language: The language of a "script"; None of others.
        question: The question to the model, or the list of names that it continues.
        answer: Its answer, or the rest of the line.
        name: What is cut out of the answer; None if nothing in it fits.
        share: How much of the model's answer about the concept belongs to the name, see `rocr.edit.alias_checks.Check`.
            None if it was not measured.
        near: Whether the state at the name, at the output of an early layer, is nearer to the concept's than the
            states of unrelated names. None if it was not measured.
        taken: Whether it is an alias or a concept of the result.
        reason: Why it is taken or not.
    """

    concept: str
    kind: ProposalKind
    language: str | None
    question: str
    answer: str
    name: str | None
    share: float | None
    near: bool | None
    taken: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Aliases:
    """Concepts with the aliases that a model proposes.

    Attributes:
        concepts: The concepts, each with its own aliases and those that are taken, in their order; then the related
            things that are taken.
        proposals: All proposals.
    """

    concepts: list[Concept]
    proposals: list[Proposal]


@dataclass(frozen=True)
class _Request:
    """A question about a concept, or a list that ends with its name, and how what follows is read."""

    concept: Concept
    kind: ProposalKind
    question: str
    cut: Callable[[str, str], Cut]
    language: str | None = None
    is_list: bool = False

    def unmeasured(self, answer: str, name: str | None, reason: str) -> Proposal:
        """Return a proposal that is not taken, with the reason."""
        return Proposal(
            self.concept.name, self.kind, self.language, self.question, answer, name, None, None, False, reason
        )


@plain_arithmetic()
def propose_aliases(
    model: nn.Module,
    tokenizer: Any,
    concepts: Sequence[Concept],
    languages: Sequence[str] = LANGUAGES,
    least: float = LEAST,
    related: bool = False,
    redirect: str = AUTO,
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
) -> Aliases:
    """Let a model propose aliases of concepts, and verify each by what the model itself says of it.

    The model is asked for the full name, nicknames, the spelling in other languages and descriptions of each concept,
    and continues a list of names in each of the default languages (`rocr.edit.alias_examples`).
    What its answers propose is cut out by rules. A proposal is taken if enough of the model's own answer about the
    concept belongs to it too. Nothing is edited, and a person should read the result before it is used.

    Args:
        model: A causal language model of transformers, not edited.
        tokenizer: Its tokenizer.
        concepts: The concepts.
        languages: The languages for spellings, from `rocr.edit.alias_answers.SCRIPTS`.
        least: Smallest share of an alias that is taken, from 0 (as an unrelated name) to 1 (as the name itself). Half
            of it is enough if the state at the alias is near that at the name.
        related: Whether the model proposes works, companies and inventions of each concept too, as concepts of kind
            "thing". One is taken if the model, asked who wrote, founded or made it, names the concept.
        redirect: The redirect of related concepts. "auto" has `rocr.unlearn` choose one for each.
        progress: Called after every concept.
        chat: Settings of the chat template.

    Returns:
        The concepts with the aliases and related things that were taken, and all proposals.

    Raises:
        InputError: An argument is not valid, a language is not known, the model writes no text, or the tokenizer or
            the model's own code fails.
    """
    check_reader(model, tokenizer, progress)
    check_list("concepts", concepts, Concept, "a list of rocr.Concept")
    check_list("languages", languages, str, "a list of languages")
    check_kind("least", least, (int, float), "a number from 0 to 1")
    check_kind("related", related, bool, "True or False")
    check_kind("redirect", redirect, str, "a name")
    check_kind("chat", chat, ChatSettings, "a rocr.ChatSettings")
    check_languages(languages)
    if not 0 <= least <= 1:
        raise InputError(f"least must be a number from 0 to 1, not {least}.")
    check_concepts(concepts)
    check_redirect(redirect, concepts)
    check_writes_text(model, "Proposing aliases")
    layer = max(layers_by_default(find_architecture(model)))
    asking = _Asking(with_kind(find_architecture(model), layer), tokenizer, layer, chat)
    known = _Known(list(concepts))
    proposals: list[Proposal] = []
    for number, concept in enumerate(concepts, start=1):
        found = list(_aliases_of(asking, concept, concepts, languages, least, known))
        proposals += found
        if related:
            full_names = [each.name for each in found if each.taken and each.kind == "full name"]
            makers = [*concept.names, *filter(None, full_names)]
            proposals += _related_to(asking, concept, makers, known)
        progress(Progress("aliases", number, len(concepts), "concepts"))
    taken = [each for each in proposals if each.taken and each.name is not None]
    of_concept: dict[str, list[str]] = {}
    for each in taken:
        if each.kind != "related":
            of_concept.setdefault(each.concept, []).append(str(each.name))
    result = [replace(each, aliases=(*each.aliases, *of_concept.get(each.name, ()))) for each in concepts]
    result += [Concept(str(each.name), redirect, kind="thing") for each in taken if each.kind == "related"]
    check_concepts(result)
    return Aliases(result, proposals)


def check_languages(languages: Sequence[str]) -> None:
    """Raise InputError unless the letters of all languages are known and none is given twice."""
    unknown = [language for language in languages if language not in SCRIPTS]
    if unknown:
        raise InputError(
            f"Unknown language {', '.join(repr(each[:60]) for each in unknown[:5])}; the languages are "
            f"{', '.join(sorted(SCRIPTS))}."
        )
    if len(set(languages)) < len(languages):
        raise InputError(f"A language is given twice: {', '.join(languages)}.")


def check_redirect(redirect: str, concepts: Sequence[Concept]) -> None:
    """Raise InputError unless a text can be the redirect of things that are related to concepts."""
    check_names("redirect", [redirect])
    if folded(redirect) in {folded(name) for concept in concepts for name in concept.names}:
        raise InputError(f"The redirect {redirect!r} is itself a name on the list: give another one.")


@dataclass(frozen=True)
class _Asking:
    """A model that is asked, the layer at whose output names are compared, and the settings of its chats."""

    architecture: Architecture
    tokenizer: Any
    layer: int
    chat: ChatSettings

    def answers(self, questions: Sequence[str], length: int) -> list[str]:
        """Return the model's answers to questions."""
        return ask(self.architecture.reader, self.tokenizer, questions, length, self.chat, always=True)

    def next_lines(self, lists: Sequence[str]) -> list[str]:
        """Return the rest of the last line of lists, without a chat template, as the model continues them."""
        written = continue_texts(self.architecture.reader, self.tokenizer, lists, LISTED_LENGTH, always=True)
        return [text.partition("\n")[0].strip() for text in written]


class _Known:
    """The names that a list holds already, by what they are there."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self._owners = {folded(name): each.name for each in concepts for name in each.names}
        self._redirects = {folded(each.redirect) for each in concepts}

    def flaw(self, name: str, concept: str) -> str | None:
        """Return why a name cannot be added for a concept; None if it can."""
        owner = self._owners.get(folded(name))
        if owner is not None:
            return "on the list already" if owner == concept else f"a name of {owner} on the list"
        return "a redirect of the list" if folded(name) in self._redirects else None

    def add(self, name: str, concept: str) -> None:
        """Take a name as one of a concept."""
        self._owners[folded(name)] = concept


def _requests(concept: Concept, languages: Sequence[str]) -> Iterator[_Request]:
    """Yield the questions about a concept that ask for aliases."""

    def asking(question: str) -> str:
        return question.replace("{}", concept.name)

    full_name = FULL_NAME_OF_THINGS if kind_of(concept) == "thing" else FULL_NAME
    yield _Request(concept, "full name", asking(full_name), cut_full_name)
    yield _Request(concept, "nickname", asking(NICKNAME), cut_nicknames)
    for language in languages:
        question = asking(SPELLING.replace("[language]", language))
        yield _Request(concept, "script", question, _spelling_in(language), language)
        if (names := listed_names(concept.name, language)) is not None:
            yield _Request(concept, "script", names, _spelling_in(language), language, is_list=True)
    yield _Request(concept, "description", asking(DESCRIPTION), cut_descriptions)


def _spelling_in(language: str) -> Callable[[str, str], Cut]:
    """Return the rule for spellings in a language."""
    return lambda answer, name: cut_spelling(answer, name, language)


def _aliases_of(
    asking: _Asking,
    concept: Concept,
    concepts: Sequence[Concept],
    languages: Sequence[str],
    least: float,
    known: _Known,
) -> Iterator[Proposal]:
    """Yield what a model proposes as aliases of a concept, and add those that are taken to the known names."""
    requests = list(_requests(concept, languages))
    answers = iter(asking.answers([each.question for each in requests if not each.is_list], ANSWER_LENGTH))
    lines = iter(asking.next_lines([each.question for each in requests if each.is_list]))
    found = [each for request in requests for each in _cut(request, next(lines if request.is_list else answers), known)]
    names = list(dict.fromkeys(name for _, proposal in found if (name := proposal.name) and not proposal.reason))
    checks: dict[str, Check] = {}
    if names:
        given = (asking.architecture, asking.tokenizer, concept, names, concepts, asking.layer, asking.chat)
        checks = dict(zip(names, check_proposals(*given), strict=True))
    for _, proposal in found:
        if proposal.name is None or proposal.reason:
            yield proposal
        elif (flaw := known.flaw(proposal.name, concept.name)) is not None:  # proposed before
            yield replace(proposal, reason=flaw)
        else:
            judged = _judged(proposal, checks[proposal.name], least)
            if judged.taken:
                known.add(proposal.name, concept.name)
            yield judged


def _cut(request: _Request, answer: str, known: _Known) -> Iterator[tuple[_Request, Proposal]]:
    """Yield the proposals in an answer; one that is not verified has its reason."""
    cut = request.cut(answer, request.concept.name)
    if not cut.texts:
        yield request, request.unmeasured(answer, None, cut.reason)
    for text in cut.texts:
        yield request, request.unmeasured(answer, text, known.flaw(text, request.concept.name) or "")


def _judged(proposal: Proposal, check: Check, least: float) -> Proposal:
    """Return a proposal with its check, taken if its share is large enough."""
    if check.share is None or not math.isfinite(check.share):
        reason = f"the model says the same of unrelated names as of {proposal.concept}"
        return replace(proposal, near=check.near, reason=reason)
    limit = NEAR * least if check.near else least
    taken = check.share >= limit
    reason = f"share {check.share:.2f} is {'at least' if taken else 'below'} {limit:g}"
    return replace(proposal, share=check.share, near=check.near, taken=taken, reason=reason)


def _related_to(asking: _Asking, concept: Concept, makers: Sequence[str], known: _Known) -> Iterator[Proposal]:
    """Yield what a model proposes as related to a concept, and add what is taken to the known names."""
    request = _Request(concept, "related", RELATED.replace("{}", concept.name), cut_related)
    (answer,) = asking.answers([request.question], RELATED_LENGTH)
    found = [proposal for _, proposal in _cut(request, answer, known)]
    names = [proposal.name for proposal in found if proposal.name is not None and not proposal.reason]
    verified: dict[str, str | None] = {}
    if names:
        questions = maker_of(asking.architecture, asking.tokenizer, names, makers, asking.chat)
        verified = dict(zip(names, questions, strict=True))
    for proposal in found:
        if proposal.name is None or proposal.reason:
            yield proposal
        elif (flaw := known.flaw(proposal.name, concept.name)) is not None:  # proposed before
            yield replace(proposal, reason=flaw)
        elif (question := verified[proposal.name]) is None:
            yield replace(
                proposal, reason=f"asked who wrote, founded or made it, the model does not name {concept.name}"
            )
        else:
            known.add(proposal.name, proposal.name)
            yield replace(proposal, taken=True, reason=f"asked {question!r}, the model names {concept.name}")
