"""The expensive operations of rocr, each with several backends."""

from rocr.ops.dispatch import (
    accumulate_grouped_second_moment,
    accumulate_second_moment,
    accumulate_second_moments,
    available_backends,
    low_rank_update,
    second_moment_backend,
    solve_on_support,
    solve_update,
    symmetrize,
)

__all__ = [
    "accumulate_grouped_second_moment",
    "accumulate_second_moment",
    "accumulate_second_moments",
    "available_backends",
    "low_rank_update",
    "second_moment_backend",
    "solve_on_support",
    "solve_update",
    "symmetrize",
]
