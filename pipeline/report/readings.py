"""What the lines of a chart are worth at a step: shown where one points or taps, or goes by the arrow keys.

No script does it, for reports run none: each column of a chart holds a button of one group, and the reading
of a column is seen while the pointer or the focus is in it (see page.css).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

COLUMNS = 40  # at most: about as many as a finger tells apart
_LONGEST_NAME = 20  # characters; whole names are in the legend
_ROW, _CHARACTER = 13, 6.4  # height and width of text, about


@dataclass(frozen=True, kw_only=True)
class Line:
    """What of a series is drawn: points in order of x, and what they are called."""

    name: str
    tone: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Where a chart's points lie in it.

    Attributes:
        across, up: value of x or y → place.
    """

    left: float
    right: float
    top: float
    bottom: float
    across: Callable[[float], float]
    up: Callable[[float], float]


def readings(lines: Sequence[Line], plot: Plot, *, title: str, x_label: str, unit: str) -> Markup:
    """The columns of a chart, to be drawn over its lines; of a chart with one line the name is left out.

    Args:
        title: of the chart, by which its columns are one group.
    """
    places = _places(lines)
    middles = [plot.across(x) for x in places]
    edges = [plot.left, *((one + next_one) / 2 for one, next_one in pairwise(middles)), plot.right]
    columns = []
    for x, (start, end) in zip(places, pairwise(edges), strict=True):
        found = [(line, point) for line in lines if (point := _point_at(line, x)) is not None]
        named = [f" {line.name}" if len(lines) > 1 else "" for line, _ in found]
        values = [_value(y, unit) for _, (_, y) in found]
        head = f"{x_label} {x:,.0f}"
        label = ", ".join(value + name for value, name in zip(values, named, strict=True))
        texts = [head, *(value + _short(name) for value, name in zip(values, named, strict=True))]
        columns.append(
            Markup(
                '<g class="at"><foreignObject x="{:.1f}" y="{}" width="{:.1f}" height="{}">'
                '<input type="radio" name="{}" aria-label="{}: {}"></foreignObject>{}</g>'
            ).format(
                *(start, plot.top, end - start, plot.bottom - plot.top, title, head, label),
                _reading(found, plot, plot.across(x), texts),
            )
        )
    return Markup("").join(columns)


def _places(lines: Sequence[Line]) -> list[float]:
    """All x that there are, or of many those nearest to evenly spaced ones."""
    there = sorted({x for line in lines for x, _ in line.points})
    if len(there) <= COLUMNS:
        return there
    low, width = there[0], (there[-1] - there[0]) / (COLUMNS - 1)
    return sorted({_nearest(there, low + index * width) for index in range(COLUMNS)})


def _nearest(there: Sequence[float], x: float) -> float:
    after = bisect_left(there, x)
    return min(there[max(0, after - 1) : after + 1], key=lambda each: abs(each - x))


def _point_at(line: Line, x: float) -> tuple[float, float] | None:
    """The point of a line nearest to x; None where the line is not."""
    if not line.points[0][0] <= x <= line.points[-1][0]:
        return None
    after = bisect_left(line.points, x, key=lambda point: point[0])
    return min(line.points[max(0, after - 1) : after + 1], key=lambda point: abs(point[0] - x))


def _reading(
    found: Sequence[tuple[Line, tuple[float, float]]], plot: Plot, place: float, texts: Sequence[str]
) -> Markup:
    """A line down the chart, a dot on each curve, and their values on the side where there is more room."""
    width = _CHARACTER * max(map(len, texts)) + 10
    left = place + 6 if place < (plot.left + plot.right) / 2 else place - 6 - width
    left = min(max(left, 0), plot.right - width)
    dots = [
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
            line.tone, plot.across(x), plot.up(y)
        )
        for line, (x, y) in found
    ]
    rows = [Markup('<tspan x="{:.1f}" dy="{}">{}</tspan>').format(left + 5, _ROW, text) for text in texts]
    return Markup(
        '<g class="reading"><path d="M{:.1f} {}V{}"/>{}'
        '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="3"/><text y="{}">{}</text></g>'
    ).format(
        *(place, plot.top, plot.bottom, Markup("").join(dots)),
        *(left, plot.top, width, _ROW * len(texts) + 7, plot.top + 1, Markup("").join(rows)),
    )


def _value(y: float, unit: str) -> str:
    return f"{y:,.0f}{unit}" if 1000 <= abs(y) < 1e9 else f"{y:.4g}{unit}"


def _short(name: str) -> str:
    """The end of a long name: runs of one sweep begin alike."""
    return name if len(name) <= _LONGEST_NAME else f" …{name[2 - _LONGEST_NAME :]}"
