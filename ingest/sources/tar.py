"""A tar, plain or compressed by gzip, bzip2, xz or Zstandard: its files, in the order of the archive.

A member that is a plain tar itself, as ImageNet's are, stands for its own members: they lie in it as in a
folder called like it without `.tar`, which is their label. That goes one level deep. A link to a member
before it has that member's data. Archives that follow each other in one file, as `cat` puts them, are one.

What `ingest.sources.companions` knows as companions of an image goes into the image's row. Nothing is ever
extracted: a member's name is a label.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.problem import PROBLEMS, Problem
from ingest.sources.companions import COLUMNS, LARGEST_COMPANION, Member, joined, member_of
from ingest.sources.source import Item, first_folder
from ingest.sources.tar_bytes import TarError, Unpacked, Window
from ingest.sources.tar_members import BLOCK, files, read_header
from ingest.store.files import open_file


class TarSource:
    """Images in a tar, a local one or one in a bucket; see the module's docstring."""

    kind = SourceKind.TAR
    extra = COLUMNS

    def __init__(self, place: Path | str) -> None:
        self.name = os.fsencode(PurePath(place).name).decode("utf-8", "backslashreplace")
        self._place = place
        self._unpacked: Unpacked | None = None

    def describe(self) -> SourceRecord:
        with open_file(self._place) as file:
            return SourceRecord(kind=self.kind, name=self.name, bytes=file.seek(0, os.SEEK_END))

    def shard(self) -> None:
        """Its images are copied."""

    def items(self) -> Iterator[Item]:
        """Regular members without hidden names. A damaged archive ends in an item that says so."""
        with Unpacked(self._place) as unpacked:
            yield from joined(_listed(unpacked))

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            if item.problem:
                yield PROBLEMS[item.problem]
            elif item.size > max_bytes:
                yield PROBLEMS["too_many_bytes"]
            else:
                yield self._bytes(item)

    def _bytes(self, item: Item) -> bytes | Problem:
        try:
            # Kept open from unit to unit: a compressed archive is unpacked once, not once per unit.
            if self._unpacked is None:
                self._unpacked = Unpacked(self._place)
            return self._unpacked.exactly(item.offset, item.size)
        except TarError as error:
            self.close()
            return PROBLEMS[error.problem]
        except OSError:  # it cannot even be opened
            return PROBLEMS["io_error"]

    def close(self) -> None:
        if self._unpacked is not None:
            self._unpacked.close()
            self._unpacked = None


def is_tar(place: Path | str) -> bool:
    """Whether this is an archive that can be read from its first block on."""
    with Unpacked(place) as unpacked:
        try:
            block = unpacked.exactly(0, BLOCK)
        except TarError:
            return False
    return not block.strip(b"\0") or read_header(block) is not None


def _listed(archive: Unpacked) -> Iterator[Member]:
    """The members without hidden names, and at once what companions say: going back would be slow."""

    def beginning(item: Item) -> bytes | None:
        try:
            return archive.exactly(item.offset, min(item.size, LARGEST_COMPANION))
        except TarError:
            return None  # its row will say so

    try:
        for item in _members(archive):
            if not any(part.startswith(b".") for part in item.path.split(b"/")):
                yield member_of(item, beginning)
    except TarError as error:
        # What is not planned, no retry tries.
        problem = "archive_unreadable" if error.problem == "io_error" else error.problem
        yield member_of(Item(b"", problem=problem), beginning)


def _members(archive: Unpacked) -> Iterator[Item]:
    """The regular files of an archive, and those of the tars in it."""
    for item in files(archive, 0):
        if item.problem or not item.path.lower().endswith(b".tar") or not _begins_a_tar(archive, item):
            yield item
            continue
        folder, count = item.path[: -len(b".tar")], 0
        try:
            for inner in files(Window(archive, item.offset + item.size), item.offset):
                path, labels = folder + b"/" + inner.path, first_folder(folder.rpartition(b"/")[2] + b"/")
                if not inner.path:  # a damaged place
                    path, labels = item.path, item.labels
                elif b"/" in inner.path:
                    labels = first_folder(path)
                yield replace(inner, path=path, labels=labels)
                count += 1
        except TarError as error:
            if error.problem == "io_error":
                raise
            # What follows the member can be read all the same, if there is more.
            yield Item(item.path, problem=error.problem, labels=first_folder(item.path))
        else:
            if not count:
                yield item


def _begins_a_tar(archive: Unpacked, item: Item) -> bool:
    try:
        return read_header(archive.at_most(item.offset, min(item.size, BLOCK))) is not None
    except TarError:
        return False
