"""Accuracy against size, in plain SVG: hollow what others have published, solid what was measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from pipeline.report.figures import Scale, number, svg, ticks

_WIDTH, _PLOT_HEIGHT = 360, 250
_LEFT, _RIGHT, _BELOW = 40, 10, 36
_LINE, _LETTER = 16, 6.0  # of the legend: height, and width of a letter
_APART = 12.0  # labels, at least
_BESIDE = 9.0  # marks of the same size


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point, with `text` for a tooltip; y are shares of 1.

    Attributes:
        interval: its ends, if it has one.
        seeds: accuracies of the trainings that y is the mean of.
    """

    x: float
    y: float
    text: str
    interval: tuple[float, float] | None = None
    seeds: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Published points of one family, by size; `tone` is one of `pipeline.report.figures.TONES`."""

    name: str
    tone: str
    marks: Sequence[Mark]


def scatter_chart(
    published: Sequence[Trace], ours: Sequence[tuple[str, Mark]], *, title: str, x_label: str
) -> Markup:
    """Top-1 over a logarithmic axis; the description for screen readers lists every point.

    Args:
        ours: name → mark.
    """
    marks = [mark for trace in published for mark in trace.marks] + [mark for _, mark in ours]
    if not marks:
        return Markup("<p class='quiet'>Of no point here are these known: {}.</p>").format(x_label)
    names = [(trace.name, trace.tone) for trace in published] + ([("here", "")] if published and ours else [])
    legend, top = _legend(names)
    heights = [
        100 * y for mark in marks for y in (mark.y, *mark.seeds, *(_clipped(mark) or ())) if math.isfinite(y)
    ]
    x_ticks = log_ticks(min(mark.x for mark in marks), max(mark.x for mark in marks))
    y_ticks = ticks(min(heights), max(heights), 5)
    bottom = top + _PLOT_HEIGHT
    across = Scale(math.log(x_ticks[0]), math.log(x_ticks[-1]), _LEFT + 6, _WIDTH - _RIGHT - 6)
    up = Scale(y_ticks[0], y_ticks[-1], bottom, top)

    parts = [*legend, *_axes(x_ticks, y_ticks, across=across, up=up, bottom=bottom, x_label=x_label)]
    for trace in published:
        places = [(across(math.log(mark.x)), up(100 * mark.y)) for mark in trace.marks]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(Markup('<path class="joined {}" d="M{}"/>').format(trace.tone, path))
        parts += [
            Markup(
                '<circle class="hollow {}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'
            ).format(trace.tone, *place, mark.text)
            for place, mark in zip(places, trace.marks, strict=True)
        ]
    parts += _solid(ours, across, up, top, bottom)
    named = [(trace.name, mark) for trace in published for mark in trace.marks] + list(ours)
    description = "; ".join(f"{name}: {mark.text}" for name, mark in named)
    return svg(title, description, parts, _WIDTH, bottom + _BELOW)


def standalone(chart: Markup, css: str) -> str:
    """A chart as an SVG file of its own, with the page's looks and a background.

    Args:
        css: page.css.
    """
    text = str(chart)  # what follows is no more escaped
    width, height = text.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    head, _, rest = text.partition(">")
    start = head.replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    )
    font = "svg { font-family: system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }"
    return f'{start}><style>{css}{font}</style><rect class="paper" width="100%" height="100%"/>{rest}\n'


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times powers of ten that include [low, high], which are above 0: three at least, and
    those between the ends thinned to powers of ten where they are many.
    """
    first = math.floor(math.log10(low)) - 1
    ladder = [step * 10.0**power for power in range(first, first + 40) for step in (1, 2, 5)]
    start = max(index for index, value in enumerate(ladder) if value <= low * (1 + 1e-9))
    end = min(index for index, value in enumerate(ladder) if value >= high * (1 - 1e-9))
    if end - start < 2:
        start, end = max(0, start - 1), end + 1
    found = ladder[start : end + 1]
    if len(found) <= 9:
        return found
    powers = [value for value in found[1:-1] if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
    return [found[0], *powers, found[-1]]


def _legend(names: Sequence[tuple[str, str]]) -> tuple[list[Markup], float]:
    """A key and a name each, in lines; and where the plot begins below them."""
    parts, x, line = [], float(_LEFT), 0
    for name, tone in names:
        width = 30 + _LETTER * len(name)
        if x > _LEFT and x + width > _WIDTH:
            x, line = float(_LEFT), line + 1
        y = 10 + _LINE * line
        kind = f"hollow {tone}" if tone else "solid"
        parts.append(
            Markup(
                '<circle class="{}" cx="{:.1f}" cy="{}" r="4"/><text class="tick" x="{:.1f}" y="{}">{}</text>'
            ).format(kind, x + 4, y, x + 13, y + 4, name)
        )
        x += width
    return parts, 10 + _LINE * (line + 1) if names else 12.0


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    *,
    across: Scale,
    up: Scale,
    bottom: float,
    x_label: str,
) -> list[Markup]:
    lines = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{} %</text>'
        ).format(_LEFT, _WIDTH - _RIGHT, up(y), up(y), _LEFT - 5, up(y) + 4, number(y))
        for y in y_ticks
    ]
    lines += [
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
            across(math.log(x)), bottom + 15, number(x)
        )
        for x in x_ticks
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    lines.append(
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
            middle, bottom + 31, x_label
        )
    )
    return lines


