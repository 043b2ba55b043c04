"""Videos as rows to plan: one for each part that becomes a clip.

Of a file that can be opened, the parts follow from the length that its headers claim; of a list that names
parts, they are those. A URL that names none is one row: nobody has seen its headers yet.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyarrow as pa

from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.schema import SPAN_COLUMNS, VIDEO_SCHEMA
from ingest.plan.settings import CrawlSettings
from ingest.sources.file_list import ListedFiles
from ingest.sources.folder import FolderSource
from ingest.sources.source import Found, Images, Item, Listing
from ingest.sources.url_list import own_names
from ingest.video.check import VideoTreatment
from ingest.video.probe import seconds_of
from ingest.video.segments import Span, segments

# A header may claim any length; so long is no video.
_LONGEST_VIDEO = 12 * 3_600.0
# As lists name the columns of parts; the first that is there counts.
_START_NAMES = ("start", "start_seconds", "start_time", "time_start", "begin")
_END_NAMES = ("end", "end_seconds", "end_time", "time_end", "stop")
_START, _END = SPAN_COLUMNS.names


def span_of(row: Mapping[str, Any]) -> Span | None:
    """The part of a video that a row of a plan means; None if all of it."""
    start, end = row.get(_START), row.get(_END)
    return None if start is None or end is None else Span(start / 1000, end / 1000)


class Segmented:
    """A `Listing`, whose rows are parts of videos.

    Args:
        listing: of videos.
        files: to look at their headers; None if that cannot be done.
        settings: of the crawl.
    """

    def __init__(self, listing: Listing, files: Images | None, settings: CrawlSettings) -> None:
        self.name = listing.name
        self.kind = listing.kind
        self._listing = listing
        self._files = files
        self._limits = settings.treatment.limits
        self._longest = (settings.video or VideoTreatment()).segment_seconds
        self._names = own_names(listing.extra.names, VIDEO_SCHEMA.names)
        lower = {name.lower(): name for name in reversed(listing.extra.names)}
        self._starts, self._ends = (
            next((lower[name] for name in names if name in lower), None)
            for names in (_START_NAMES, _END_NAMES)
        )

    @property
    def extra(self) -> pa.Schema:
        """The listing's, and which part."""
        own = [field.with_name(self._names[field.name]) for field in self._listing.extra]
        return pa.schema([*own, *SPAN_COLUMNS])

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        """Of the videos: which parts they have follows from them."""
        return self._listing.describe(listed, found)

    def close(self) -> None:
        self._listing.close()
        if self._files is not None:
            self._files.close()

    def rows(self) -> Iterator[pa.Table]:
        for table in self._listing.rows():
            parts: list[tuple[int, str, Span | None]] = []
            for number, row in enumerate(table.to_pylist()):
                problem, spans = (row["problem"], None) if row["problem"] else self._parts(row)
                parts += [(number, problem, span) for span in spans or (None,)]
            named = table.rename_columns([self._names.get(name, name) for name in table.column_names])
            yield _taken(named, parts)

    def _parts(self, row: Mapping[str, Any]) -> tuple[str, Sequence[Span] | None]:
        """A problem, and the parts; None if it is one as it is."""
        first, last = (
            None if name is None or row[name] == "" else row[name] for name in (self._starts, self._ends)
        )
        named = first is not None or last is not None
        if named:
            try:
                start = 0.0 if first is None else seconds_in(first)
                end = start + self._longest if last is None else seconds_in(last)
            except ValueError:
                return "misread_value", None
            if not 0 <= start < end:
                return "misread_value", None
            seconds = end - start
        elif self._files is None or not row["size"] <= self._limits.max_bytes:
            return "", None
        else:
            start, found = 0.0, self._seconds(row)
            if found is None:
                return "", None
            seconds, end = found, found
        if seconds > _LONGEST_VIDEO:
            return "too_long", None
        parts = segments(seconds, self._longest, start=start)
        return "", [Span(start, end)] if parts is None and named else parts

    def _seconds(self, row: Mapping[str, Any]) -> float | None:
        place = f"{self.name}/{row['path'].decode('utf-8', 'backslashreplace')}"
        with self._opened(row) or nullcontext() as file:
            return None if file is None else seconds_of(file, place=place, max_pixels=self._limits.max_pixels)

    def _opened(self, row: Mapping[str, Any]) -> io.BufferedIOBase | None:
        """A film on disk is not read as a whole for its headers."""
        if isinstance(self._files, FolderSource | ListedFiles):
            return self._files.opened(row["path"])
        assert self._files is not None
        item = Item(row["path"], offset=row["offset"], size=row["size"])
        (data,) = self._files.read([item], max_bytes=self._limits.max_bytes)
        return io.BytesIO(data) if isinstance(data, bytes) else None


def seconds_in(value: object) -> float:
    """Seconds, of a number or a text: 12.5, or 1:02:03.5 in hours, minutes and seconds.

    Raises:
        ValueError: it is neither.
    """
    seconds = 0.0
    parts = str(value).strip().split(":")
    if len(parts) > 3:
        raise ValueError(value)
    for part in parts:
        seconds = 60 * seconds + float(part)
    if not seconds <= _LONGEST_VIDEO * 1_000:  # or NaN
        raise ValueError(value)
    return seconds


def _taken(table: pa.Table, parts: Sequence[tuple[int, str, Span | None]]) -> pa.Table:
    """A row for each part, of the row of this number."""
    rows = table.take(pa.array([number for number, _, _ in parts], pa.int64()))
    at = rows.column_names.index("problem")
    rows = rows.set_column(at, "problem", pa.array([problem for _, problem, _ in parts], pa.string()))
    for name, side in ((_START, 0), (_END, 1)):
        column = [None if span is None else round(1000 * span[side]) for _, _, span in parts]
        rows = rows.append_column(name, pa.array(column, pa.int64()))
    return rows
