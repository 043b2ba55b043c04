"""Where a dataset's files lie: a POSIX folder, a bucket, or a web server.

Names are relative to the dataset (`ingest.dataset.layout` has them), with forward slashes. A file becomes
visible whole or not at all, and what is created if absent is created once, whoever asks and however often. A
kill may leave unfinished writes, which no reader sees.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

READS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a store.

    Attributes:
        name: relative to the store.
        bytes: its size.
        modified: when it was written, seconds since 1970.
        upload: of an unfinished write, what the store knows it by; empty for others.
    """

    name: str
    bytes: int
    modified: float
    upload: str = ""


class Draft(Protocol):
    """A file being made, seen by nobody; it vanishes unless it is published."""

    @property
    def file(self) -> io.BufferedIOBase:
        """To write, and to read back."""

    def publish(self, name: str, sha256: str) -> None:
        """Make the file durable under its content name, after what was written was read back.

        Two workers that made the same bytes use the same name: either's file serves both.

        Raises:
            OSError: what comes back is not what was written, or it cannot be written.
        """


class Store(Protocol):
    """The operations that datasets are made of. All raise OSError for trouble that repeating did not mend.

    Attributes:
        root: the folder or URL; names are below it.
    """

    @property
    def root(self) -> Path | str: ...

    def where(self, name: str) -> Path | str:
        """The file's whole path or URL."""

    def prepare(self) -> None:
        """Make sure that files can be written here.

        Raises:
            UserError: the place is not there and cannot be made.
        """

    def read(self, name: str) -> bytes:
        """The file; FileNotFoundError if there is none."""

    def read_many(self, names: Sequence[str], *, at_once: int = READS_AT_ONCE) -> Iterator[bytes | None]:
        """The files in the order of their names, None for those that are not there; so many at once,
        where one takes long.
        """

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on: fewer only where the file ends."""

    def open(self, name: str) -> io.BufferedIOBase:
        """The file, to read and seek in; FileNotFoundError if there is none."""

    def size(self, name: str) -> int:
        """Bytes of the file; FileNotFoundError if there is none."""

    def exists(self, name: str) -> bool: ...

    def list(self, folder: str) -> Iterator[Entry]:
        """Every file below a folder, sorted by name; none if there is no such folder."""

    def unfinished(self, folder: str) -> Iterator[Entry]:
        """Writes below a folder that have not ended: in progress, or left by a kill."""

    def create_if_absent(self, name: str, data: bytes) -> bytes:
        """Publish `data` under this name unless something is there; returns what is there afterwards."""

    def replace(self, name: str, data: bytes) -> None:
        """Move the name to new content in one step: readers see the old bytes or the new ones."""

    def draft(self, stem: str) -> AbstractContextManager[Draft]:
        """A new file to write, for a name that starts with `stem`."""

    def delete(self, entry: Entry) -> None:
        """Remove a file, or an unfinished write; no error if it is gone."""
