"""Results of units that are not committed, under the output: whoever goes on with a unit takes them up.

Units with giants stay open for long, a day at a Crawl-delay of 10 s, and jobs end after an hour. Each process
has a file of its own for each unit, so that two of them never write to one; the first result of a row counts.
Files go when their unit is committed. They name the plan that they are of: another one's are not looked at.

Datasets in buckets have none: what waits for its place there is lost with its process.
"""

import os
import re
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ingest.crawl.results import Memory, Results
from ingest.dataset import layout
from ingest.dataset.records import canonical_json
from ingest.plan.plan import Plan
from ingest.store.posix import make_folder
from ingest.store.store import Store

_NAME = re.compile(r"(\d{8,})-[0-9a-f]{16}\.results")


class Kept:
    """The files of a plan's units.

    Args:
        plan: whose results these are.
        units: that may be begun here.
    """

    def __init__(self, plan: Plan, units: Iterable[int]) -> None:
        self._plan = plan
        self._files: defaultdict[int, list[Path]] = defaultdict(list)
        ours = set(units)
        for path in _listed(plan.store):
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) in ours:
                self._files[int(match[1])].append(path)

    def results(self, unit: int, rows: int, memory: Memory) -> Results:
        """For the results of a unit; `load` them from `files`."""
        if _folder(self._plan.store) is None or unit in self._plan.local_units:
            return Results(rows, memory, new_file=_without_name)
        header = {"plan": self._plan.fingerprint, "items": self._plan.record.items.sha256, "unit": unit}
        return Results(
            rows,
            memory,
            new_file=lambda: self._new_file(unit),
            header=canonical_json(header),
            keep=True,
        )

    def files(self, unit: int) -> Iterator[int]:
        """Descriptors of what others have kept of a unit."""
        for path in self._files.get(unit, ()):
            with suppress(OSError):  # of what is gone, or not to be read, all is asked for again
                yield os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)

    def remove(self, unit: int) -> None:
        """The unit is committed."""
        for path in self._files.pop(unit, ()):
            path.unlink(missing_ok=True)

    def _new_file(self, unit: int) -> int:
        folder = _folder(self._plan.store)
        assert folder is not None
        make_folder(folder)
        path = folder / f"{unit:08d}-{secrets.token_hex(8)}.results"
        self._files[unit].append(path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def remove_folder(store: Store) -> None:
    """Once all units are committed, of the folder nothing is left, unless others put something there."""
    if (folder := _folder(store)) is not None:
        with suppress(OSError):
            folder.rmdir()


def _folder(store: Store) -> Path | None:
    return store.root / layout.WAITING if isinstance(store.root, Path) else None


def _listed(store: Store) -> list[Path]:
    """Files only: a pipe would keep its reader waiting."""
    folder = _folder(store)
    if folder is None or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False))


def _without_name() -> int:
    with tempfile.TemporaryFile(prefix="ingest-") as file:
        return os.dup(file.fileno())
