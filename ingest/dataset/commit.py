"""Committing units exactly once, and sealing.

A commit and a seal are created only if absent. Whoever comes second, or comes again after a kill, finds the
first one's result and goes on from there.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ingest.dataset import layout
from ingest.store.store import Store

_READ_AT_ONCE = 512


def canonical(value: Any) -> bytes:
    """JSON with one spelling, for hashing and for publishing."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def commit(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    """Make one unit's result final by one create-if-absent; returns the record that won, ours or another."""
    winner = store.create_if_absent(layout.commit_name(record["unit"]), canonical(record))
    return _record(winner)


def read_commit(store: Store, unit: int) -> dict[str, Any] | None:
    try:
        return _record(store.read(layout.commit_name(unit)))
    except FileNotFoundError:
        return None


def read_commits(store: Store, units: Iterable[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Every unit and its commit, None without one; many are read at once where one takes long."""
    remaining = iter(units)
    while batch := list(islice(remaining, _READ_AT_ONCE)):
        read = store.read_many([layout.commit_name(unit) for unit in batch])
        for unit, data in zip(batch, read, strict=True):
            yield unit, None if data is None else _record(data)


def _record(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    return record
