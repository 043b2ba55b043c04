"""Rows of many units' metadata: one after the other from a folder, many at a time from an object store."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.store.store import Store

# Of some MB each.
_FILES_AT_ONCE = 16


def read_units(
    store: Store, metas: Sequence[str], wanted: Callable[[Sequence[str]], Sequence[str]]
) -> Iterator[tuple[list[str], pa.Table]]:
    """The columns that a unit has, and all its rows with some of them; unit by unit.

    From an object store each file comes whole, in one request: its delays cost more than the bytes.

    Args:
        store: the dataset's files.
        metas: names of units' metadata files.
        wanted: the columns to read of those that a unit has.

    Raises:
        UserError: a file cannot be read.
    """

    def table(parquet: pq.ParquetFile) -> tuple[list[str], pa.Table]:
        there = parquet.schema_arrow.names
        return there, parquet.read(columns=list(wanted(there)), use_threads=False)

    whole = None if isinstance(store.root, Path) else store.read_many(metas, at_once=_FILES_AT_ONCE)
    for meta in metas:
        try:
            if whole is None:
                with store.open(meta) as file, pq.ParquetFile(file) as parquet:
                    found = table(parquet)
            else:
                data = next(whole)
                if data is None:
                    raise FileNotFoundError(meta)
                with pq.ParquetFile(pa.BufferReader(data)) as parquet:
                    found = table(parquet)
        except (OSError, pa.ArrowException):
            raise UserError(
                f"{store.where(meta)} cannot be read: see what else is damaged with `ingest verify "
                f"{store.root}`"
            ) from None
        yield found
