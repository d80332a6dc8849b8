"""What `rocr plan` recommends for an edit: layers, redirects and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rocr.cli.parsing import Arguments
from rocr.concepts import AUTO, Concept

if TYPE_CHECKING:
    from rocr.export.forecast import Job

ENOUGH_TOKENS = 100_000
"""Tokens of text from which the default γ was found best for long lists; see `rocr.config.EditConfig.gamma`."""
KEPT_STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class Advice:
    """What is recommended for one part of an edit.

    Attributes:
        about: the part: layers, redirect or statistics.
        text: what is recommended, and why.
        options: options to add to the command line; empty: the command is as recommended.
    """

    about: str
    text: str
    options: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "options": list(self.options)}


def recommended(arguments: Arguments, concepts: Sequence[Concept], job: Job, statistics_seconds: float) -> list[Advice]:
    """What is recommended for an edit.

    Args:
        arguments: of the command.
        concepts: the concepts; those without a redirect have the redirect "auto".
        job: the edit.
        statistics_seconds: the estimated time of the collection of statistics, in seconds.
    """
    return [
        _layers(job),
        _redirect(concepts, getattr(arguments, "missing_redirect", False)),
        _statistics(arguments, concepts, job, statistics_seconds),
    ]


def _layers(job: Job) -> Advice:
    from rocr.model.layers import layers_by_default

    best = layers_by_default(job.architecture)
    named, depth = ",".join(map(str, best)), f"a model of {job.architecture.depth} layers"
    if best == job.layers:
        return Advice("layers", f"{named}: the default of {depth}, as planned")
    given = ",".join(map(str, job.layers))
    return Advice("layers", f"{named}, the default of {depth}, in place of {given}", ("--layers", named))


def _redirect(concepts: Sequence[Concept], is_missing: bool) -> Advice:
    chosen = sum(concept.redirect == AUTO for concept in concepts)
    named = len({concept.redirect for concept in concepts} - {AUTO})
    if not chosen:
        return Advice(
            "redirect", f"{named:,} of your own, as planned; --redirect auto would choose one for each concept"
        )
    text = f"chosen by the model for {chosen:,} of {len(concepts):,} concepts, when the edit is made"
    return Advice("redirect", text, ("--redirect", AUTO) if is_missing else ())


def _statistics(arguments: Arguments, concepts: Sequence[Concept], job: Job, seconds: float) -> Advice:
    from rocr.config import LONG_LIST

    if job.statistics is not None:
        return Advice("statistics", f"{job.statistics}, as planned")
    tokens = job.text_tokens()
    source = f"{tokens:,} tokens of the text" if job.texts else f"{tokens:,} tokens that the model writes itself"
    few = len(concepts) >= LONG_LIST and tokens < ENOUGH_TOKENS
    more = (
        f" For {len(concepts):,} concepts, {ENOUGH_TOKENS:,} tokens of ordinary text (--text FILE --tokens "
        f"{ENOUGH_TOKENS}) cost other subjects less."
        if few
        else ""
    )
    keep = () if getattr(arguments, "keep_statistics", None) else ("--keep-statistics", KEPT_STATISTICS)
    text = f"{source}, about {seconds:,.0f} s; kept, they spare the next edit of this model that time.{more}"
    return Advice("statistics", text, keep)


def added_options(advice: Sequence[Advice]) -> list[str]:
    """All options to add to the command line."""
    return [word for each in advice for word in each.options]
