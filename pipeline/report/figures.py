"""Charts as inline SVG: no library, no script, and the page's own colours, so that dark mode works too.

Every chart is drawn at about the width of its column on a phone, and scales with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.readings import Line, Plot, readings

WIDTH, HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 34
TONES = ("t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8")  # the colours of page.css


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its name in the legend, points in order of x, and a tone of the page: one of TONES."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str = "t1"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar from 0 to `value`, with a whisker from `low` to `high`; all are shares of 1."""

    name: str
    value: float
    low: float
    high: float
    tone: str


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    unit: str = "",
    floor: float | None = None,
    doubling: bool = False,
) -> Markup:
    """Lines over a shared axis; the description for screen readers gives each one's first and last value.

    Points that are not finite, or have no place on the axis, are left out.

    Args:
        floor: a value that lines should stay above: drawn as a dotted line.
        doubling: every tick of the y axis is twice the one below it; for values above 0.
    """
    drawn = [
        Line(name=line.name, tone=line.tone, points=points)
        for line in series
        if (points := _kept(line, above_0=doubling))
    ]
    points = [point for line in drawn for point in line.points]
    if not points:
        return Markup("<p class='quiet'>No numbers were recorded for {}.</p>").format(title)
    heights = [y for _, y in points] + ([] if floor is None else [floor])
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 4)
    y_ticks = doubling_ticks(heights) if doubling else ticks(min(heights), max(heights), 4)
    across = Scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    height = math.log2 if doubling else float
    up_to = Scale(height(y_ticks[0]), height(y_ticks[-1]), HEIGHT - _BOTTOM, _TOP)

    def up(y: float) -> float:
        return up_to(height(y))

    parts = [_horizontal(up(y), y, unit) for y in y_ticks]
    parts += [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            across(x), HEIGHT - _BOTTOM + 15, number(x)
        )
        for x in x_ticks
    ]
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, x_label
        )
    )
    if floor is not None:
        parts.append(
            Markup('<path class="floor" d="M{} {:.1f}H{}"/>').format(_LEFT, up(floor), WIDTH - _RIGHT)
        )
    parts += [_polyline(line.tone, [(across(x), up(y)) for x, y in line.points]) for line in drawn]
    plot = Plot(left=_LEFT, right=WIDTH - _RIGHT, top=_TOP, bottom=HEIGHT - _BOTTOM, across=across, up=up)
    parts.append(readings(drawn, plot, title=title, x_label=x_label, unit=unit))
    description = "; ".join(
        f"{line.name}: from {number(line.points[0][1])} to {number(line.points[-1][1])}{unit}"
        for line in drawn
    )
    return svg(title, description, parts, WIDTH, HEIGHT, role="group")


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str) -> Markup:
    """Horizontal bars in titled groups on one axis from 0 to 100 %."""
    width, row, gap, left = 360, 22, 30, 104
    height = sum(gap + row * len(bars) for _, bars in groups) + 24
    across = Scale(0, 1, left, width - 44)
    parts = [
        Markup(
            '<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{end}"/>'
            '<text class="tick" x="{x:.1f}" y="{text}" text-anchor="middle">{percent:.0f} %</text>'
        ).format(x=across(share), end=height - 20, text=height - 6, percent=100 * share)
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    y = 0
    for name, bars in groups:
        parts.append(Markup('<text class="group" x="0" y="{}">{}</text>').format(y + 20, name))
        y += gap
        for bar in bars:
            parts.append(_bar(bar, y, row, left, across))
            y += row
    description = "; ".join(
        f"{name}, {bar.name}: {100 * bar.value:.1f} % ({100 * bar.low:.1f} to {100 * bar.high:.1f})"
        for name, bars in groups
        for bar in bars
    )
    return svg(title, description, parts, width, height)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, evenly spaced, that include [low, high]."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def doubling_ticks(values: Sequence[float]) -> list[float]:
    """Powers of two that include the values, which are above 0."""
    first, last = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return [2.0**power for power in range(first, max(last, first + 1) + 1)]


def _bar(bar: Bar, y: float, row: float, left: float, across: Scale) -> Markup:
    middle = y + row / 2
    low, high = across(bar.low), across(bar.high)
    return Markup(
        '<text class="tick" x="{left}" y="{text:.1f}" text-anchor="end">{name}</text>'
        '<rect class="{tone}" x="{x0:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"/>'
        '<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}"/>'
        '<text class="value" x="{after:.1f}" y="{text:.1f}">{percent:.1f} %</text>'
    ).format(
        left=left - 6,
        text=middle + 4,
        name=bar.name,
        tone=bar.tone,
        x0=left,
        top=y + 3,
        width=max(1.0, across(bar.value) - left),
        height=row - 6,
        low=low,
        high=high,
        middle=middle,
        after=high + 5,
        percent=100 * bar.value,
    )


class Scale:
    """A linear map from numbers to places."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._factor


def svg(
    title: str, description: str, parts: Sequence[Markup], width: float, height: float, *, role: str = "img"
) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="{}" aria-label="{}. {}">{}</svg>').format(
        width, height, role, title, description, Markup("").join(parts)
    )


def _kept(line: Series, *, above_0: bool) -> list[tuple[float, float]]:
    return [
        (x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and (y > 0 or not above_0)
    ]


def _polyline(tone: str, points: Sequence[tuple[float, float]]) -> Markup:
    if len(points) == 1:
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(tone, *points[0])
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return Markup('<path class="line {}" d="{}"/>').format(tone, path)


def _horizontal(place: float, value: float, unit: str) -> Markup:
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}{}</text>'
    ).format(_LEFT, WIDTH - _RIGHT, place, place, _LEFT - 6, place + 4, number(value), unit)


def number(value: float) -> str:
    """Short for an axis: 1,500 → 1.5k, 0.0003 → 3e-4."""
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < size < 0.001:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{round(value, 6):g}" if size < 100 else f"{value:,.0f}"
