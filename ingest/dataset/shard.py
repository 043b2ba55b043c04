"""One unit's tar and Parquet: written as drafts, published under content names, described by a commit record.

The tar is USTAR with every volatile field fixed, so that its bytes depend on the images and their order
alone. The Parquet has one row per attempt in the plan's order, one row group, and no volatile column.
"""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.dataset import layout
from ingest.dataset.keys import key_name, key_of
from ingest.dataset.records import CommitRecord, FileRecord
from ingest.dataset.schema import META_SCHEMA, NO_COLUMNS
from ingest.dataset.unit_counts import count_rows, counts_bytes
from ingest.image.check import Checked
from ingest.store.store import Store

_BLOCK = 512
_CHUNK_ROWS = 256


class MetaWriter:
    """The rows of one unit, one per attempt, in the plan's order; and the counts that its commit record has.

    Args:
        store: the dataset's files.
        unit: its number.
        extra: columns that its rows have besides those of META_SCHEMA.
    """

    def __init__(self, store: Store, unit: int, *, extra: pa.Schema = NO_COLUMNS) -> None:
        self._store = store
        self._unit = unit
        self._schema = pa.schema([*META_SCHEMA, *extra])
        self._chunks: list[pa.RecordBatch] = []
        self._columns: dict[str, list[Any]] = self._no_rows()
        self._counts: dict[str, Counter[str]] = {"rejected": Counter(), "failed": Counter()}
        self.rows = self.kept = 0
        self._stored = 0

    def add(
        self,
        verdict: Checked,
        *,
        offset: int,
        size: int,
        url: str,
        labels: Sequence[str],
        caption: str | None = None,
        retryable: bool = False,
        http_status: int | None = None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Append one attempt; the image of one that is kept lies at `offset` of the shard.

        Args:
            verdict: the check's result; of one that is kept, `sha256` is that of the bytes in the shard.
            offset, size: of the image, in bytes; of others, they are not used.
            url: where it came from.
            labels: of the attempt, may be empty.
            caption: a text that belongs to it.
            retryable: whether trying again may succeed.
            http_status: the last answer of the host.
            extra: values of the further columns; those that are missing are null.
        """
        row: dict[str, Any] = {name: getattr(verdict, name, None) for name in META_SCHEMA.names}
        row |= {"unit": self._unit, "url": url, "labels": labels, "caption": caption}
        row |= {"retryable": retryable, "http_status": http_status}
        row |= {name: extra.get(name) for name in self._schema.names[len(META_SCHEMA) :]}
        row["reason"] = verdict.reason or None
        if verdict.status == "kept" and verdict.sha256 is not None:
            row |= {"slot": self.kept, "offset": offset, "size": size}
            row["sha256"] = bytes.fromhex(verdict.sha256)
            self.kept += 1
            self._stored += size
        else:
            self._counts[verdict.status][verdict.reason] += 1
        for name, value in row.items():
            self._columns[name].append(value)
        self.rows += 1
        if self.rows % _CHUNK_ROWS == 0:
            self._pack()

    def publish(self, *, generation: int, fingerprint: str, shard: FileRecord) -> CommitRecord:
        """Make the Parquet durable under its content name, and its counts; returns the record to commit.

        Args:
            generation, fingerprint: of the plan.
            shard: the tar that the images are in.
        """
        self._pack()
        rows = pa.Table.from_batches(self._chunks, schema=self._schema).combine_chunks()
        table = _meta_bytes(rows)
        digest = hashlib.sha256(table)
        sha256 = digest.hexdigest()
        name = layout.meta_name(self._unit, sha256)
        with self._store.draft(layout.meta_stem(self._unit)) as draft:
            draft.file.write(table)
            draft.publish(name, sha256)
        counts = counts_bytes(count_rows(rows, rows.column_names), digest.digest())
        self._store.replace(layout.counts_name(self._unit, sha256), counts)
        return CommitRecord(
            unit=self._unit,
            generation=generation,
            fingerprint=fingerprint,
            rows=rows.num_rows,
            bytes=self._stored,
            kept=self.kept,
            rejected=dict(self._counts["rejected"]),
            failed=dict(self._counts["failed"]),
            shard=shard,
            meta=FileRecord(name=name, bytes=len(table), sha256=sha256),
        )

    def rows_so_far(self) -> Iterator[dict[str, Any]]:
        """What was added until now, in order."""
        self._pack()
        for chunk in self._chunks:
            yield from chunk.to_pylist()

    def _no_rows(self) -> dict[str, list[Any]]:
        return {name: [] for name in self._schema.names}

    def _pack(self) -> None:
        """Values in columns take a fifth of what they take as objects: a unit may be open for days."""
        self._chunks.append(pa.RecordBatch.from_pydict(self._columns, schema=self._schema))
        self._columns = self._no_rows()


class ShardWriter:
    """Collects one unit, in the plan's order. Used as a context manager: drafts vanish unless `publish` was
    called.

    Args:
        store: the dataset's files.
        unit: its number.
        extra: columns that its rows have besides those of META_SCHEMA.
    """

    def __init__(self, store: Store, unit: int, *, extra: pa.Schema = NO_COLUMNS) -> None:
        self._store = store
        self._unit = unit
        self._meta = MetaWriter(store, unit, extra=extra)
        self._offset = 0
        self._sha256 = hashlib.sha256()
        self._drafts = ExitStack()

    def __enter__(self) -> Self:
        self._tar = self._drafts.enter_context(self._store.draft(layout.shard_stem(self._unit)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drafts.close()

    def stored(self, original: bytes, verdict: Checked) -> bytes:
        """Of an image that is kept: what the check made of it, or what it was."""
        return original if verdict.data is None else verdict.data

    def add(self, verdict: Checked, data: bytes, *, offset: int = 0, **row: Any) -> None:
        """Append one attempt: its row, and its image if it is kept.

        Args:
            verdict: the check's result.
            data: the bytes to store; not used unless the verdict is kept.
            offset: where it was in its source; here it lies where the tar ends.
            row: what `MetaWriter.add` wants to know besides where the image lies.
        """
        if verdict.status == "kept" and verdict.format is not None:
            member = f"{key_name(key_of(self._unit, self._meta.kept))}.{layout.EXTENSIONS[verdict.format]}"
            self._write(header(member, len(data)))
            self._meta.add(verdict, offset=self._offset, size=len(data), **row)
            self._write(data)
            self._write(b"\0" * (-len(data) % _BLOCK))
        else:
            self._meta.add(verdict, offset=0, size=0, **row)

    def rows_so_far(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """What was added until now, in order: each row, and its image if it is kept."""
        for row in self._meta.rows_so_far():
            data = b""
            if row["status"] == "kept":
                self._tar.file.seek(row["offset"])
                data = self._tar.file.read(row["size"])
            yield row, data
        self._tar.file.seek(self._offset)

    def publish(self, *, generation: int, fingerprint: str) -> CommitRecord:
        """Make tar and Parquet durable under their content names; returns the record to commit."""
        self._write(b"\0" * (2 * _BLOCK))
        sha256 = self._sha256.hexdigest()
        name = layout.shard_name(self._unit, sha256)
        self._tar.publish(name, sha256)
        shard = FileRecord(name=name, bytes=self._offset, sha256=sha256)
        return self._meta.publish(generation=generation, fingerprint=fingerprint, shard=shard)

    def _write(self, data: bytes) -> None:
        self._tar.file.write(data)
        self._sha256.update(data)
        self._offset += len(data)


_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 156)
# Of all bytes but the name and the size, with the checksum's own place as blanks.
_TEMPLATE_SUM = sum(_TEMPLATE[:124]) + sum(_TEMPLATE[135:148]) + sum(_TEMPLATE[156:]) + 8 * ord(" ")


def header(name: str, size: int) -> bytes:
    """The USTAR header of a plain file, as `tarfile` makes it, in a fifth of the time.

    Args:
        name: ASCII, at most 100 characters.
        size: less than 8 GiB.
    """
    block = bytearray(_TEMPLATE)
    name_bytes, size_bytes = name.encode("ascii"), b"%011o" % size
    block[: len(name_bytes)] = name_bytes
    block[_SIZE] = size_bytes
    block[_CHECKSUM] = b"%06o\0 " % (_TEMPLATE_SUM + sum(name_bytes) + sum(size_bytes))
    return bytes(block)


def _meta_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        row_group_size=max(1, table.num_rows),
        use_dictionary=["format", "status", "reason", "labels.list.element"],
        column_encoding={
            "offset": "DELTA_BINARY_PACKED",
            "slot": "DELTA_BINARY_PACKED",
            "url": "DELTA_BYTE_ARRAY",
        },
    )
    return buffer.getvalue()


class InPlaceWriter:
    """Collects the rows of one unit whose images are in a foreign tar. Takes the place of a `ShardWriter`.

    Args:
        store: the dataset's files.
        unit: its number.
        shard: the tar.
        extra: columns that its rows have besides everyone's.
    """

    def __init__(self, store: Store, unit: int, *, shard: FileRecord, extra: pa.Schema) -> None:
        self._shard = shard
        self._meta = MetaWriter(store, unit, extra=extra)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to undo before `publish`."""

    def stored(self, original: bytes, verdict: Checked) -> bytes:
        """Of an image that is kept: what it was."""
        return original

    def add(self, verdict: Checked, data: bytes, *, offset: int, **row: Any) -> None:
        """Append one attempt.

        Args:
            verdict: the check's result.
            data: the image as it is in the tar.
            offset: where in the tar.
            row: what `MetaWriter.add` wants to know besides.
        """
        if verdict.status == "kept":
            # A check's sha256 is that of what a crawl would store.
            verdict = replace(verdict, sha256=hashlib.sha256(data).hexdigest())
        self._meta.add(verdict, offset=offset, size=len(data), **row)

    def publish(self, *, generation: int, fingerprint: str) -> CommitRecord:
        """Make the Parquet durable; returns the record to commit."""
        return self._meta.publish(generation=generation, fingerprint=fingerprint, shard=self._shard)
