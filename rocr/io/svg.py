"""Drawings as SVG, whose colours follow the reader's light or dark mode. They need no package and no script."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rocr.io.visible import visible

SERIES = 9
"""Number of colours of series, the classes c0 to c8."""
STYLE = """
.figure { --ink: #222; --grid: #d8d8d8; --before: #66748f; --after: #b84a00; --hot: #b84a00; --cold: #f3f1ec;
--c0: #1b6ca8; --c1: #c05000; --c2: #2d7d2d; --c3: #8e4ec6; --c4: #8a6500; --c5: #c0392b; --c6: #17807e; --c7: #555;
--c8: #b8479a; }
@media (prefers-color-scheme: dark) { .figure { --ink: #e6e6e6; --grid: #444; --before: #9aa8c4; --after: #ff9c57;
--hot: #ff9c57; --cold: #23262b; --c0: #6cb6ee; --c1: #ff9c57; --c2: #7fd07f; --c3: #c9a2f2; --c4: #e0bb55;
--c5: #ff8a7d; --c6: #62cfcc; --c7: #bbb; --c8: #f29bd8; } }
@media print { .figure { --ink: #000; --grid: #ccc; --before: #66748f; --after: #b84a00; --hot: #b84a00;
--cold: #f3f1ec; } }
.figure text { fill: var(--ink); font: 13px system-ui, sans-serif; } .figure .small { font-size: 11px; }
.figure .axis { stroke: var(--ink); } .figure .grid { stroke: var(--grid); } .figure .chance { stroke: var(--ink);
stroke-dasharray: 4 3; } .figure .before { fill: var(--before); } .figure .after { fill: var(--after); }
.figure .hollow { fill: none; } .figure .whisker { stroke: var(--ink); stroke-width: 1.5; } .figure .cold {
fill: var(--cold); } .figure .hot { fill: var(--hot); }
""" + "\n".join(
    f".figure .c{i} {{ fill: var(--c{i}); }} .figure .l{i} {{ stroke: var(--c{i}); stroke-width: 1.8; fill: none; }}"
    for i in range(SERIES)
)


def escaped(text: str) -> str:
    """Return text as HTML or XML, with invisible and control characters written as their code points."""
    return html.escape(visible(text))


class Drawing:
    """A drawing in units of about a pixel; y grows downwards.

    Args:
        width: Its width.
        height: Its height.
        label: What it shows, for readers that cannot see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []

    def line(self, start: Sequence[float], end: Sequence[float], kind: str = "axis") -> None:
        """Draw a line between two points."""
        points = dict(zip(("x1", "y1", "x2", "y2"), (*start, *end), strict=True))
        self._parts.append(f'<line class="{kind}"{_numbers(points)}/>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "", **more: float) -> None:
        """Draw a rectangle; its title is shown when it is pointed at."""
        sizes = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0), **more}
        self._parts.append(f'<rect class="{kind}"{_numbers(sizes)}>{_title(title)}</rect>')

    def circle(self, x: float, y: float, radius: float, kind: str, title: str = "") -> None:
        """Draw a circle; its title is shown when it is pointed at."""
        sizes = {"cx": x, "cy": y, "r": radius}
        self._parts.append(f'<circle class="{kind}"{_numbers(sizes)}>{_title(title)}</circle>')

    def path(self, points: Sequence[Sequence[float]], kind: str) -> None:
        """Draw straight lines from point to point."""
        self._parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "", turn: float = 0.0) -> None:
        """Write text; `turn` is in degrees, clockwise."""
        turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
        named = f' class="{kind}"' if kind else ""
        place = _numbers({"x": x, "y": y})
        self._parts.append(f'<text{named}{place} text-anchor="{anchor}"{turned}>{escaped(text)}</text>')

    def svg(self, standalone: bool = False) -> str:
        """Return the drawing as an element, or as a file with its own colours.

        Args:
            standalone: Whether the colours (`STYLE`) are inside; a page has them once.
        """
        style = f"<style>{STYLE}</style>" if standalone else ""
        space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
        return (
            f'<svg{space} class="figure" role="img" aria-label="{escaped(self.label)}" '
            f'viewBox="0 0 {self.width:g} {self.height:g}">{style}{"".join(self._parts)}</svg>'
        )


def shortened(text: str, most: int) -> str:
    """Return a text of at most `most` characters, the last of which is an ellipsis if it is cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _title(text: str) -> str:
    return f"<title>{escaped(text)}</title>" if text else ""


def _numbers(values: dict[str, float]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value:.2f}"' for name, value in values.items())
