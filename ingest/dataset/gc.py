"""Garbage: what committed units and published plans left behind and nothing names. All else may be in use.

A worker that came second with a unit, or was killed after it had published and before it had committed,
leaves files that nobody reads. Of a unit without a commit nothing is touched: its files may be about to be
committed.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.commit import read_commits
from ingest.dataset.plan_record import read_plan
from ingest.store.open import open_store
from ingest.store.store import Entry, Store

# A write that has not ended by then was killed; a slow second worker's is left alone.
STALE_SECONDS = 24 * 3600
_COMMIT = re.compile(rf"{layout.COMMITS}/(\d+)\.json")
_OF_UNITS = (layout.SHARDS, layout.META, layout.COUNTS, layout.COMMITS)
_OF_UNIT = re.compile(r"[^/]+(?:/[^/]+)?/\.?(\d{8,})-[^/]+")


def find_garbage(path: str | Path) -> tuple[Store, Iterator[Entry]]:
    """The dataset's store, and each file in it that can be deleted.

    Raises:
        UserError: there is no dataset; or, when files are asked for, a commit is damaged.
    """
    store = open_store(path)
    if not (store.exists(layout.plan_name(0)) or store.exists(layout.DATASET)):
        raise UserError(f"{path} is not a dataset: check the path")
    return store, _garbage(store)


def _garbage(store: Store) -> Iterator[Entry]:
    # The commits come first: a unit that is committed after this keeps all its files until the next time.
    matches = (_COMMIT.fullmatch(entry.name) for entry in store.list(layout.COMMITS))
    named: dict[int, set[str]] = {}
    for unit, record in read_commits(store, [int(match[1]) for match in matches if match]):
        if record is not None:
            counts = layout.counts_name(unit, record.meta.sha256)
            named[unit] = {record.shard.name, record.meta.name, counts}
    for entry in store.list(layout.WAITING):
        if _unit(entry.name) in named:
            yield entry
    old = time.time() - STALE_SECONDS
    for folder in (layout.SHARDS, layout.META, layout.COUNTS):
        for entry in store.list(folder):
            names = named.get(_unit(entry.name))
            if names is not None and entry.name not in names:
                yield entry
    for folder in _OF_UNITS:
        for entry in store.unfinished(folder):
            if _unit(entry.name) in named and entry.modified < old:
                yield entry
    yield from _other_leftovers(store, old)


def _other_leftovers(store: Store, old: float) -> Iterator[Entry]:
    """Old drafts beside the units, and lists of units that came second to a plan."""
    seen: set[str] = set()
    for folder in ("plan", "sealed", layout.VIEWS, "."):
        for entry in store.unfinished(folder):
            of_units = entry.name.startswith(tuple(f"{each}/" for each in _OF_UNITS))
            if entry.modified < old and entry.name not in seen and not of_units:
                seen.add(entry.name)
                yield entry
    generation = 0
    while (plan := read_plan(store, generation)) is not None:
        for entry in store.list(f"plan/{generation}"):
            second = entry.name.startswith(layout.items_stem(generation)) and entry.name != plan.items.name
            if second and entry.modified < old:
                yield entry
        generation += 1


def _unit(name: str) -> int:
    """The unit that a shard, a metadata file or a draft belongs to; -1 for files of others."""
    match = _OF_UNIT.fullmatch(name)
    return int(match[1]) if match else -1
