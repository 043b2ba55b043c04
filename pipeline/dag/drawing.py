"""A picture of a graph and of how far it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cluster.atomic_file import write_atomically
from pipeline.dag.progress import Row, StageState
from pipeline.dag.stage import Stage

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


def draw_progress(rows: Sequence[Row], path: Path) -> None:
    """The graph from left to right, as an SVG file: a box per stage, in the colour of its state."""
    places = {
        name: (_MARGIN + _COLUMN * column, _MARGIN + _LINE * line)
        for name, (column, line) in _places(rows).items()
    }
    arrows = [
        _arrow(places[source], places[row.stage.name]) for row in rows for source in _drawn_sources(row.stage)
    ]
    boxes = [_box(row, places[row.stage.name]) for row in rows]
    shown = [state for state in StageState if any(row.state is state for row in rows)]
    legend_y = max(y for _, y in places.values()) + _LINE
    legend = [_legend(state, _MARGIN + 110 * number, legend_y) for number, state in enumerate(shown)]
    width = max(*(x + _WIDTH for x, _ in places.values()), 110 * len(shown)) + _MARGIN
    picture = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {legend_y + 30:.0f}" '
        f'width="{width:.0f}" font-family="sans-serif" text-anchor="middle">',
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#888"/></marker>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *(arrows + boxes + legend),
        "</svg>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(picture))


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    middle = _HEIGHT / 2
    return (
        f'<path d="M{start[0] + _WIDTH:.0f} {start[1] + middle:.0f} {end[0]:.0f} {end[1] + middle:.0f}" '
        'stroke="#888" marker-end="url(#tip)"/>'
    )


def _box(row: Row, place: tuple[float, float]) -> str:
    x, y = place
    words = escape(" ".join(filter(None, [row.state, row.detail])))
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" '
        f'fill="{COLOURS[row.state]}" stroke="#555"/>'
        f'<text x="{x + _WIDTH / 2:.0f}" y="{y + 18:.0f}" font-size="13">{escape(row.stage.name)}</text>'
        f'<text x="{x + _WIDTH / 2:.0f}" y="{y + 34:.0f}" font-size="10">{words}</text>'
    )


def _legend(state: StageState, x: float, y: float) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="16" height="16" fill="{COLOURS[state]}" stroke="#555"/>'
        f'<text x="{x + 22:.0f}" y="{y + 12:.0f}" font-size="12" text-anchor="start">{state}</text>'
    )


def _places(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Column and line of each stage: to the right of its inputs, near the middle of their lines."""
    columns: dict[str, int] = {}
    for row in rows:  # inputs come first
        columns[row.stage.name] = 1 + max((columns[source] for source in row.stage.sources), default=-1)
    lines: dict[str, float] = {}
    for column in range(1 + max(columns.values())):
        members = [row.stage for row in rows if columns[row.stage.name] == column]
        wishes = {
            stage.name: _mean([lines[source] for source in stage.sources], default=float(index))
            for index, stage in enumerate(members)
        }
        free = -math.inf
        for stage in sorted(members, key=lambda stage: wishes[stage.name]):
            lines[stage.name] = max(wishes[stage.name], free)
            free = lines[stage.name] + 1
        # As much above the middle as below: a fan of stages opens around its source.
        shift = _mean([wishes[s.name] - lines[s.name] for s in members], default=0.0)
        for stage in members:
            lines[stage.name] += shift
    top = min(lines.values())
    return {name: (columns[name], line - top) for name, line in lines.items()}


def _mean(values: Sequence[float], *, default: float) -> float:
    return sum(values) / len(values) if values else default


def _drawn_sources(stage: Stage) -> list[str]:
    """Without those that another source already stands behind: the picture shows the order, not every use."""
    sources = {source.stage.name: source.stage for source in stage.inputs.values()}
    behind = set().union(*(_ancestors(source) for source in sources.values()))
    return sorted(sources.keys() - behind)


def _ancestors(stage: Stage) -> set[str]:
    sources = [source.stage for source in stage.inputs.values()]
    return {source.name for source in sources}.union(*(_ancestors(source) for source in sources))
