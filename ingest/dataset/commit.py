"""Committing units exactly once.

A commit is created only if absent. Whoever comes second, or comes again after a kill, finds the first one's
result and goes on from there.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from ingest.dataset import layout
from ingest.dataset.records import CommitRecord
from ingest.store.store import Store

_READ_AT_ONCE = 512


def commit(store: Store, record: CommitRecord) -> CommitRecord:
    """Make one unit's result final by one create-if-absent; returns the record that won, ours or another.

    Raises:
        UserError: there is one already, and it is damaged.
    """
    winner = store.create_if_absent(layout.commit_name(record.unit), record.to_bytes())
    return _record(store, record.unit, winner)


def read_commit(store: Store, unit: int) -> CommitRecord | None:
    """The unit's commit, None without one.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _record(store, unit, store.read(layout.commit_name(unit)))
    except FileNotFoundError:
        return None


def read_commits(store: Store, units: Iterable[int]) -> Iterator[tuple[int, CommitRecord | None]]:
    """Every unit and its commit, None without one; many are read at once where one takes long.

    Raises:
        UserError: one is damaged.
    """
    remaining = iter(units)
    while batch := list(islice(remaining, _READ_AT_ONCE)):
        read = store.read_many([layout.commit_name(unit) for unit in batch])
        for unit, data in zip(batch, read, strict=True):
            yield unit, None if data is None else _record(store, unit, data)


def _record(store: Store, unit: int, data: bytes) -> CommitRecord:
    remedy = "restore it from a copy, or remove it and run the crawl again, which makes the unit anew"
    return CommitRecord.read(data, where=store.where(layout.commit_name(unit)), remedy=remedy)
