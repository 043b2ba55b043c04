"""Curves of runs that go on: what was appended since the last look is read, and drawn as on every page."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.json_rows import parse_row
from pipeline.report.compare import PANELS
from pipeline.report.curve import Curve, thinning
from pipeline.report.figures import TONES, Series, line_chart, number
from pipeline.report.training_curves import MEASURED
from pipeline.serve.below import open_below
from pipeline.train.collapse import COLLAPSED_BELOW

MOST_RUNS = len(TONES)
# Key in metrics.jsonl or timing.jsonl → title, unit, meaning; others come behind these, under their keys.
SHOWN = (
    {key: (title, "", meaning) for file in MEASURED.values() for key, (title, meaning) in file.items()}
    | {key: (title, unit, meaning) for key, title, unit, meaning in PANELS}
    | {
        "seconds": ("Seconds per step", "", ""),
        "memory_mb": ("Memory, MB", "", "the most that the first rank has used"),
        "stalled": ("Seconds that a save held the training up", "", ""),
        "written": ("Seconds that a save took", "", ""),
    }
)
FILES = ("metrics.jsonl", "timing.jsonl")
_NO_CURVES = {"checkpoint", "epoch", "step", "time"}
_COLUMNS = 256  # a chart of many, redrawn every few seconds, over a narrow line
_MOST_KEYS, _LONGEST_KEY = 48, 60  # whatever somebody has written there
_KEPT = 64  # runs
_AT_ONCE = 16 << 20  # bytes of a file that are read at a time; the rest when it is asked for again
_TOO_LARGE = 1e300


@dataclass
class RowTail:
    """A file of rows that grows, read on from where the last look ended.

    A run that went back to a checkpoint has put another file in its place: then it begins anew.
    """

    root: Path
    path: Path
    position: int = 0
    inode: int = 0

    def news(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it has begun anew, and the whole rows since then; damaged ones are left out."""
        try:
            file = open_below(self.root, self.path)
        except FileNotFoundError:
            return False, []
        with file:
            now = os.fstat(file.fileno())
            anew = now.st_ino != self.inode or now.st_size < self.position
            if anew:
                self.inode, self.position = now.st_ino, 0
            if now.st_size == self.position:
                return anew, []
            file.seek(self.position)
            data = file.read(_AT_ONCE)
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and len(data) == _AT_ONCE:
            whole = data  # no row of ours is so long: what comes behind it is shown all the same
        self.position += len(whole)
        rows = [parse_row(line) for line in whole.splitlines()]
        return anew, [row for row in rows if row is not None]


@dataclass
class RunCurves:
    """The curves of one run, by their keys, and the last value of each."""

    tails: Sequence[RowTail]
    curves: list[dict[str, Curve]] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)

    def read_on(self) -> None:
        """Take in what has come since.

        Raises:
            OSError: if a file cannot be read.
        """
        self.curves = self.curves or [{} for _ in self.tails]
        for tail, curves in zip(self.tails, self.curves, strict=True):
            anew, rows = tail.news()
            if anew:
                curves.clear()
            for row in rows:
                self._add(curves, row)

    @property
    def version(self) -> str:
        """Another one as soon as something was taken in."""
        return ",".join(f"{tail.inode}:{tail.position}" for tail in self.tails)

    def curve(self, key: str) -> Curve | None:
        """The curve of a key, if there is one."""
        return next((curves[key] for curves in self.curves if key in curves), None)

    @property
    def keys(self) -> list[str]:
        """What there are curves of."""
        return [key for curves in self.curves for key in curves]

    def _add(self, curves: dict[str, Curve], row: dict[str, Any]) -> None:
        step = row.get("step")
        if not isinstance(step, int) or not 0 <= step < 1 << 60:
            return
        for key, value in row.items():
            if key in _NO_CURVES or not isinstance(value, int | float) or not abs(value) < _TOO_LARGE:
                continue
            if key not in curves:
                if len(curves) == _MOST_KEYS or len(key) > _LONGEST_KEY:
                    continue
                curves[key] = Curve(_COLUMNS)
            self.last[key] = value
            curves[key].add(step, value)


class LiveCurves:
    """The curves of the runs that were looked at last. To be used by one thread at a time.

    Args:
        root: the folder that the runs are below.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._runs: OrderedDict[Path, RunCurves] = OrderedDict()

    def panels(self, runs: Sequence[tuple[str, Path]], *, have: str) -> dict[str, Any] | None:
        """All charts of some runs, for the page; None if they are those that it has.

        Args:
            runs: names and folders, MOST_RUNS at most.
            have: the version of what the page has.

        Raises:
            OSError: if a file cannot be read.
        """
        found = [(name, self._read(folder)) for name, folder in runs]
        version = " ".join(curves.version for _, curves in found)
        if version == have:
            return None
        keys = dict.fromkeys([*SHOWN, *sorted({key for _, curves in found for key in curves.keys})])
        there = [key for key in keys if any(curves.curve(key) for _, curves in found)]
        return {
            "version": version,
            "runs": [
                {"name": name, "tone": tone, "last": {key: number(run.last[key]) for key in run.keys}}
                for tone, (name, run) in zip(TONES, found, strict=False)
            ],
            "panels": [_panel(key, *SHOWN.get(key, (key, "", "")), runs=found) for key in there],
        }

    def _read(self, folder: Path) -> RunCurves:
        curves = self._runs.pop(folder, None) or RunCurves(
            tails=[RowTail(self._root, folder / name) for name in FILES]
        )
        curves.read_on()
        self._runs[folder] = curves
        while len(self._runs) > _KEPT:
            self._runs.popitem(last=False)
        return curves


def _panel(
    key: str, title: str, unit: str, meaning: str, *, runs: Sequence[tuple[str, RunCurves]]
) -> dict[str, Any]:
    curves = {name: curve for name, run in runs if (curve := run.curve(key)) is not None}
    tones = {name: tone for tone, (name, _) in zip(TONES, runs, strict=False)}
    if key in COLLAPSED_BELOW:
        below = f"below {COLLAPSED_BELOW[key]:.2g}, dotted, it has collapsed"
        meaning = f"{meaning}; {below}" if meaning else below
    chart = line_chart(
        [
            Series(name=name, x=curve.drawn[0], y=curve.drawn[1], tone=tones[name])
            for name, curve in curves.items()
        ],
        title=title,
        x_label="step",
        unit=unit,
        floor=COLLAPSED_BELOW.get(key),
        doubling=key == "rankme",  # from tens down to 1: what matters is at the low end
    )
    return {"key": key, "title": title, "meaning": meaning + thinning(curves.values()), "chart": str(chart)}
