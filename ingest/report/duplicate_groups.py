"""Groups of duplicates, drawn from the list that lies beside a view without them.

`views/{name}.duplicates.parquet` has one row per sample that was dropped, sorted by winner: winner (the
sample that stays) and key (the one that was dropped) as unit * 100,000 + slot, distance (bits in which their
perceptual hashes differ), exact (their bytes are equal), evaluation (null, or of which evaluation dataset
the winner is: a place in the list `against` of the file's metadata).
"""

import heapq
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset.view import duplicates_name
from ingest.store.open import open_store

COLUMNS = ["winner", "key", "distance", "exact", "evaluation"]
LARGEST = 6
DRAWN = 18
MEMBERS_SHOWN = 11
_ROWS_AT_ONCE = 65_536
# Its rank, and its number, which decides between equal ones: groups themselves are never compared.
_Ranked = tuple[float, int, "Group"]


class Member(NamedTuple):
    """A sample that was dropped: its key, bits between its hash and the winner's, whether bytes are equal."""

    key: int
    distance: int
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    """A sample, and what was dropped for it.

    Attributes:
        winner: its key; of the evaluation dataset if it is of one.
        evaluation: the root of that dataset, hex; "" if the winner is of this one.
        dropped: how many.
        members: the first of them.
    """

    winner: int
    evaluation: str
    dropped: int
    members: tuple[Member, ...]

    @property
    def keys(self) -> list[int]:
        """Of this dataset's samples to show."""
        return [*([] if self.evaluation else [self.winner]), *(member.key for member in self.members)]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What is shown of a list of duplicates.

    Attributes:
        groups, dropped: how many there are in all.
        largest: the groups with most samples.
        drawn: others, drawn without regard to anything but the seed.
    """

    groups: int
    dropped: int
    largest: tuple[Group, ...]
    drawn: tuple[Group, ...]


def read_groups(path: str | Path, view: str, *, seed: int) -> Groups | None:
    """Read the list once, in bounded memory; None if the view has none.

    Raises:
        UserError: it is there and is no such list.
    """
    store, name = open_store(path), duplicates_name(view)
    try:
        file = store.open(name)
    except FileNotFoundError:
        return None
    try:
        with file, pq.ParquetFile(file) as parquet:
            if not set(COLUMNS) <= set(parquet.schema_arrow.names):
                raise KeyError
            settings = json.loads((parquet.schema_arrow.metadata or {}).get(b"settings", b"{}"))
            return _choose(_groups(parquet, settings.get("against", [])), random.Random(seed))
    except (pa.ArrowException, KeyError, IndexError, ValueError, AttributeError):
        raise UserError(
            f"{store.where(name)} is not a list of duplicates: remove it and make the view again"
        ) from None


def _choose(groups: Iterator[Group], draw: random.Random) -> Groups:
    largest: list[_Ranked] = []
    drawn: list[_Ranked] = []
    count = dropped = 0
    for group in groups:
        count, dropped = count + 1, dropped + group.dropped
        _push(largest, LARGEST, (group.dropped, -count, group))
        _push(drawn, LARGEST + DRAWN, (draw.random(), -count, group))
    shown = [group for _, _, group in sorted(largest, reverse=True)]
    others = [group for _, _, group in sorted(drawn, key=lambda each: -each[1]) if group not in shown]
    return Groups(groups=count, dropped=dropped, largest=tuple(shown), drawn=tuple(others[:DRAWN]))


def _push(heap: list[_Ranked], most: int, entry: _Ranked) -> None:
    if len(heap) < most:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _groups(parquet: pq.ParquetFile, against: list[str]) -> Iterator[Group]:
    rows = (
        row
        for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=COLUMNS)
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    )
    for (winner, evaluation), members in groupby(rows, key=lambda row: (row[0], row[4])):
        shown: list[Member] = []
        dropped = 0
        for _, key, distance, exact, _ in members:
            dropped += 1
            if dropped <= MEMBERS_SHOWN:
                shown.append(Member(key, distance, exact))
        yield Group(
            winner=winner,
            evaluation="" if evaluation is None else str(against[evaluation]),
            dropped=dropped,
            members=tuple(shown),
        )
