"""What sources were found to hold when they were listed: one that has not changed since is not listed again.

`plan/.listed.json` lies beside the plans and outside of every fingerprint: it only saves the time to list a
million members. A file's size and its times say whether it has changed: that of its content, and that of its
inode, which nobody sets. Folders are always listed.
"""

import os
import stat
import time
from collections.abc import Mapping, Sequence
from typing import Self

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.records import Record, Sha256
from ingest.sources.source import Found
from ingest.store.store import Store

# What was written to just now may be written to again within the same tick of the file system's clock.
_QUIET_NS = 2_000_000_000


class Stamp(Record):
    """A file's size, and when its content and its inode changed, in ns since 1970."""

    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, location: str) -> Self | None:
        """That of a local file; None of all else, and of one that is being written."""
        try:
            status = os.stat(location)  # noqa: PTH116
        except (OSError, ValueError):
            return None
        latest = max(status.st_mtime_ns, status.st_ctime_ns)
        if not stat.S_ISREG(status.st_mode) or latest > time.time_ns() - _QUIET_NS:
            return None
        return cls(bytes=status.st_size, modified_ns=status.st_mtime_ns, changed_ns=status.st_ctime_ns)


class _Listed(Record):
    stamp: Stamp
    items: int | None
    sha256: Sha256


class _ListedFile(Record):
    locations: dict[str, _Listed]


class ListedBefore:
    """Looks at the sources before they are listed.

    Args:
        store: the dataset's files.
        locations: of the sources.
    """

    def __init__(self, store: Store, locations: Sequence[str]) -> None:
        self._store = store
        self._stamps = {location: Stamp.of(location) for location in locations if location.startswith("/")}
        self._there = _read(store)

    def found(self, location: str) -> Found | None:
        """What is in the source at this place; None if it may have changed."""
        before, stamp = self._there.get(location), self._stamps.get(location)
        return None if before is None or before.stamp != stamp else Found(before.items, before.sha256)

    def remember(self, locations: Sequence[str], described: Sequence[SourceRecord]) -> None:
        """That the sources at these places were found to be as described."""
        now = dict(self._there)
        for location, source in zip(locations, described, strict=False):
            stamp = self._stamps.get(location)
            if stamp is not None and source.sha256 is not None:
                now[location] = _Listed(stamp=stamp, items=source.items, sha256=source.sha256)
        if now != self._there:
            self._store.replace(layout.LISTED, _ListedFile(locations=now).to_bytes())
            self._there = now


def _read(store: Store) -> Mapping[str, _Listed]:
    try:
        return _ListedFile.read(store.read(layout.LISTED), where=layout.LISTED, remedy="").locations
    except (OSError, UserError):  # then the sources are listed
        return {}