def _solid(
    ours: Sequence[tuple[str, Mark]], across: Scale, up: Scale, top: float, bottom: float
) -> list[Markup]:
    """Marks with whiskers, seeds and names; those of one size side by side, names kept apart."""
    parts, places = list[Markup](), [across(math.log(mark.x)) for _, mark in ours]
    names = _spread([up(100 * mark.y) for _, mark in ours], top + 6, bottom - 4)
    for index, (name, mark) in enumerate(ours):
        near = [other for other, place in enumerate(places) if abs(place - places[index]) < _BESIDE / 2]
        half = _BESIDE * len(near) / 2
        centre = min(max(places[index], _LEFT + half), _WIDTH - _RIGHT - half)
        parts.append(_one(mark, centre - half + _BESIDE * (near.index(index) + 0.5), up))
        turned = centre + half + _LETTER * len(name) > _WIDTH
        parts.append(
            Markup('<text class="value name" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
                *(centre + (-half - 3 if turned else half + 3), names[index] + 4),
                *("end" if turned else "start", name),
            )
        )
    return parts


def _one(mark: Mark, x: float, up: Scale) -> Markup:
    drawn = []
    if interval := _clipped(mark):
        low, high = (up(100 * end) for end in interval)
        drawn.append(Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x, low, high))
    drawn += [
        Markup('<circle class="seed" cx="{:.1f}" cy="{:.1f}" r="1.8"/>').format(x + 4, up(100 * value))
        for value in mark.seeds
    ]
    drawn.append(Markup('<circle class="solid" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, up(100 * mark.y)))
    return Markup("<g><title>{}</title>{}</g>").format(mark.text, Markup("").join(drawn))


def _spread(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights in their order, pushed apart, and kept within the plot."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = [heights[index] for index in order]
    for upper, lower in pairwise(range(len(placed))):
        placed[lower] = max(placed[lower], placed[upper] + _APART)
    over = max(0.0, placed[-1] - bottom) if placed else 0.0
    placed = [max(top, y - over) for y in placed]
    result = list(heights)
    for index, y in zip(order, placed, strict=True):
        result[index] = y
    return result


def _clipped(mark: Mark) -> tuple[float, float] | None:
    """An interval without what no accuracy can be."""
    return mark.interval and (max(0.0, mark.interval[0]), min(1.0, mark.interval[1]))
