"""Datasets, and how far their crawls are: what was planned, what is committed, what came of it."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.json_rows import parse_row
from cluster.small_file import read_small
from ingest.dataset import layout
from ingest.dataset.records import CommitRecord, Pointer, SealedHead
from pipeline.serve.run_list import Stamp, path_id, stamp

_DEEP = 2  # folders below a served one
_AT_ONCE = 5_000  # commits that are read in one look; the others in the next
_MOST_FOLDERS = 20_000
_REASONS = 8
_COMMIT = re.compile(r"[0-9]{8,}\.json")
_DAMAGED = "it cannot be read"


@dataclass
class Crawl:
    """What is known of one dataset; its commits, which never change, are read once.

    Attributes:
        trouble: what the last look found wrong.
        damaged: what is wrong with a commit that was read.
    """

    folder: Path
    read: set[str] = field(default_factory=set)
    kept: int = 0
    bytes: int = 0
    not_kept: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    newest: float = 0.0
    scanned: Stamp = None
    planned: int = 0
    units: int = 0
    sources: list[str] = field(default_factory=list)
    sealed: SealedHead | None = None
    trouble: str = ""
    damaged: str = ""
    history: list[tuple[float, int]] = field(default_factory=list)

    def look(self) -> None:
        """Look again."""
        self.trouble = ""
        self._plans()
        self._seal()
        if not self.done:
            self._commits()
            self.trouble = self.trouble or self.damaged
        self.history = [*self.history, (time.monotonic(), self.committed)][-30:]

    @property
    def done(self) -> bool:
        """Whether all that was planned is sealed."""
        return self.sealed is not None and self.sealed.units >= self.units

    def _plans(self) -> None:
        """The generations that were planned; their files are never changed."""
        self.planned, self.units, self.sources = 0, 0, []
        for generation in range(10_000):
            path = self.folder / layout.plan_name(generation)
            try:
                plan = parse_row(read_small(path))
            except FileNotFoundError:
                return
            except OSError as error:
                self.trouble = f"{path}: {error.strerror}"
                return
            if plan is None:
                self.trouble = f"{path}: {_DAMAGED}"
                return
            self.units += _number(plan.get("units"))
            self.planned += _number(plan.get("rows"))
            for source in plan.get("sources") or []:
                if isinstance(source, dict) and len(self.sources) < 20:
                    self.sources.append(f"{source.get('kind')} {source.get('name')}"[:200])

    def _commits(self) -> None:
        seen = stamp(self.folder / layout.COMMITS)
        if seen == self.scanned and len(self.read) == self.committed:
            return
        self.scanned = seen
        try:
            with os.scandir(self.folder / layout.COMMITS) as entries:
                names = [entry.name for entry in entries if _COMMIT.fullmatch(entry.name)]
        except OSError:
            names = []
        self.committed = len(names)
        if not self.read.issubset(names):  # the folder was made anew
            self.read, self.kept, self.bytes, self.not_kept = set(), 0, 0, Counter()
            self.newest, self.damaged, self.history = 0.0, "", []
        for name in [name for name in names if name not in self.read][:_AT_ONCE]:
            self.read.add(name)
            path = self.folder / layout.COMMITS / name
            try:
                record = CommitRecord.read(read_small(path), where=path, remedy="run the crawl again")
                self.newest = max(self.newest, path.stat().st_mtime)
            except (OSError, UserError) as error:
                self.damaged = str(error)
                continue
            self.kept += record.kept
            self.bytes += record.bytes
            self.not_kept.update(record.rejected)
            self.not_kept.update(record.failed)

    def _seal(self) -> None:
        self.sealed = None
        path = self.folder / layout.DATASET
        try:
            root = Pointer.read(read_small(path), where=path, remedy="seal it again").sealed
            head = self.folder / layout.sealed_name(root, "json")
            self.sealed = SealedHead.read(read_small(head), where=head, remedy="seal it again")
        except FileNotFoundError:
            pass
        except (OSError, UserError) as error:
            self.trouble = str(error)

    def told(self, name: str) -> dict[str, Any]:
        """For the page."""
        sealed = self.sealed if self.done else None
        seen, counted = self.history[0], self.history[-1]
        rate = (counted[1] - seen[1]) / (counted[0] - seen[0]) if counted[0] > seen[0] else 0.0
        told = {
            "id": path_id(self.folder),
            "name": name,
            "state": "damaged" if self.trouble else "in progress" if sealed is None else "sealed",
            "trouble": self.trouble,
            "root": "" if self.sealed is None else self.sealed.root,
            "units": self.units,
            "planned": self.planned,
            "sources": self.sources,
        }
        if sealed is not None:
            not_kept = Counter(sealed.rejected) + Counter(sealed.failed)
            return told | {
                "committed": sealed.units,
                "counted": sealed.units,
                "kept": sealed.kept,
                "bytes": sealed.bytes,
                "not_kept": not_kept.most_common(_REASONS),
                "newest": None,
                "left": None,
            }
        return told | {
            "committed": self.committed,
            "counted": len(self.read),
            "kept": self.kept,
            "bytes": self.bytes,
            "not_kept": self.not_kept.most_common(_REASONS),
            "newest": self.newest or None,
            "left": (self.units - self.committed) / rate if rate > 0 else None,
        }


@dataclass
class Datasets:
    """The datasets below some folders. To be looked at by one thread at a time."""

    roots: tuple[Path, ...]
    crawls: dict[Path, Crawl] = field(default_factory=dict)

    def look(self) -> Datasets:
        """Look again."""
        found = {folder: self.crawls.get(folder) or Crawl(folder) for folder in self._folders()}
        for crawl in found.values():
            crawl.look()
        self.crawls = found
        return self

    def told(self) -> list[dict[str, Any]]:
        """For the page: those that are not sealed first."""
        rows = [crawl.told(self._name(folder)) for folder, crawl in self.crawls.items()]
        return sorted(rows, key=lambda row: (row["state"] == "sealed", row["name"]))

    def _name(self, folder: Path) -> str:
        root = next(root for root in self.roots if folder.is_relative_to(root))
        return str(folder.relative_to(root.parent))

    def _folders(self) -> dict[Path, None]:
        found: dict[Path, None] = {}
        for number, folder in enumerate(each for root in self.roots for each in _below(root, _DEEP)):
            if (folder / layout.DATASET).is_file() or (folder / layout.plan_name(0)).is_file():
                found[folder] = None
            if number == _MOST_FOLDERS:
                break
        return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == 0 or (folder / "commits").is_dir() or (folder / "status.json").is_file():
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
    except OSError:
        return
    for name in names:
        yield from _below(folder / name, depth - 1)


def _number(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 60 else 0
