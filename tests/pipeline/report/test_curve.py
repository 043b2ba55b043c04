"""Curves that are thinned to what a screen shows."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis.strategies import floats, integers, lists, tuples

from pipeline.report.curve import COLUMNS, MOST, Curve, thinning


def made(points: list[tuple[int, float]], columns: int = COLUMNS) -> Curve:
    line = Curve(columns)
    for step, value in points:
        line.add(step, value)
    return line


@given(
    gaps=lists(tuples(integers(0, 40), floats(-9, 9)), max_size=400),
    start=integers(0, 10_000),
)
def test_each_column_keeps_its_first_lowest_highest_and_last_point(
    gaps: list[tuple[int, float]], start: int
) -> None:
    points = []
    for gap, value in gaps:
        start += gap
        points.append((start, value))
    line = made(points, columns=4)
    drawn, width = list(zip(*line.drawn, strict=True)), line.width
    if len(points) <= 16:
        assert (drawn, width) == (points, None)
        return
    assert width is not None
    assert len(drawn) <= 16
    wanted = []
    for _, column in groupby(enumerate(points), key=lambda each: each[1][0] // width):
        inside = list(column)
        low, high = min(y for _, (_, y) in inside), max(y for _, (_, y) in inside)
        first_low = next(n for n, (_, y) in inside if y == low)
        last_high = next(n for n, (_, y) in reversed(inside) if y == high)
        wanted += sorted({inside[0][0], first_low, last_high, inside[-1][0]})
    assert drawn == [points[n] for n in wanted]


def test_a_long_curve_holds_those_that_are_drawn_and_says_so() -> None:
    line = Curve()
    most_held = 0
    for step in range(100, 100 * 60_000, 100):
        line.add(step, 9.0 if step == 1_234_500 else 1 / step)
        most_held = max(most_held, len(line._steps))
    assert most_held <= 4 * MOST
    assert len(line.drawn[0]) <= MOST
    assert line.points == 59_999
    assert (1_234_500, 9.0) in zip(*line.drawn, strict=True)
    assert line.drawn[0][0] == 100 and line.drawn[0][-1] == 5_999_900
    whole = made([(step, 1.0) for step in range(MOST)])
    assert thinning([whole]) == ""
    assert thinning([whole, line]) == (
        "; thinned to the first, lowest, highest and last value of every 8,192 steps"
    )
