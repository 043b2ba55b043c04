"""Images that a web crawl stored: the image responses of a local WARC, in the order of the file.

An item is a response with status 200 or 203, or a resource, that says it is an image or begins like one.
Compression must be record by record, as the standard wants it, for a record is read from its own offset.
What is damaged is an item without a name; what follows it is read.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.dataset.schema import NO_COLUMNS
from ingest.image.header import sniff
from ingest.problem import PROBLEMS, Problem
from ingest.sources.source import Item
from ingest.sources.warc_message import message
from ingest.sources.warc_records import RESOURCE, RESPONSE, STARTS, ArchiveError, Stored, records, target
from ingest.web.opt_outs import ALL, OptOut, image_opt_out

# Enough for every magic number, through a content coding.
_BEGINNING = 4096


class WarcSource:
    """Images in a WARC; see the module's docstring."""

    kind = SourceKind.WARC
    extra = NO_COLUMNS

    def __init__(self, path: Path, *, heeded: frozenset[OptOut] = ALL) -> None:
        """
        Args:
            path: the file.
            heeded: ways to opt out that are obeyed of the answers that it stores.
        """
        self.name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        self._path = path
        self._heeded = heeded
        self._file: BinaryIO | None = None

    def describe(self) -> SourceRecord:
        return SourceRecord(kind=self.kind, name=self.name, bytes=self._path.stat().st_size)

    def shard(self) -> None:
        """Its images are copied."""

    def items(self) -> Iterator[Item]:
        """Image responses and resources, and what is damaged."""
        told = -1
        try:
            with self._path.open("rb") as file:
                for found in records(file, RESPONSE | RESOURCE):
                    if isinstance(found, ArchiveError):
                        if found.at != told:
                            yield Item(b"", offset=found.at, problem=found.problem)
                        continue
                    item = self._item(found)
                    if item and item.problem.startswith("warc_"):
                        told = found.at
                    if item and not os.pread(file.fileno(), 5, item.offset).startswith(STARTS):
                        item = Item(item.path, size=item.size, problem="warc_not_by_record")
                    if item:
                        yield item
        except (ArchiveError, OSError):
            # What is not planned, no retry tries.
            yield Item(b"", problem="archive_unreadable")

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            yield PROBLEMS[item.problem] if item.problem else self._bytes(item, max_bytes)

    def _item(self, stored: Stored) -> Item | None:
        at, record = stored
        size = record.content_length
        try:
            found = message(record, max_bytes=_BEGINNING)
        except ArchiveError as error:
            if error.problem == "io_error":
                raise
            return Item(target(record), offset=at, size=size, problem=error.problem)
        if found is None or found.status not in (200, 203):
            return None
        if not (found.content_type.startswith("image/") or sniff(found.body)):
            return None
        problem = "response_truncated" if found.truncated else ""
        if (opt_out := image_opt_out(found.said, self._heeded)) is not None:
            problem = opt_out.value
        return Item(target(record), offset=at, size=size, problem=problem)

    def _bytes(self, item: Item, max_bytes: int) -> bytes | Problem:
        try:
            if self._file is None:
                self._file = self._path.open("rb")
            self._file.seek(item.offset)
            stored = next(records(self._file), None)
            if not isinstance(stored, Stored) or target(stored.record) != item.path:
                return PROBLEMS["warc_damaged"]
            found = message(stored.record, max_bytes=max_bytes)
        except ArchiveError as error:
            return PROBLEMS[error.problem]
        except OSError:
            return PROBLEMS["io_error"]
        if found is None:
            return PROBLEMS["warc_damaged"]
        return found.body if len(found.body) <= max_bytes else PROBLEMS["too_many_bytes"]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def is_warc(path: Path) -> bool:
    """Whether this begins with the record of a web archive, or is called one and holds one."""
    called = ".warc" in path.suffixes
    try:
        with path.open("rb") as file:
            found = records(file)
            return any(isinstance(each, Stored) for each in (found if called else islice(found, 1)))
    except (ArchiveError, OSError):
        return False
