"""How tiles are shared out among the programs of one launch; plain arithmetic, no GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MAXIMUM_SPLITS = 16
"""Most items that share one tile; each needs a slice of memory of its own."""

MINIMUM_SPLIT_TOKENS = 1024
"""Fewest tokens worth an item: below, writing the tile costs as much as computing it."""

ITEM_TOKENS = 512
"""What starting an item and adding its tile costs, in tokens of computation; an estimate."""

BAND_TILES = 4
"""What starting a band costs, in tiles of a weight: its addresses and its part of right come first; an estimate."""


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


@dataclass(frozen=True)
class Bands:
    """Which items a low-rank update has: an item walks down a column of tiles of a weight, or a part of it.

    Attributes:
        columns: columns of tiles of all layers together.
        whole: the first of them, each one item.
        splits: items that share each column of the rest.
        split_tiles: tiles of such an item; the last one may have fewer.
    """

    columns: int
    whole: int
    splits: int
    split_tiles: int

    @property
    def items(self) -> int:
        """Items of the launch."""
        return self.whole + (self.columns - self.whole) * self.splits


@functools.cache
def make_bands(columns: int, tiles: int, programs: int) -> Bands:
    """Share columns of so many tiles out so that all programs finish at nearly the same time.

    Long bands start seldom; the columns beyond the last full round of programs are cut up to end together.
    """
    whole = columns // programs * programs
    rest = columns - whole
    if not rest:
        return Bands(columns, whole, 1, tiles)
    best = (float("inf"), 1, tiles)
    for splits in range(1, tiles + 1):
        split_tiles = -(-tiles // splits)
        if (splits - 1) * split_tiles < tiles:
            best = min(best, (-(-rest * splits // programs) * (split_tiles + BAND_TILES), splits, split_tiles))
    return Bands(columns, whole, best[1], best[2])
