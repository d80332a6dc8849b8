"""How the tiles of second moments are shared out among the programs of one launch; plain arithmetic, no GPU."""

from __future__ import annotations

from dataclasses import dataclass

MAXIMUM_SPLITS = 16
"""Most items that share one tile; each needs a slice of memory of its own."""

MINIMUM_SPLIT_TOKENS = 1024
"""Fewest tokens worth an item: below, writing the tile costs as much as computing it."""

ITEM_TOKENS = 512
"""What starting an item and adding its tile costs, in tokens of computation; an estimate."""


@dataclass(frozen=True)
class Schedule:
    """Which items a launch has: every tile of a full round of programs is one item, the rest are split over tokens.

    Attributes:
        tiles: tiles of all layers together.
        whole: the first of them, each one item that runs over all tokens and adds to the total itself.
        splits: items that share each tile of the rest; more than one write to slices that are summed in order.
        split_tokens: tokens of an item of the rest, a multiple of the token step; the last one has fewer.
    """

    tiles: int
    whole: int
    splits: int
    split_tokens: int

    @property
    def items(self) -> int:
        """Items of the launch."""
        return self.whole + (self.tiles - self.whole) * self.splits

    @property
    def slices(self) -> int:
        """Tiles of memory that the items need beside the totals."""
        return self.items - self.whole


def make_schedule(tiles: int, tokens: int, programs: int, token_step: int) -> Schedule:
    """Share tiles out so that all programs finish at nearly the same time.

    The tiles beyond the last full round of programs would keep a few of them busy while the others wait; these
    are split over tokens into the number of items that ends soonest.
    """
    whole = tiles // programs * programs
    rest = tiles - whole
    best = (float("inf"), 1, tokens)
    for splits in range(1, MAXIMUM_SPLITS + 1):
        split_tokens = -(-tokens // (splits * token_step)) * token_step
        if splits > 1 and (split_tokens < MINIMUM_SPLIT_TOKENS or (splits - 1) * split_tokens >= tokens):
            continue
        rounds = -(-rest * splits // programs)
        best = min(best, (rounds * (split_tokens + ITEM_TOKENS), splits, split_tokens))
    _, splits, split_tokens = best
    if not rest or splits == 1:
        return Schedule(tiles, whole=tiles, splits=1, split_tokens=tokens)
    return Schedule(tiles, whole, splits, split_tokens)
