"""What a chart's lines are worth at a step: the nearest point of each, and nothing where a line is not."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from pipeline.report.figures import Series, line_chart
from pipeline.report.readings import COLUMNS


def labels(*series: Series, unit: str = "") -> list[str]:
    chart = str(line_chart(series, title="<Loss>", x_label="step", unit=unit))
    return [
        column.attrib["aria-label"] for column in ElementTree.fromstring(well_formed(chart)).iter("input")
    ]


def well_formed(chart: str) -> str:
    return re.sub(r"(<input[^>]*)>", r"\1/>", chart)


def test_each_column_says_the_step_and_the_value_that_every_run_has_there() -> None:
    one = Series(name="a", x=[10, 20, 1500], y=[0.51239, 1e-5, 12345.6])
    assert labels(one, unit=" %") == ["step 10: 0.5124 %", "step 20: 1e-05 %", "step 1,500: 12,346 %"]
    other = Series(name="<b>", x=[12, 19], y=[7.0, 8.0], tone="t2")
    assert labels(one, other) == [
        "step 10: 0.5124 a",
        "step 12: 0.5124 a, 7 <b>",
        "step 19: 1e-05 a, 8 <b>",
        "step 20: 1e-05 a",
        "step 1,500: 12,346 a",
    ]


def test_of_many_points_there_are_columns_from_the_first_to_the_last_that_fill_the_chart() -> None:
    steps = range(5, 5000, 5)
    chart = str(line_chart([Series(name="a", x=steps, y=[x / 2 for x in steps])], title="t", x_label="step"))
    columns = [*ElementTree.fromstring(well_formed(chart)).iter("foreignObject")]
    assert len(columns) == COLUMNS
    told = [re.findall(r"[\d.]+", column[0].attrib["aria-label"].replace(",", "")) for column in columns]
    assert told[0] == ["5", "2.5"] and told[-1] == ["4995", "2498"]
    ends = [float(column.attrib["x"]) + float(column.attrib["width"]) for column in columns]
    starts = [float(column.attrib["x"]) for column in columns]
    assert all(abs(end - start) < 0.11 for end, start in zip(ends, starts[1:], strict=False))
