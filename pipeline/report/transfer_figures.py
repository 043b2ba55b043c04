"""Figures 1 and 2: fine-tuned accuracy against size, and against supervision, beside published values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from cluster.atomic_file import write_atomically
from pipeline.dag.stage import Input
from pipeline.recipe.stages import FiguresRecipe
from pipeline.report.comparable import TOP1, differences
from pipeline.report.page import environment
from pipeline.report.published_imagenet import CLAIMS, ERAS, TEST_SET, Claim, Era, Point
from pipeline.report.scatter import Mark, Trace, scatter_chart, standalone
from pipeline.report.tuned_rows import Row, read_rows


class Axis(NamedTuple):
    """One meaning of size."""

    key: str
    choice: str
    label: str
    published: Callable[[Point], float | None]
    ours: Callable[[Row], float | None]


AXES = (
    Axis(
        "parameters",
        "parameters",
        "parameters, millions",
        lambda p: p.parameters,
        lambda r: r.parameters / 1e6,
    ),
    Axis("gmac", "multiply-adds", "GMAC per test image", lambda p: p.gmac, lambda r: r.gmac),
    Axis("gpu_hours", "GPU-hours", "GPU-hours, all training", lambda p: p.gpu_hours, lambda r: r.gpu_hours),
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart of Figure 1, by each axis.

    Attributes:
        key: of its files.
        charts: axis → chart.
        drawn: axes that have points.
    """

    key: str
    title: str
    note: str
    era: Era | None
    charts: dict[str, Markup]
    drawn: tuple[str, ...]


class Verdict(NamedTuple):
    """Rows of ours against a published one: those that differ from it in the same."""

    names: list[str]
    differs: list[str]
    ahead: dict[str, float]  # name → points, of those that differ in nothing


def write_figures(inputs: Mapping[str, Input], recipe: FiguresRecipe, out: Path) -> dict[str, Any]:
    """Write figures.html, figures.json, and charts/ with an SVG file for each chart.

    Args:
        inputs: role → fine-tuning, or linear probe of the same trunk; roles that differ in a trailing _seedN
            only are one row.

    Returns:
        `top1_{name}` of each row, and how many pairs of a published row and one of ours are `comparable`.

    Raises:
        UserError: if the inputs are something else, or make no row.
    """
    rows = read_rows(inputs, curated=recipe.curated)
    panels = figure_1(rows)
    verdicts = {title: [verdict(claim, rows) for claim in claims] for title, claims in CLAIMS.items()}
    made = environment()
    css = made.get_template("page.css").render()
    (out / "charts").mkdir(parents=True, exist_ok=True)
    for stale in (out / "charts").iterdir():
        stale.unlink()
    for panel in panels:
        for axis in panel.drawn:
            write_atomically(out / "charts" / f"{panel.key}-{axis}.svg", standalone(panel.charts[axis], css))
    page = made.get_template("figures.html").render(
        title=recipe.title,
        axes=AXES,
        panels=panels,
        rows=rows,
        ours=_by_test(rows),
        groups=[(title, list(zip(claims, verdicts[title], strict=True))) for title, claims in CLAIMS.items()],
        sources=_sources(),
    )
    write_atomically(out / "figures.html", page)
    comparable = sum(
        len(each.ahead) for of_group in verdicts.values() for found in of_group for each in found
    )
    write_atomically(out / "figures.json", json.dumps(_as_json(rows, verdicts), indent=2) + "\n")
    return {f"top1_{row.name}": row.top1 for row in rows} | {"comparable": comparable}


