"""A picture of a graph and of how far it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cluster.atomic_file import write_atomically
from pipeline.dag.progress import Row, StageState

COLOURS = {
    StageState.FINISHED: "#b7dfb9",
    StageState.RUNNING: "#a9cdf2",
    StageState.QUEUED: "#dbe7f5",
    StageState.FAILED: "#f2b3ab",
    StageState.CANCELLED: "#f7dcd7",
    StageState.STALE: "#f5dfa6",
    StageState.MISSING: "#eeeeee",
}


_COLUMN, _LINE, _WIDTH, _HEIGHT, _MARGIN = 250, 64, 190, 42, 14  # pixels
_CHARACTER = 0.6  # of its size is as wide as a character is, about


@dataclass(frozen=True, kw_only=True)
class Box:
    """One stage of a picture.

    Attributes:
        key: names it among the others.
        name, words: what stands in it.
        sources: keys of those that it was made from, which come before it.
    """

    key: str
    name: str
    state: StageState
    words: str
    sources: Sequence[str]


def draw_progress(rows: Sequence[Row], path: Path) -> None:
    """The graph from left to right, as an SVG file: a box per stage, in the colour of its state."""
    boxes = [
        Box(
            key=row.stage.name,
            name=row.stage.name,
            state=row.state,
            words=" ".join(filter(None, [row.state, row.detail])),
            sources=row.stage.sources,
        )
        for row in rows
    ]
    drawn, width, legend_y = draw_boxes(boxes)
    shown = [state for state in StageState if any(row.state is state for row in rows)]
    legend = [_legend(state, _MARGIN + 110 * number, legend_y) for number, state in enumerate(shown)]
    width = max(width, 110 * len(shown) + _MARGIN)
    picture = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {legend_y + 30:.0f}" '
        f'width="{width:.0f}" font-family="sans-serif" text-anchor="middle">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *(drawn + legend),
        "</svg>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(picture))


def draw_boxes(boxes: Sequence[Box]) -> tuple[list[str], float, float]:
    """Boxes and the arrows between them, as elements of an SVG; and the width and height that they take."""
    sources = {box.key: frozenset(box.sources) for box in boxes}
    places = {
        key: (_MARGIN + _COLUMN * column, _MARGIN + _LINE * line)
        for key, (column, line) in _places(sources).items()
    }
    behind: dict[str, frozenset[str]] = {}
    for key, before in sources.items():  # inputs come first
        behind[key] = before.union(*(behind[source] for source in before))
    arrows = [
        _arrow(places[source], places[key])
        for key, before in sources.items()
        # Without those that another source already stands behind: the picture shows the order, not every use.
        for source in sorted(before.difference(*(behind[source] for source in before)))
    ]
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#888"/></marker>'
    )
    width = max(x + _WIDTH for x, _ in places.values()) + _MARGIN
    height = max(y for _, y in places.values()) + _LINE
    return [tip, *arrows, *(_box(box, places[box.key]) for box in boxes)], width, height


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    middle = _HEIGHT / 2
    return (
        f'<path d="M{start[0] + _WIDTH:.0f} {start[1] + middle:.0f} {end[0]:.0f} {end[1] + middle:.0f}" '
        'stroke="#888" marker-end="url(#tip)"/>'
    )


def _box(box: Box, place: tuple[float, float]) -> str:
    x, y = place
    middle = x + _WIDTH / 2
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" '
        f'fill="{COLOURS[box.state]}" stroke="#555"/>'
        f"{_text(box.name, middle, y + 18, size=13)}{_text(box.words, middle, y + 34, size=10)}"
    )


def _text(text: str, x: float, y: float, *, size: int) -> str:
    """In the middle of a box, pressed together where it would not fit into it."""
    room = _WIDTH - 12
    fits = len(text) * size * _CHARACTER <= room
    pressed = "" if fits else f' textLength="{room}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{pressed}>{escape(text)}</text>'


def _legend(state: StageState, x: float, y: float) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="16" height="16" fill="{COLOURS[state]}" stroke="#555"/>'
        f'<text x="{x + 22:.0f}" y="{y + 12:.0f}" font-size="12" text-anchor="start">{state}</text>'
    )


def _places(sources: Mapping[str, Collection[str]]) -> dict[str, tuple[int, float]]:
    """Column and line of each box: to the right of its sources, near the middle of their lines."""
    columns: dict[str, int] = {}
    for key, before in sources.items():  # inputs come first
        columns[key] = 1 + max((columns[source] for source in before), default=-1)
    lines: dict[str, float] = {}
    for column in range(1 + max(columns.values())):
        members = [key for key in sources if columns[key] == column]
        wishes = {
            key: _mean([lines[source] for source in sources[key]], default=float(index))
            for index, key in enumerate(members)
        }
        free = -math.inf
        for key in sorted(members, key=wishes.__getitem__):
            lines[key] = max(wishes[key], free)
            free = lines[key] + 1
        # As much above the middle as below: a fan of stages opens around its source.
        shift = _mean([wishes[key] - lines[key] for key in members], default=0.0)
        for key in members:
            lines[key] += shift
    top = min(lines.values())
    return {key: (columns[key], line - top) for key, line in lines.items()}


def _mean(values: Sequence[float], *, default: float) -> float:
    return sum(values) / len(values) if values else default
