"""A picture of a graph and of how far it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.dag.progress import Progress, Row, _sources
from pipeline.dag.stage import Stage

COLOURS = {
    Progress.FINISHED: "#b7dfb9",
    Progress.RUNNING: "#a9cdf2",
    Progress.QUEUED: "#dbe7f5",
    Progress.FAILED: "#f2b3ab",
    Progress.CANCELLED: "#f7dcd7",
    Progress.STALE: "#f5dfa6",
    Progress.MISSING: "#eeeeee",
}


def draw_plan(rows: Sequence[Row], path: Path) -> None:
    """The graph from left to right, as an SVG file: a box per stage, in the colour of its state."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Patch

    places = _places(rows)
    columns = 1 + max(x for x, _ in places.values())
    height = 1 + max(y for _, y in places.values())
    figure = Figure(figsize=(2.3 * columns, 0.75 * height + 0.6), layout="tight")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.1, columns - 0.1), ylim=(-height + 0.4, 0.6))
    axes.set_axis_off()
    for row in rows:
        x, y = places[row.stage.name]
        for source in _drawn_sources(row.stage):
            start_x, start_y = places[source]
            axes.annotate(
                "",
                xy=(x, -y),
                xytext=(start_x + 0.75, -start_y),
                zorder=0,
                arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 0, "shrinkB": 0},
            )
    for row in rows:
        x, y = places[row.stage.name]
        axes.add_patch(
            FancyBboxPatch(
                (x + 0.04, -y - 0.24),
                0.67,
                0.48,
                boxstyle="round,pad=0.04",
                facecolor=COLOURS[row.progress],
                edgecolor="#555555",
            )
        )
        axes.text(
            x + 0.375, -y + 0.07, row.stage.name, ha="center", va="center", fontsize=8, parse_math=False
        )
        words = " ".join(filter(None, [row.progress, row.detail]))
        axes.text(x + 0.375, -y - 0.13, words, ha="center", va="center", fontsize=6, parse_math=False)
    shown = [progress for progress in Progress if any(row.progress is progress for row in rows)]
    patches = [Patch(facecolor=COLOURS[progress], edgecolor="#555555", label=progress) for progress in shown]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, 0), ncols=len(patches), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg")


def _places(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Column and line of each stage: to the right of its inputs, near the middle of their lines."""
    columns: dict[str, int] = {}
    for row in rows:  # inputs come first
        columns[row.stage.name] = 1 + max((columns[source] for source in _sources(row.stage)), default=-1)
    lines: dict[str, float] = {}
    for column in range(1 + max(columns.values())):
        members = [row.stage for row in rows if columns[row.stage.name] == column]
        wishes = {
            stage.name: _mean([lines[source] for source in _sources(stage)], default=float(index))
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
