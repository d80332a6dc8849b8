"""ROCR with the authors' settings, and rocr with its own (arXiv 2506.07795, section 4); see `rocr.unlearn`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.edit.edit import Edit
from rocr.evaluation.baselines.method import Case, Method, Unlearned
from rocr.unlearn import unlearn


@contextmanager
def _official(case: Case) -> Iterator[Unlearned]:
    """Edit with the authors' settings and redirect."""
    comparison = case.comparison
    config = replace(EditConfig.official(), chat=comparison.chat)
    concept = Concept(case.target, comparison.official_redirect)
    edit = unlearn(case.model, comparison.tokenizer, [concept], comparison.statistics, config, case.progress)
    try:
        yield Unlearned(case.model)
    finally:
        edit.revert(case.model)


@contextmanager
def _rocr(case: Case) -> Iterator[Unlearned]:
    """Edit with rocr's settings; in a sequence, add the target to the edit of the targets before it."""
    comparison, earlier = case.comparison, case.earlier
    concepts = [Concept(case.target, comparison.redirect)]
    tokenizer, statistics = comparison.tokenizer, comparison.statistics
    edit: Edit
    if earlier is None:
        config = comparison.config or EditConfig()
        edit = unlearn(case.model, tokenizer, concepts, statistics, config, case.progress)
    else:
        edit = earlier.add(concepts, case.model, tokenizer, statistics, case.progress)
    try:
        yield Unlearned(case.model, edit)
    finally:
        edit.revert(case.model)
        if earlier is not None:
            earlier.apply(case.model)


OFFICIAL = Method("official ROCR", _official)
ROCR = Method("rocr", _rocr, sequential=True)
