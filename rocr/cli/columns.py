"""Answers on a terminal as they are written: side by side, or one below the other on a narrow one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rocr.io.visible import visible

WIDE = 80
"""Columns of a terminal from which answers are side by side."""


class Answers:
    """The answers to one question on a terminal, which are drawn again when one of them grows.

    Args:
        sides: the names of the answers, in order.
        live: the display.
    """

    def __init__(self, sides: Sequence[str], live: Live) -> None:
        self._texts: dict[str, str] = dict.fromkeys(sides, "")
        self._live = live

    def show(self, side: str, text: str) -> None:
        """Show the text so far of one answer."""
        self._texts[side] = visible(text)
        self._live.update(arranged(self._texts, self._live.console.width), refresh=True)


def arranged(texts: Mapping[str, str], width: int) -> RenderableType:
    """The answers as they are drawn on a terminal of a width."""
    if len(texts) > 1 and width >= WIDE:
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0), header_style="bold")
        for side in texts:
            table.add_column(side, ratio=1, overflow="fold")
        table.add_row(*map(Text, texts.values()))
        return table
    return Group(*(part for side, text in texts.items() for part in (Text(side, style="bold"), Text(text))))


@contextmanager
def answers_on(console: rich.console.Console, sides: Sequence[str]) -> Iterator[Answers]:
    """A context in which the answers to one question are drawn."""
    with Live(console=console, auto_refresh=False) as live:
        yield Answers(sides, live)
