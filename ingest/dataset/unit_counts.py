"""What of a unit's rows can be added up, counted once, when the unit is made: reports then read no rows.

`counts/{unit%4096:03x}/{unit:08d}-{sha8}.counts` lies beside the unit's commit, named by the sha256 of its
metadata, of which it is a pure function. No commit and no root knows it: whoever finds none, or one that is
damaged, foreign or of another version, counts the rows again. It is a Parquet file of COUNTS_SCHEMA, with 32
bytes after it: the sha256 of the metadata's sha256 and of that file. They tell whether it is this unit's and
whole, not who wrote it: who can write here can write rows, too.

A line of it is a number of rows: of what, and of which name or value.

    status S      attempts with this status, by reason ("" of kept ones)
    host S        attempts with this status, by the host that their URL names, before redirects
    http          attempts, by the server's last answer
    column        a column that the unit has besides everyone's; its count is 1

and of what is kept:

    format, label, split, video codec, audio codec       by name
    labels                                               by how many a row has
    width, height, short side, long side, size, ms, gap  by value, rounded down to its cell
    least W, most W                                      of each of these, the exact value; its count is 1
    total W                                              of each of these, the sum as its count
    clip, quiet, still                                   clips; with a sound that is not heard; without motion
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ingest.dataset import layout
from ingest.dataset.cells import rounded
from ingest.dataset.schema import META_SCHEMA
from ingest.store.store import Store
from ingest.web.domain import hosts_of

COUNTS_SCHEMA = pa.schema(
    [
        pa.field("what", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("value", pa.int64(), nullable=False),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
    ]
)
# Columns of rows that are counted, of all datasets and of those of clips.
COUNTED = (
    "status",
    "reason",
    "retryable",
    "http_status",
    "url",
    "format",
    "width",
    "height",
    "size",
    "labels",
)
CLIP_COLUMNS = (
    "media",
    "video_codec",
    "audio_codec",
    "duration_ms",
    "max_keyframe_gap_ms",
    "loudness_db",
    "still",
)
MEASURES = ("width", "height", "short side", "long side", "size", "ms", "gap")
# Below, nothing is heard; and from this share of pairs of frames on, nothing moves.
QUIET_DB = -60.0
STILL = 0.99
# More is of no unit; the sums of a million units stay below 2**63.
_MOST = 1 << 43
_STATUS = "status "
_STATUSES = ("kept", "rejected", "failed")
_DIGEST_BYTES = 32
_READ_AT_ONCE = 512


class Attempts(NamedTuple):
    """So many of one status and reason."""

    status: str
    reason: str
    retryable: bool
    rows: int


class UnitCounts(NamedTuple):
    """The lines of a unit, COUNTS_SCHEMA, and those of attempts apart."""

    lines: pa.Table
    attempts: list[Attempts]


def has_counted(columns: Sequence[str]) -> list[str]:
    """Which of these columns of a unit `count_rows` reads."""
    return [*COUNTED, *(name for name in ("split", *CLIP_COLUMNS) if name in columns)]


def count_rows(rows: pa.Table, columns: Sequence[str]) -> UnitCounts:
    """The counts of a unit.

    Args:
        rows: those of the unit; at least the columns that `has_counted` names.
        columns: names of all columns that it has.
    """
    further = sorted(set(columns) - set(META_SCHEMA.names))
    parts = [_lines("column", names=further, counts=[1] * len(further))]
    for retryable in (False, True):
        some = rows.filter(pc.equal(rows["retryable"], retryable))
        if some.num_rows:
            counted = pa.concat_tables(_count(some))
            same = pa.repeat(retryable, len(counted))
            parts.append(counted.set_column(3, COUNTS_SCHEMA.field("retryable"), same))
    lines = pa.concat_tables(parts).combine_chunks()
    return UnitCounts(lines, _attempts([lines])[0])


def _count(rows: pa.Table) -> Iterator[pa.Table]:
    # A tar that is used in place may have a URL as well, of a bucket.
    on_web = pc.match_substring_regex(rows["url"], r"(?i)^\s*https?://")
    for status in pc.unique(rows["status"]).to_pylist():
        ours = pc.equal(rows["status"], status)
        reasons = pc.fill_null(rows["reason"].filter(ours), "" if status == "kept" else "no reason given")
        yield _named(f"{_STATUS}{status}", reasons)
        yield _named(f"host {status}", hosts_of(rows["url"].filter(pc.and_(ours, on_web))))
    yield _valued("http", pc.drop_null(rows["http_status"]).to_numpy())
    yield from _count_kept(rows.filter(pc.equal(rows["status"], "kept")))


def _count_kept(kept: pa.Table) -> Iterator[pa.Table]:
    yield _named("format", kept["format"])
    yield _named("label", pc.list_flatten(kept["labels"]))
    yield _valued("labels", pc.list_value_length(kept["labels"]).to_numpy())
    if "split" in kept.column_names:
        yield _named("split", kept["split"].cast(pa.string()))
    widths, heights = (kept[name].to_numpy() for name in ("width", "height"))
    measures = {
        "width": widths,
        "height": heights,
        "short side": np.minimum(widths, heights),
        "long side": np.maximum(widths, heights),
        "size": kept["size"].to_numpy(),
    }
    single: list[tuple[str, int, int]] = []
    if set(CLIP_COLUMNS) <= set(kept.column_names):
        clips = kept.filter(pc.equal(kept["media"], "video"))
        yield _named("video codec", clips["video_codec"])
        yield _named("audio codec", clips["audio_codec"])
        measures["ms"], measures["gap"] = (
            pc.drop_null(clips[name]).to_numpy() for name in ("duration_ms", "max_keyframe_gap_ms")
        )
        quiet = pc.sum(pc.less(clips["loudness_db"], QUIET_DB)).as_py() or 0
        still = pc.sum(pc.greater_equal(clips["still"], STILL)).as_py() or 0
        single += [("clip", 0, clips.num_rows), ("quiet", 0, quiet), ("still", 0, still)]
    for what, values in measures.items():
        if len(values):
            exact = values.astype(np.int64)
            yield _valued(what, rounded(exact))
            single += [(f"least {what}", exact.min(), 1), (f"most {what}", exact.max(), 1)]
            single.append((f"total {what}", 0, exact.sum()))
    if single:
        whats, numbers, counts = zip(*single, strict=True)
        yield _lines(whats, values=numbers, counts=counts)


def _named(what: str, names: pa.ChunkedArray) -> pa.Table:
    found = pc.value_counts(pc.drop_null(names))
    return _lines(what, names=found.field("values"), counts=found.field("counts"))


def _valued(what: str, values: NDArray[Any]) -> pa.Table:
    found, counts = np.unique(values, return_counts=True)
    return _lines(what, values=found, counts=counts)


def _lines(what: str | Sequence[str], *, counts: Any, names: Any = None, values: Any = None) -> pa.Table:
    size = len(counts)
    columns = [
        pa.repeat(what, size) if isinstance(what, str) else pa.array(what),
        pa.repeat("", size) if names is None else pa.array(names, pa.string()),
        pa.repeat(np.int64(0), size) if values is None else pa.array(values).cast(pa.int64()),
        pa.repeat(False, size),
        pa.array(counts, pa.int64()),
    ]
    return pa.table(columns, schema=COUNTS_SCHEMA)


def counts_bytes(counts: UnitCounts, meta_sha256: bytes) -> bytes:
    """The file beside the commit of the unit whose metadata has this sha256."""
    buffer = io.BytesIO()
    pq.write_table(
        counts.lines,
        buffer,
        # Zstandard's beginning takes longer than all else of a small unit.
        compression="lz4",
        row_group_size=max(1, len(counts.lines)),
        write_statistics=False,
        store_schema=False,
        use_dictionary=["what"],
        column_encoding={
            "name": "DELTA_LENGTH_BYTE_ARRAY",
            "value": "DELTA_BINARY_PACKED",
            "count": "DELTA_BINARY_PACKED",
        },
    )
    data = buffer.getvalue()
    return data + hashlib.sha256(meta_sha256 + data).digest()


def read_counts(store: Store, units: Sequence[Mapping[str, Any]]) -> Iterator[UnitCounts | None]:
    """The counts of each of these units, from the files beside their commits; None of those to be counted.

    Args:
        store: the dataset's files.
        units: rows of the sealed list.
    """
    for start in range(0, len(units), _READ_AT_ONCE):
        some = units[start : start + _READ_AT_ONCE]
        names = [layout.counts_name(unit["unit"], unit["meta_sha256"].hex()) for unit in some]
        lines = [_lines_in(*each) for each in zip(some, _there(store, names), strict=True)]
        attempts = iter(_attempts([each for each in lines if each is not None]))
        for unit, found in zip(some, lines, strict=True):
            counts = None if found is None else UnitCounts(found, next(attempts))
            yield counts if counts is None or _agree(counts, unit) else None


def _there(store: Store, names: Sequence[str]) -> Iterator[bytes | None]:
    try:
        yield from list(store.read_many(names))
    except OSError:  # such as a folder in the place of one
        for name in names:
            try:
                yield store.read(name)
            except OSError:
                yield None


def _lines_in(unit: Mapping[str, Any], data: bytes | None) -> pa.Table | None:
    """What is in a file, if it is this unit's, whole, and can be added up."""
    if data is None:
        return None
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(unit["meta_sha256"] + body).digest() != digest:
        return None
    try:
        with pq.ParquetFile(pa.BufferReader(body)) as parquet:
            lines = parquet.read(use_threads=False)
        lines.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    if lines.schema.remove_metadata() != COUNTS_SCHEMA:
        return None
    numbers = [lines[name].to_numpy() for name in ("value", "count")]
    return (
        lines if all(0 <= each.min(initial=0) <= each.max(initial=0) <= _MOST for each in numbers) else None
    )


def _attempts(units: Sequence[pa.Table]) -> list[list[Attempts]]:
    """The lines of attempts of each unit: of many at once, for one alone takes longer than to read it."""
    found: list[list[Attempts]] = [[] for _ in units]
    if not units:
        return found
    every = pa.concat_tables(units)
    places = np.flatnonzero(pc.starts_with(every["what"], _STATUS).to_numpy())
    owners = np.searchsorted(np.cumsum([len(lines) for lines in units]), places, side="right")
    lines = every.select(["what", "name", "retryable", "count"]).take(places)
    for owner, what, *others in zip(
        owners.tolist(), *(each.to_pylist() for each in lines.columns), strict=True
    ):
        found[owner].append(Attempts(what.removeprefix(_STATUS), *others))
    return found


def _agree(counts: UnitCounts, unit: Mapping[str, Any]) -> bool:
    """Whether there are as many attempts of each status as were sealed."""
    sums = Counter[str]()
    for each in counts.attempts:
        sums[each.status] += each.rows
    return sums == Counter({status: unit[status] for status in _STATUSES})
