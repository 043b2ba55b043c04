"""Rows with URLs in the order of their hosts' registrable domains, in bounded memory, each URL once.

Politeness is kept by whoever fetches, and that is one process for all of a unit: so a unit should hold all
URLs of a site. Rows are therefore sorted by a hash of the domain, which scatters sites evenly and makes one
bucket of the hash's range after the other fit into memory.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ingest.web.domain import domain_hashes

_BUCKETS = 256
_MEMORY = 256 << 20
# Rows; a bucket with more is split once more. To sort one takes some 600 bytes a row.
_LARGEST_BUCKET = 1 << 19


class ByDomain:
    """Takes tables with a column `url`, and gives their rows back sorted; a context manager.

    Equal domains keep the order in which their rows came; of equal URLs only the first row stays. Rows
    without a URL (null) all stay. All tables must have one schema. Memory is bounded by the largest bucket,
    or by the largest site if that is more.

    Args:
        depth: which byte of the hash tells the buckets apart.

    Attributes:
        repeated: rows that were left out because their URL had come before.
        known: rows that were left out because their URL was known.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._folder = tempfile.TemporaryDirectory(prefix="ingest-")
        self._buckets = [
            _Bucket(Path(self._folder.name, f"{number:03d}.arrow")) for number in range(_BUCKETS)
        ]
        self._buffered = 0
        self.repeated = 0
        self.known = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bucket in self._buckets:
            bucket.close()
        self._folder.cleanup()

    def add(self, table: pa.Table) -> None:
        """Take rows."""
        hashes = domain_hashes(table["url"])
        table = table.append_column("domain", pa.array(hashes, pa.uint64()))
        order = np.argsort(hashes, kind="stable")
        table = table.take(order)
        hashes = hashes[order]
        bytes_here = hashes >> np.uint64(56 - 8 * self._depth) & np.uint64(_BUCKETS - 1)
        ends = np.searchsorted(bytes_here, np.arange(_BUCKETS + 1, dtype=np.uint64))
        for bucket, start, end in zip(self._buckets, ends[:-1], ends[1:], strict=True):
            if end > start:
                bucket.add(table.slice(start, end - start), hashes[start], hashes[end - 1])
        self._buffered += table.nbytes
        if self._buffered > _MEMORY:
            for bucket in self._buckets:
                bucket.spill()
            self._buffered = 0

    def tables(self, known: "ByDomain | None" = None) -> Iterator[pa.Table]:
        """The rows, without those whose URL is among `known`: one table per bucket of the hash's range."""
        # Or finer buckets, of which there are as many again, could find too many files open.
        for each in [*self._buckets, *(known._buckets if known else ())]:
            each.close()
        for number, bucket in enumerate(self._buckets):
            before = None if known is None else known._buckets[number]
            both = [bucket] if before is None else [bucket, before]
            several_sites = min(each.lowest for each in both) < max(each.highest for each in both)
            if bucket.rows and sum(each.rows for each in both) > _LARGEST_BUCKET and several_sites:
                yield from self._finer(bucket, before)
                continue
            table = bucket.read()
            if table is None:
                continue
            first = _first_of_each(table["url"])
            self.repeated += len(table) - len(first)
            table = table.take(first)
            seen = None if before is None else before.read()
            if seen is not None:
                fresh = pc.invert(pc.is_in(table["url"], value_set=seen["url"].combine_chunks()))
                new = table.filter(fresh)
                self.known += len(table) - len(new)
                table = new
            order = np.argsort(table["domain"].to_numpy(), kind="stable")
            yield table.take(order).drop_columns("domain")

    def _finer(self, bucket: "_Bucket", before: "_Bucket | None") -> Iterator[pa.Table]:
        with ByDomain(self._depth + 1) as urls, ByDomain(self._depth + 1) as known:
            for table in bucket.read_by_batch():
                urls.add(table.drop_columns("domain"))
            for table in before.read_by_batch() if before else ():
                known.add(table.drop_columns("domain"))
            yield from urls.tables(known)
            self.repeated += urls.repeated
            self.known += urls.known


class _Bucket:
    """The rows of one bucket of the hash's range: the last ones in memory, those before in a file."""

    def __init__(self, path: Path) -> None:
        self.tables: list[pa.Table] = []
        self.rows = 0
        self.lowest, self.highest = (1 << 64) - 1, 0
        self._path = path
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, table: pa.Table, lowest: np.uint64, highest: np.uint64) -> None:
        """Take rows with hashes between these."""
        self.tables.append(table)
        self.rows += len(table)
        self.lowest, self.highest = min(self.lowest, int(lowest)), max(self.highest, int(highest))

    def spill(self) -> None:
        if not self.tables:
            return
        table = pa.concat_tables(self.tables).combine_chunks()
        if self._writer is None:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            self._writer = pa.ipc.new_stream(str(self._path), table.schema, options=options)
        self._writer.write_table(table)
        self.tables = []

    def read(self) -> pa.Table | None:
        tables = list(self.read_by_batch())
        return pa.concat_tables(tables) if tables else None

    def read_by_batch(self) -> Iterator[pa.Table]:
        self.close()
        if self._path.exists():
            with pa.ipc.open_stream(str(self._path)) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
        yield from self.tables

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _first_of_each(urls: pa.ChunkedArray) -> NDArray[np.int64]:
    """Ascending places of the first occurrence of each distinct value, and of all nulls."""
    codes = urls.combine_chunks().dictionary_encode().indices
    places = np.flatnonzero(np.asarray(codes.is_valid()))
    _, first = np.unique(codes.drop_null().to_numpy(), return_index=True)
    return np.sort(np.concatenate([places[first], np.flatnonzero(np.asarray(codes.is_null()))]))
