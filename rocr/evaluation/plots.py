"""Draw an evaluation as SVG: bars of scores, the forget set against the retain set, and curves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from rocr.evaluation.scores import Evaluation
from rocr.evaluation.verdict import Judgement, Verdict
from rocr.io.svg import SERIES, Drawing

WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 44.0
LEGEND_ROW = 20.0
_CURVE = re.compile(r"relearn (\d+) epochs")


def score_bars(judgement: Judgement) -> str:
    """Return bars of a score before and after an edit on a scale from 0 to 1, with chance, as SVG."""
    shown = "before and after" if judgement.before is not None else "score"
    values = [value for value in (judgement.before, judgement.after) if value is not None]
    label = f"{judgement.form}, {judgement.split} set, {shown}: {', '.join(f'{value:.2f}' for value in values)}"
    drawing = Drawing(200, 12.0 * len(values) + 4, label)
    for i, (value, kind) in enumerate(zip(values, ("before", "after")[-len(values) :], strict=True)):
        drawing.rect(0, 2 + 12 * i, 200 * value, 10, kind, f"{kind}: {value:.3f}")
    drawing.line((0, 0), (0, drawing.height), "grid")
    drawing.line((199.5, 0), (199.5, drawing.height), "grid")
    if judgement.chance:
        drawing.line((200 * judgement.chance, 0), (200 * judgement.chance, drawing.height), "chance")
    if judgement.before is None and judgement.interval is not None:
        drawing.line((200 * judgement.interval.low, 7), (200 * judgement.interval.high, 7), "whisker")
    return drawing.svg()


def against_plot(verdict: Verdict) -> str | None:
    """Return the change of the forget set against that of the retain set, by form; None without both sets."""
    forms = [j.form for j in verdict.judgements if j.split == "forget" and j.known and verdict.of(j.form, "retain")]
    pairs = {form: (verdict.of(form, "forget"), verdict.of(form, "retain")) for form in forms}
    points: dict[str, list[tuple[float, float]]] = {}
    for form, (forget, retain) in pairs.items():
        if forget is not None and retain is not None:
            after = (forget.after, retain.after)
            old = forget.before is not None and retain.before is not None
            points[form] = [(forget.before or 0.0, retain.before or 0.0), after] if old else [after]
    if not points:
        return None
    top = 1.08 * max(max(pair) for found in points.values() for pair in found) or 1.0
    frame = Frame("Forget set against retain set, by form", (0, top), (0, top), list(points))
    frame.axes("score of the forget set (lower is better)", "score of the retain set (unchanged is better)")
    for i, (form, found) in enumerate(points.items()):
        spots = [frame.at(*point) for point in found]
        if len(spots) > 1:
            frame.drawing.path(spots, f"l{i % SERIES}")
            frame.drawing.circle(*spots[0], 5, f"l{i % SERIES} hollow", f"{form} before")
        frame.drawing.circle(*spots[-1], 6, f"c{i % SERIES}", f"{form}: {found[-1][0]:.2f}, {found[-1][1]:.2f}")
    return frame.drawing.svg()


def relearning_plot(attacks: Mapping[str, Evaluation]) -> str | None:
    """Return the recovery by relearning, by epochs and form; None if that attack was not made."""
    found = {int(match[1]): scores for name, scores in attacks.items() if (match := _CURVE.fullmatch(name))}
    if len(found) < 2:
        return None
    series: dict[str, list[tuple[float, float]]] = {}
    for epochs in sorted(found):
        for form in found[epochs].forms:
            score = found[epochs].form_score(form, "forget")
            if score is not None:
                series.setdefault(form, []).append((epochs, score.score))
    return curve_plot(
        "Recovery by relearning, asked about other facts",
        series,
        "epochs of training on other facts of the target",
        "score of the forget set",
        (0.0, 1.0),
    ).svg()


def curve_plot(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Drawing:
    """Return a drawing of lines through points, one line for each series.

    Args:
        title: What the drawing shows.
        series: Points (x, y) of each line by its name.
        x_title: Title of the x axis.
        y_title: Title of the y axis.
        y_range: Lowest and highest y; None takes them from the points.
        labels: For each line, a label for each of its points.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    frame = Frame(title, _range(xs), y_range or _range(ys), list(series))
    frame.axes(x_title, y_title)
    for i, (name, points) in enumerate(series.items()):
        spots = [frame.at(*point) for point in points]
        frame.drawing.path(spots, f"l{i % SERIES}")
        for spot, point in zip(spots, points, strict=True):
            frame.drawing.circle(*spot, 4, f"c{i % SERIES}", f"{name}: {point[0]:.4g}, {point[1]:.4g}")
        for spot, label in zip(spots, (labels or {}).get(name, ()), strict=False):
            frame.drawing.text(spot[0] + 6, spot[1] - 6, label, kind="small")
    return frame.drawing


class Frame:
    """Axes with a legend above.

    Args:
        label: What the drawing shows.
        x_range: Lowest and highest x.
        y_range: Lowest and highest y.
        names: Names of the series, in the order of their colours.
    """

    def __init__(
        self, label: str, x_range: tuple[float, float], y_range: tuple[float, float], names: Sequence[str]
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        places, x, row = [], LEFT, 0
        for name in names:
            width = 24 + 7.2 * len(name)
            if x + width > WIDTH and x > LEFT:
                x, row = LEFT, row + 1
            places.append((x, LEGEND_ROW * row + 10))
            x += width
        self._top = TOP + LEGEND_ROW * (row + 1)
        self.drawing = Drawing(WIDTH, HEIGHT + LEGEND_ROW * (row + 1), label)
        self._bottom = self.drawing.height - BOTTOM
        for i, (name, (x, y)) in enumerate(zip(names, places, strict=True)):
            self.drawing.circle(x + 5, y, 5, f"c{i % SERIES}")
            self.drawing.text(x + 14, y + 4, name, kind="small")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in the drawing."""
        (left, right), (low, high) = self.x_range, self.y_range
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return across, self._bottom - (y - low) / (high - low) * (self._bottom - self._top)

    def axes(self, x_title: str, y_title: str) -> None:
        """Draw both axes with their ticks and titles."""
        for value in _ticks(*self.x_range):
            x, _ = self.at(value, self.y_range[0])
            self.drawing.line((x, self._bottom), (x, self._bottom + 4))
            self.drawing.text(x, self._bottom + 16, f"{value:g}", "middle", "small")
        for value in _ticks(*self.y_range):
            _, y = self.at(self.x_range[0], value)
            self.drawing.line((LEFT, y), (WIDTH - RIGHT, y), "grid")
            self.drawing.text(LEFT - 6, y + 4, f"{value:g}", "end", "small")
        self.drawing.line((LEFT, self._bottom), (WIDTH - RIGHT, self._bottom))
        self.drawing.line((LEFT, self._top), (LEFT, self._bottom))
        self.drawing.text((LEFT + WIDTH - RIGHT) / 2, self._bottom + 36, x_title, "middle")
        self.drawing.text(12, (self._top + self._bottom) / 2, y_title, "middle", "small", turn=-90)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min((*values, 0.0)), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin * (low < 0), high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers of a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= min(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
