"""Curves of any number of points, in the memory and on the page of those that a screen can show."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from cluster.json_rows import read_rows

COLUMNS = 1024  # that a chart has at most: it is about half as many pixels wide
MOST = 4 * COLUMNS  # points of such a curve that is drawn as it is
MOST_CURVES = 64  # of a file: whoever has written it
_TOO_LARGE = 1e300  # for arithmetic; no number that is not finite is smaller


class Curve:
    """Values over steps, which come in order; of very many those that make the picture.

    A curve of more than four points for each column is divided into columns, each as many steps wide, and of
    every column the first, lowest, highest and last point are kept, as they are ("M4", Jugel et al., 2014,
    https://doi.org/10.14778/2732951.2732953): no spike is lost, and lines between columns run as before.
    Widths are powers of two, so that what is kept depends on the points alone, not on when it was thinned.

    Args:
        columns: the most that there are.

    Attributes:
        points: how many there were.
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self._columns, self._most = columns, 4 * columns
        self._steps: list[int] = []
        self._values: list[float] = []
        self._width = 1
        self.points = 0

    @property
    def width(self) -> int | None:
        """Of a column, in steps; None if every point is drawn."""
        if self.points <= self._most:
            return None
        self._thin()
        return self._width

    @property
    def drawn(self) -> tuple[list[int], list[float]]:
        """Steps and values of the points to draw, four times as many as columns at most."""
        if self.points > self._most:
            self._thin()
        return self._steps, self._values

    def add(self, step: int, value: float) -> None:
        """Add the next point."""
        self._steps.append(step)
        self._values.append(value)
        self.points += 1
        if len(self._steps) >= 4 * self._most:
            self._thin()

    def _thin(self) -> None:
        steps, values = np.array(self._steps), np.array(self._values)
        while steps[-1] // self._width - steps[0] // self._width >= self._columns:
            self._width *= 2
        column = steps // self._width
        first = np.flatnonzero(np.diff(column, prepend=column[0] - 1))
        last = np.append(first[1:], len(steps)) - 1
        by_value = np.lexsort((values, column))  # within each column, which stays where it is
        kept = np.unique(np.concatenate([first, by_value[first], by_value[last], last]))
        self._steps, self._values = steps[kept].tolist(), values[kept].tolist()


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, int | float]]]:
    """The rows of a file from its start: the step of each, and what of it can be drawn; none if there is no
    file yet.

    Raises:
        UserError: if a row is damaged, or has no step.
    """
    for row in read_rows(path) if path.is_file() else ():
        values = {k: v for k, v in row.items() if isinstance(v, int | float) and abs(v) < _TOO_LARGE}
        step = values.get("step")
        if not isinstance(step, int):
            raise UserError(f"{path} is damaged: a row of it has no step; remove that line")
        yield step, values


def read_curves(path: Path, keys: Collection[str] | None = None) -> dict[str, Curve]:
    """The curves of these keys of a file of rows, or of all that are there, of those values that
    were finite.
    """
    curves = {key: Curve() for key in keys or ()}
    for step, values in numbered_rows(path):
        for key, value in values.items():
            if keys is None and len(curves) < MOST_CURVES:
                curves.setdefault(key, Curve())
            if key in curves:
                curves[key].add(step, value)
    return curves


def thinning(curves: Iterable[Curve]) -> str:
    """What to say below a chart of these curves; nothing if every point is drawn."""
    widths = [curve.width for curve in curves if curve.width is not None]
    if not widths:
        return ""
    return f"; thinned to the first, lowest, highest and last value of every {max(widths):,} steps"
