"""All runs of a folder, read again where something has changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder, each_once, list_runs
from cluster.run.status import Status, in_words
from pipeline.serve.asked import ask
from pipeline.train.look import UNREADABLE, look_at, name_in

ASK_AGAIN = 30.0  # seconds, after which SLURM and Ray are asked again; at least

Stamp = tuple[int, int, int] | None
Asker = Callable[[Sequence[RunFolder]], dict[Path, Status]]


def path_id(path: Path) -> str:
    """By which a browser names a path: what it sends is looked up, and never opened."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:20]


def stamp(path: Path) -> Stamp:
    """What changes whenever a file does; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


@dataclass
class Entry:
    """One run as it was last looked at.

    Attributes:
        version: of the list, at which it came to be so.
        seen: what of its folder was looked at.
        ended: nothing of it changes any more, but with status.json.
    """

    run: RunFolder
    known: dict[str, Any]
    version: int = 0
    seen: Stamp = None
    ended: bool = False


@dataclass
class RunList:
    """The runs below a folder. To be looked at by one thread at a time.

    Attributes:
        folder: where they are.
        ask: what SLURM and Ray say of runs; once for all of them, every ASK_AGAIN seconds.
        entries: id → run, in the order of their names.
        version: rises with every change; of a list that was made later it is higher.
    """

    folder: Path
    ask: Asker = ask
    entries: dict[str, Entry] = field(default_factory=dict)
    version: int = field(default_factory=lambda: int(1000 * time.time()))
    _asked: dict[Path, tuple[Stamp, Status]] = field(default_factory=dict)
    _ask_at: float = 0.0

    def look(self) -> RunList:
        """Look again."""
        runs = {path_id(run.path): run for run in (*list_runs(self.folder), *self._jobs())}
        self._ask_elsewhere(runs)
        version = self.version + 1
        entries = {known_as: self._entry(known_as, run, version) for known_as, run in runs.items()}
        if list(entries) != list(self.entries) or any(e.version == version for e in entries.values()):
            self.version = version
        self.entries = entries
        return self

    def since(self, version: int) -> dict[str, Any]:
        """What has changed since a version of the list, for the page: all of it since 0. A run that is not in
        the order any more is gone.
        """
        return {
            "version": self.version,
            "runs": [
                {"id": known_as, **in_short(entry.known)}
                for known_as, entry in list(self.entries.items())
                if entry.version > version
            ],
            "order": list(self.entries) if self.version > version else None,
        }

    def _jobs(self) -> list[RunFolder]:
        """The jobs of graphs' stages, which lie one folder deeper."""
        found = [path.parent for path in self.folder.glob("*/jobs/*/status.json")]
        return [RunFolder(path) for path in each_once(self.folder, found)]

    def _entry(self, known_as: str, run: RunFolder, version: int) -> Entry:
        before = self.entries.get(known_as)
        seen = stamp(run.path / "status.json")
        if before is not None and before.ended and before.seen == seen:
            return before
        known = look_at(run, name_in(self.folder, run), self._status)
        known.pop("set_aside", None)
        ended = known["state"] != UNREADABLE and State(known["state"]).ended
        unchanged = before is not None and _lasting(before.known) == _lasting(known)
        return Entry(run, known, before.version if before and unchanged else version, seen, ended)

    def _status(self, run: RunFolder) -> Status:
        status = run.read_status()
        if status.state.ended:
            return status
        if status.executor == "local":
            return run.status()
        seen, asked = self._asked.get(run.path, (None, status))
        return asked if seen == stamp(run.path / "status.json") else status

    def _ask_elsewhere(self, runs: dict[str, RunFolder]) -> None:
        if time.monotonic() < self._ask_at:
            return
        going_on = []
        for known_as, run in runs.items():
            before = self.entries.get(known_as)
            if before is not None and before.ended and before.seen == stamp(run.path / "status.json"):
                continue
            try:
                status = run.read_status()
            except UserError:  # it is told of where it is looked at
                continue
            if not status.state.ended and status.executor != "local":
                going_on.append((run, stamp(run.path / "status.json")))
        seen = {run.path: before for run, before in going_on}
        answers = self.ask([run for run, _ in going_on]) if going_on else {}
        self._asked = {path: (seen[path], status) for path, status in answers.items() if path in seen}
        self._ask_at = time.monotonic() + ASK_AGAIN


def in_short(known: dict[str, Any]) -> dict[str, Any]:
    """A run in a row of the list."""
    if known["state"] == UNREADABLE:
        return {"name": known["run"], "state": UNREADABLE, "words": UNREADABLE, "why": known["why"]}
    progress, running = known["progress"], known["state"] == State.RUNNING
    causes = Counter(str(restart["cause"]) for restart in known["restarts"])
    last = known["restarts"][-1] if known["restarts"] else None
    return {
        "name": known["run"],
        "state": known["state"],
        "words": in_words(known["state"], reason=known["reason"], since=known["since"]),
        "why": known["why"].partition("\n")[0] if known["failure"] else "",
        "where": known["executor"] + ("" if known["executor"] == "local" else f" {known['id']}"),
        "submitted": known["submitted"],
        "step": progress.get("step"),
        "steps": progress.get("total_steps"),
        "loss": progress.get("loss"),
        "rate": progress.get("images_per_second") if running else None,
        "left": progress.get("seconds_left") if running else None,
        "warnings": progress.get("warnings", []),
        "restarts": ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items())),
        "restarted": "" if last is None else f"{last['cause']}: {last['message']}",
        "gpu_hours": known["gpu_hours"] if known["gpus"] else None,
    }


def _lasting(known: dict[str, Any]) -> dict[str, Any]:
    """Without what changes by itself."""
    return {**known, "gpu_hours": None}