def figure_1(rows: Sequence[Row]) -> list[Panel]:
    """A chart for each year of published values, with ours that were tested alike; and for each other test
    set or size of images, ours alone.
    """
    left = list(rows)
    panels = []
    for era in ERAS:
        here = [row for row in left if (row.setup.test_set, row.setup.px) == (TEST_SET, era.px)]
        here = [row for row in here if row.setup.metric == TOP1]
        left = [row for row in left if row not in here]
        note = "" if here else "None of ours was tested like this."
        panels.append(_panel(era.name, era.title, note, era, here))
    for (images, classes, metric), tested in _by_test(left).items():
        for px in dict.fromkeys(row.setup.px for row in tested):
            number = len(panels) - len(ERAS) + 1
            title = f"Here: {images:,} images of {classes:,} classes, {px} px"
            note = "Another test than that of the published values, which are not in this chart."
            if metric != TOP1:
                note = f"Accuracy is {metric}. {note}"
            here = [row for row in tested if row.setup.px == px]
            panels.append(_panel(f"here-{number}", title, note, None, here))
    return panels


def _by_test(rows: Sequence[Row]) -> dict[tuple[int, int, str], list[Row]]:
    """Images and classes of a test set, and what was counted → rows, in their order."""
    found: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((*row.setup.test_set, row.setup.metric), []).append(row)
    return found


def _panel(key: str, title: str, note: str, era: Era | None, rows: Sequence[Row]) -> Panel:
    charts, drawn = {}, []
    for axis in AXES:
        traces = [
            Trace(name=family.name, tone=family.tone, marks=marks)
            for family in (era.families if era else ())
            if (
                marks := [
                    Mark(x=x, y=point.top1, text=_of_point(point, family.name, family.source.name, era))
                    for point in family.points
                    if era is not None and (x := axis.published(point)) is not None
                ]
            )
        ]
        ours = [(row.name, _mark(row, x)) for row in rows if (x := axis.ours(row)) is not None]
        charts[axis.key] = scatter_chart(traces, ours, title=f"Top-1, {title}", x_label=axis.label)
        drawn += [axis.key] if traces or ours else []
    return Panel(key=key, title=title, note=note, era=era, charts=charts, drawn=tuple(drawn))


def _of_point(point: Point, family: str, source: str, era: Era) -> str:
    name = f"{family} {point.model}".strip()
    size = f"{point.parameters:,.0f}" if point.parameters >= 1000 else f"{point.parameters:.4g}"
    note = f"; {point.note}" if point.note else ""
    return f"{name}: {100 * point.top1:.4g} %, {size} M parameters, {era.resolution}; {source}{note}"


def _mark(row: Row, x: float) -> Mark:
    low, high = (100 * end for end in (row.interval.low, row.interval.high))
    seeds = f"{len(row.scores)} seeds" if len(row.scores) > 1 else "one seed"
    text = (
        f"{row.name}: {100 * row.top1:.1f} % ({low:.1f} to {high:.1f}), {seeds}, {row.architecture}, "
        f"{row.parameters / 1e6:,.4g} M parameters, {row.setup.px} px"
    )
    return Mark(
        x=x,
        y=row.top1,
        text=text,
        interval=(row.interval.low, row.interval.high),
        seeds=row.scores if len(row.scores) > 1 else (),
    )


def verdict(claim: Claim, rows: Sequence[Row]) -> list[Verdict]:
    """Whether ours can be held against a published row, and in what they differ otherwise."""
    found: dict[tuple[str, ...], Verdict] = {}
    for row in rows:
        differ = differences(row.setup, claim.setup)
        of_these = found.setdefault(tuple(differ), Verdict([], differ, {}))
        of_these.names.append(row.name)
        if not differ:
            of_these.ahead[row.name] = 100 * (row.top1 - claim.top1)
    return list(found.values())


def _sources() -> list[Any]:
    families = [family.source for era in ERAS for family in era.families]
    return list(dict.fromkeys([*families, *(claim.source for claims in CLAIMS.values() for claim in claims)]))


def _as_json(rows: Sequence[Row], verdicts: Mapping[str, Sequence[Sequence[Verdict]]]) -> dict[str, Any]:
    """All that the page shows, as plain values; accuracies are fractions."""
    return {
        "ours": [asdict(row) for row in rows],
        "figure_1": [asdict(era) for era in ERAS],
        "figure_2": [
            asdict(claim) | {"comparable": [each._asdict() for each in found]}
            for title, claims in CLAIMS.items()
            for claim, found in zip(claims, verdicts[title], strict=True)
        ],
    }
