"""A list of URLs, here, in a bucket or at a URL, as rows to plan. What is in it, a fenced process reads."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import cast

import pyarrow as pa

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.fence.reading import end_waiting, read_fenced
from ingest.sources.remote_trouble import reading
from ingest.sources.source import Found
from ingest.sources.url_list import Columns, list_format, look, name_of, rows
from ingest.store.files import open_file


class UrlListing:
    """A `Listing` of a list of URLs.

    Args:
        location: what `open_file` opens.
        columns: which of its columns mean what.

    Attributes:
        extra: its further columns: those of the first rows, which stand for all.
        address_column: what it calls its column of URLs; None if it has no columns at all.
        first_paths: up to a thousand, of the first rows that can have images.

    Raises:
        UserError: it is not there, or has no column of URLs.
    """

    kind = SourceKind.URLS

    def __init__(self, location: str, columns: Columns) -> None:
        self.name = name_of(location)
        self._location = location
        self._format, self._compression = cast(tuple[str, str | None], list_format(location))
        self._columns = columns
        first, paths = self._read(look)
        self.extra = first.schema.remove_metadata()
        self._used: dict[str, str | None] = json.loads(first.schema.metadata[b"used"])
        self.address_column = self._used["url"]
        self.first_paths = [path.decode() for path in paths["path"].to_pylist()]

    def close(self) -> None:
        """It is planned: no list is read any more."""
        end_waiting()

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        """What the list is: a digest of its bytes, and which columns are used. Its rows are not looked at."""
        if found is not None:
            digest = found.sha256
        else:
            with self._open() as file, reading(self._location):
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        used = dict(self._used)
        if self._columns.names:
            used["names"] = ",".join(self._columns.names)
        used |= {f"type of {name}": kind for name, kind in sorted(self._columns.types.items())}
        return SourceRecord(kind=self.kind, name=self.name, sha256=digest, columns=used)

    def rows(self) -> Iterator[pa.Table]:
        """See `Listing`. The path of a row without a URL, and of a line that is no row, says where it is."""
        return self._read(rows)

    def _read(self, how: Callable[..., Iterator[pa.Table]]) -> Iterator[pa.Table]:
        with self._open() as file:
            yield from read_fenced(
                how,
                [file],
                {"location": self._location, "kind": self._format, "columns": asdict(self._columns)},
                place=f"the list {self._location}",
                compression=self._compression,
            )

    @contextmanager
    def _open(self) -> Iterator[io.BufferedIOBase]:
        with reading(f"the list {self._location}", deed="opened"):
            file = open_file(self._location)
        with file:
            yield file
