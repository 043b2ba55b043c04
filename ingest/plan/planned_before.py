"""Which files of a folder or an archive were planned before: a source that has grown is added to."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ingest.plan.plan import Plan
from ingest.sources.source import Listing

_WHICH = ("path", "offset", "size", "problem")


class PlannedBefore:
    """The items that earlier generations have of sources in the same places; eight bytes of memory for each.

    An item is the same if its path, its place in the file, its size and its problem are.

    Args:
        plans: the earlier generations.
        sources, locations: of the new one.

    Attributes:
        plans: the earlier generations.
        found: how many rows have been left out.
    """

    def __init__(self, plans: Sequence[Plan], sources: Sequence[Listing], locations: Sequence[str]) -> None:
        self._known: dict[int, NDArray[np.uint64]] = {}
        self.plans = plans
        self.found = 0
        for number, (source, location) in enumerate(zip(sources, locations, strict=False)):
            if not source.kind.is_fetched and any(location in plan.locations for plan in plans):
                self._known[number] = np.unique(np.concatenate([_planned(plan, location) for plan in plans]))

    def left_out(self, source: int, table: pa.Table) -> pa.Table:
        """The rows of a source of the new generation that were not planned before."""
        known = self._known.get(source)
        if known is None:
            return table
        fresh = ~np.isin(_digests(table), known)
        self.found += len(table) - int(fresh.sum())
        return table.filter(pa.array(fresh))


def _planned(plan: Plan, location: str) -> NDArray[np.uint64]:
    numbers = [number for number, place in enumerate(plan.locations) if place == location]
    found = [np.empty(0, np.uint64)]
    for unit in plan.units if numbers else ():
        table = plan.table(unit)
        ours = pc.is_in(table["source"], value_set=pa.array(numbers, table["source"].type))
        found.append(_digests(table.filter(ours)))
    return np.concatenate(found)


def _digests(table: pa.Table) -> NDArray[np.uint64]:
    rows = zip(*(table[name].to_pylist() for name in _WHICH), strict=True)
    digests = b"".join(hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, np.uint64)
