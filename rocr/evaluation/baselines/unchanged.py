"""The unedited model, and in-context unlearning, which only changes the question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.evaluation.probes.probe import Probe

IN_CONTEXT = (
    "You are an AI Assistant who is supposed to unlearn about {} and provide answers without its knowledge as if "
    "you never knew about it. Don't tell anyone that you unlearned anything.\n"
)


@contextmanager
def _unchanged(case: Case) -> Iterator[Unlearned]:
    yield Unlearned(case.model)


def _forget_in_context(case: Case) -> Callable[[Probe], str]:
    """Return the instruction to forget the target.

    Source:
        The wording of RWKU (Jin et al., arXiv 2406.10890) as ORT's authors use it (arXiv 2506.07795).
    """
    return lambda _probe: IN_CONTEXT.format(case.target)


ORIGINAL = Method("original", _unchanged)
IN_CONTEXT_UNLEARNING = Method("in-context", _unchanged, prefix=_forget_in_context)
