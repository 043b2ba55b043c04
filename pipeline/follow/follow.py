"""A run told to a tracker of others while it goes on, from outside: its files are read, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.file_lock import holder, lock_file
from cluster.json_rows import Row, read_rows
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.small_file import read_small
from cluster.typed_yaml import read_yaml
from pipeline.follow.rows import Rows, Sent

# Times first: they date the metrics of the same step.
FILES = ("timing.jsonl", "metrics.jsonl")
POLL_SECONDS = 10.0
_AT_ONCE = 500  # rows
_NAME = re.compile(r"[A-Za-z0-9_./ -]{1,250}")  # of a number that every tracker takes


@dataclass(frozen=True, kw_only=True)
class Point:
    """Numbers of a step, by name; `time` is in seconds since the epoch."""

    step: int
    time: float
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A tracker's own record of a run: what it is called there, and what the tracker is to know of the run
    besides its numbers.
    """

    id: str
    name: str
    facts: dict[str, str]


class Tracker(Protocol):
    """Where a run is told of. Each takes what is new, and may be given the same once more."""

    @property
    def place(self) -> str:
        """Which tracker, and where in it: with another one a run is told from its start."""

    def new_id(self, name: str) -> str:
        """A record for a run that it does not know yet."""

    def open(self, remote: Remote) -> None:
        """Begin, or go on, with a record.

        Raises:
            UserError: if it does not answer, or has no such record any more.
        """

    def recipe(self, values: dict[str, Any]) -> None:
        """Dotted keys of the recipe; some may have changed since the last time."""

    def send(self, points: Sequence[Point]) -> None:
        """Numbers, in the order of the files."""

    def end(self, state: str, why: str) -> None:
        """The run has ended."""

    def close(self) -> None:
        """Bring all to its place, whether the run has ended or not."""


def follow(
    run: RunFolder,
    tracker: Tracker,
    *,
    status: Callable[[RunFolder], Status],
    why: Callable[[Status], str],
    once: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Tell a tracker of a run until it ends, from where an earlier call has stopped.

    Args:
        once: what is there now, and no more.

    Returns:
        How many rows were new.

    Raises:
        UserError: if the run is followed to that place already, has not begun, or the tracker refuses.
    """
    identity = _identity(run, status=status, once=once, wait=wait)
    with ExitStack() as stack:
        place = _record(run, f"{identity}\n{tracker.place}")
        lock = stack.enter_context((place / "lock").open("a+"))
        if not lock_file(lock, place / "lock"):
            raise UserError(
                f"{run.path} is being followed to {tracker.place} already{holder(place / 'lock')}"
            )
        files = {name: (Rows(run.path / name), Sent(place / name)) for name in FILES}
        for rows, sent in files.values():
            stack.callback(rows.close)
            stack.callback(sent.close)
        tracker.open(_remote(run, place, tracker))
        stack.callback(tracker.close)
        told, recipe, times = 0, None, dict[int, float]()
        while True:
            now = status(run)  # asked before reading: what is written last is sent, too
            if (found := _recipe(run)) != recipe:
                tracker.recipe(found)
                recipe = found
            for rows, sent in files.values():
                told += _tell(rows, sent, tracker, times)
            if now.state.ended:
                tracker.end(now.state, why(now))
            if now.state.ended or once:
                return told
            wait(POLL_SECONDS)


def _tell(rows: Rows, sent: Sent, tracker: Tracker, times: dict[int, float]) -> int:
    """Send what is new of a file; what was sent is noted only then, so that nothing is lost."""
    told, lines, points = 0, list[bytes](), list[Point]()

    def flush() -> None:
        if points:
            tracker.send(points)
        sent.add(lines)
        lines.clear()
        points.clear()

    for line in rows.new():
        row = sent.lacks(line)
        if row is None:
            continue
        told += 1
        lines.append(line)
        if (point := _point(row, times)).values:
            points.append(point)
        if len(lines) == _AT_ONCE:
            flush()
    flush()
    return told


def _point(row: Row, times: dict[int, float]) -> Point:
    step, at = int(row["step"]), row.get("time")
    if isinstance(at, int | float):
        times[step] = float(at)
    values = {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "time") and _NAME.fullmatch(key)
    }
    return Point(step=step, time=times.get(step, time.time()), values=values)


def flattened(tree: Any, key: str = "") -> dict[str, Any]:
    """Dotted key → plain value of a recipe: sections by their names, those of a list by their numbers."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(index): item for index, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {key: json.dumps(tree) if isinstance(tree, list) else tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flattened(value, f"{key}.{name}" if key else str(name))
    return found


def _recipe(run: RunFolder) -> dict[str, Any]:
    path = run.path / "recipe.yaml"
    return flattened(read_yaml(path)) if path.is_file() else {}


def _identity(
    run: RunFolder, *, status: Callable[[RunFolder], Status], once: bool, wait: Callable[[float], None]
) -> str:
    """What tells a run from another one that is in its folder later: its first attempt, once it has begun."""
    path = run.path / "attempts.jsonl"
    while True:
        first = next(read_rows(path), None) if path.is_file() else None
        if first is not None:
            return json.dumps(first, sort_keys=True)
        if once or status(run).state.ended:
            raise UserError(f"{run.path} has not begun: there is nothing to send")
        wait(POLL_SECONDS)


def _record(run: RunFolder, identity: str) -> Path:
    """Where it is noted what was sent: with whoever sends it, for the run may be another's."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = hashlib.sha256(f"{run.path.resolve()}\n{identity}".encode()).hexdigest()[:16]
    place = state / "submit" / "follow" / name
    place.mkdir(parents=True, exist_ok=True)
    return place


def _remote(run: RunFolder, place: Path, tracker: Tracker) -> Remote:
    name = run.path.resolve().name
    path = place / "remote"
    if path.is_file():
        found = read_small(path).decode().strip()
    else:
        found = tracker.new_id(name)
        write_atomically(path, f"{found}\n")
    return Remote(id=found, name=name, facts={"folder": str(run.path.resolve())})
