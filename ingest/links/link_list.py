"""Web archives become one list of image links: every address once, the first in the order of the input.

Each file is read by itself, by one process, into a spill file beside the output. These are taken in the order
of the input and split by the first byte of the addresses' digests; then each bucket is sorted, thinned and
written. Memory is bounded by the largest bucket kept, whatever the number of links, and the order (that of
the digests, which mixes hosts) and the bytes of the output do not depend on the number of processes.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter

from cluster.errors import UserError
from cluster.map.processes import processes
from cluster.output_trouble import writing
from ingest.links.archive import ArchiveCounts, archive_links
from ingest.store.clients import is_bucket
from ingest.store.posix import sync_folder
from ingest.web.opt_outs import ALL, OptOut
from ingest.web.url import canonical, host_of

_ROW_GROUP = 1 << 17
# A bucket larger than this in memory is split once more.
_LARGEST_BUCKET = 128 << 20
_KEY_BYTES = 16
_BATCH = 1 << 15
_COLUMNS = [
    pa.field("url", pa.string(), nullable=False),
    pa.field("alt", pa.string(), nullable=False),
    pa.field("page_url", pa.string(), nullable=False),
    pa.field("page_host", pa.string(), nullable=False),
]
# By the end of the output's name.
WRITERS: dict[str, Callable[..., Any]] = {
    ".parquet": partial(pq.ParquetWriter, compression="zstd"),
    ".csv": CSVWriter,
}
_SPILL = pa.schema([pa.field("key", pa.binary(_KEY_BYTES), nullable=False), *_COLUMNS])


@dataclass(kw_only=True)
class LinkCounts:
    """What was read and found.

    Attributes:
        files: archives read.
        records: of any kind, in them.
        pages: web pages among them, opted out or not.
        opted_out: pages that asked not to be used.
        left_out: those among them of which that was heeded: their images are not in the output.
        found: images on the pages, each address once per page.
        distinct: addresses in the output.
        hosts: of the pages that these are from.
        damaged: archives that could not be read to their end, and why; what was read counts.
    """

    files: int = 0
    records: int = 0
    pages: int = 0
    opted_out: int = 0
    left_out: int = 0
    found: int = 0
    distinct: int = 0
    hosts: int = 0
    damaged: dict[str, str] = field(default_factory=dict)


def list_links(
    archives: Sequence[str],
    output: Path,
    *,
    workers: int,
    heeded: frozenset[OptOut] = ALL,
    progress: Callable[[LinkCounts], None] = lambda counts: None,
) -> LinkCounts:
    """Write the links of web archives to `output`, a Parquet or CSV file that appears whole.

    Args:
        archives: WARC or WAT files, here, in a bucket or at an address that fsspec opens; their order decides
            which of several places of one image is told.
        output: columns url, alt, page_url, page_host.
        workers: processes that read; does not change the result.
        heeded: ways to opt out that leave out the images of a page; Parquet's metadata tells of the others.
        progress: called after each archive with the counts so far.

    Raises:
        UserError: an archive does not exist, none of them is one, or the output cannot be written.
    """
    _refuse_unknown(archives)
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output} must name a file in a folder that exists")
    if output.suffix.lower() not in WRITERS:
        raise UserError(
            f"--output {output} is written as its name says, which must end in {' or '.join(WRITERS)}"
        )
    counts = LinkCounts()
    with writing(output):
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        tasks = [
            _Archive(name=name, spill=folder / f"{number}.arrow", heeded=heeded)
            for number, name in enumerate(archives)
        ]
        with processes(min(workers, len(archives))) as map_tasks:
            spills = map_tasks(_spill, tasks)
            buckets = _split(_counted(spills, counts, progress), folder / "buckets", depth=0)
        if counts.records == 0:
            name, reason = next(iter(counts.damaged.items()), (archives[0], "it is empty"))
            raise UserError(f"no record could be read: {name}: {reason}; give WARC or WAT files")
        _write(buckets, folder / "links", counts, output.suffix.lower(), heeded=heeded)
        (folder / "links").replace(output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def _refuse_unknown(archives: Sequence[str]) -> None:
    if not archives:
        raise UserError("name at least one WARC or WAT file")
    for name in archives:
        protocol, remote, _ = name.partition("://")
        if not remote and Path(name).is_dir():
            raise UserError(f"{name} is a folder: name the files in it, such as '{name}/*.warc.gz'")
        if not remote and not Path(name).is_file():
            raise UserError(f"there is no file {name}")
        if is_bucket(name):
            continue
        try:
            fsspec.get_filesystem_class(protocol if remote else "file")
        except (ValueError, ImportError) as error:
            raise UserError(f"{name} cannot be opened: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Archive:
    name: str
    spill: Path
    heeded: frozenset[OptOut]


@dataclass(frozen=True, kw_only=True)
class _Spilled:
    archive: str
    spill: Path
    counts: ArchiveCounts


def _spill(archive: _Archive) -> _Spilled:
    """Read one archive; its links go to the spill file in their order, those repeated nearby left out."""
    counts = ArchiveCounts()
    rows: list[tuple[bytes, str, str, str, str]] = []
    near: set[bytes] = set()
    with pa.OSFile(str(archive.spill), "wb") as out, pa.ipc.new_stream(out, _SPILL) as writer:
        for page_url, link in archive_links(archive.name, counts, heeded=archive.heeded):
            key = _key(link.url)
            if key not in near:
                near.add(key)
                rows.append((key, link.url, link.alt, page_url, host_of(page_url)))
            if len(rows) == _BATCH:
                writer.write_batch(_batch(rows))
                rows.clear()
                near.clear()
        if rows:
            writer.write_batch(_batch(rows))
    return _Spilled(archive=archive.name, spill=archive.spill, counts=counts)


def _key(url: str) -> bytes:
    """128 bits of the canonical address: among ten billion, two share them with probability 1.5e-19."""
    return hashlib.blake2b((canonical(url) or url).encode(), digest_size=_KEY_BYTES).digest()


def _batch(rows: list[tuple[bytes, str, str, str, str]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array(column, kind.type) for column, kind in zip(zip(*rows, strict=True), _SPILL, strict=True)],
        schema=_SPILL,
    )


def _counted(
    spills: Iterator[_Spilled], counts: LinkCounts, progress: Callable[[LinkCounts], None]
) -> Iterator[pa.RecordBatch]:
    for spilled in spills:
        counts.files += 1
        for name in ("records", "pages", "opted_out", "left_out", "found"):
            setattr(counts, name, getattr(counts, name) + getattr(spilled.counts, name))
        if spilled.counts.damage:
            counts.damaged[spilled.archive] = spilled.counts.damage
        progress(counts)
        yield from _batches(spilled.spill)
        spilled.spill.unlink()


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _split(batches: Iterator[pa.RecordBatch], folder: Path, *, depth: int) -> list[Path]:
    """Divide rows, their order kept, by one byte of their keys; a file for each value that occurs, sorted."""
    folder.mkdir()
    files: dict[int, Path] = {}
    with ExitStack() as stack:
        writers: dict[int, pa.RecordBatchWriter] = {}
        for batch in batches:
            values = _key_bytes(batch)[:, depth]
            order = np.argsort(values, kind="stable")
            ends = np.searchsorted(values[order], np.arange(257))
            rows = batch.take(pa.array(order))
            for value in np.unique(values).tolist():
                if value not in writers:
                    files[value] = folder / f"{value:02x}.arrow"
                    out = stack.enter_context(pa.OSFile(str(files[value]), "wb"))
                    writers[value] = stack.enter_context(pa.ipc.new_stream(out, _SPILL))
                writers[value].write_batch(rows.slice(ends[value], ends[value + 1] - ends[value]))
    return [files[value] for value in sorted(files)]


def _key_bytes(batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """The keys, (rows, 16) of uint8."""
    keys = batch.column("key")
    flat = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    data = np.frombuffer(flat.buffers()[1], np.uint8)
    start = flat.offset * _KEY_BYTES
    return data[start : start + len(flat) * _KEY_BYTES].reshape(-1, _KEY_BYTES)


def _thinned(buckets: Sequence[Path], depth: int) -> Iterator[pa.Table]:
    """Tables of distinct links in the order of their keys; the first of each key stays."""
    for bucket in buckets:
        if bucket.stat().st_size > _LARGEST_BUCKET and depth + 1 < _KEY_BYTES:
            finer = _split(_batches(bucket), bucket.with_suffix(""), depth=depth + 1)
            bucket.unlink()
            yield from _thinned(finer, depth + 1)
            continue
        table = pa.Table.from_batches(_batches(bucket), schema=_SPILL)
        bucket.unlink()
        high, low = _key_bytes(table).view(">u8").T
        order = np.lexsort((low, high))
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        yield table.take(pa.array(order[first])).drop_columns(["key"])


def _write(
    buckets: Sequence[Path], path: Path, counts: LinkCounts, suffix: str, *, heeded: frozenset[OptOut]
) -> None:
    ignored = " ".join(sorted(ALL - heeded))
    said = {"opt_outs": f"ignored: {ignored}" if ignored else "honoured"}
    schema = pa.schema(_COLUMNS, metadata=said)
    hosts = np.empty(0, np.uint64)
    waiting: list[pa.Table] = []
    with path.open("xb") as file:
        with WRITERS[suffix](file, schema) as writer:
            for table in _thinned(buckets, 0):
                counts.distinct += len(table)
                hosts = np.union1d(hosts, _host_digests(table))
                waiting.append(table.cast(schema))
                if sum(map(len, waiting)) >= _ROW_GROUP:
                    waiting = _write_whole_groups(writer, pa.concat_tables(waiting))
            rest = pa.concat_tables(waiting) if waiting else schema.empty_table()
            writer.write_table(rest, _ROW_GROUP)
        file.flush()
        os.fsync(file.fileno())
    counts.hosts = len(hosts)


def _write_whole_groups(writer: pq.ParquetWriter | CSVWriter, table: pa.Table) -> list[pa.Table]:
    """Writes as many rows as fill row groups; returns the rest."""
    whole = len(table) // _ROW_GROUP * _ROW_GROUP
    writer.write_table(table.slice(0, whole), _ROW_GROUP)
    return [table.slice(whole)]


def _host_digests(table: pa.Table) -> np.ndarray:
    """Eight bytes for each host: names of all hosts of the web would not fit in memory."""
    names = table.column("page_host").unique().to_pylist()
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.uint64)
