"""The rows of a run that are new, though its files are made anew when it goes on; and which were sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from cluster.json_rows import Row, parse_row


class Rows:
    """A file of rows that grows. It is read from the byte on where the last whole line ended; from its start
    if it has been replaced or cut short, as a restart does, which forgets the steps that were not saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._offset = 0

    def new(self) -> Iterator[bytes]:
        """Whole lines since the last time; after a restart all of them, once more."""
        try:
            there = self._path.stat()
            # While the old one is open, no other file has its number.
            if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), there):
                self.close()
                self._file, self._offset = self._path.open("rb"), 0
        except FileNotFoundError:  # it has recorded nothing yet
            return
        if not _ends_a_line(self._file, self._offset):
            self._offset = 0
        self._file.seek(self._offset)
        for line in self._file:
            if not line.endswith(b"\n"):  # it is being written
                return
            self._offset += len(line)
            yield line

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _ends_a_line(file: BinaryIO, offset: int) -> bool:
    if offset == 0:
        return True
    file.seek(offset - 1)
    return file.read(1) == b"\n"


class Sent:
    """The rows that were sent, as they were: a file outside of the run, which grows by what is sent.

    A row takes the place of an earlier one of the same step and columns.
    """

    def __init__(self, path: Path) -> None:
        self._digests: dict[int, bytes] = {}
        whole = 0
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # not one that was cut short
                        whole += len(line)
                        self._note(line)
            os.truncate(path, whole)
        self._file = path.open("ab")

    def lacks(self, line: bytes) -> Row | None:
        """The row of a line, if it was not sent, or has changed since; None of one that is damaged, too."""
        row = parse_row(line)
        if row is None or not isinstance(row.get("step"), int):
            return None
        return None if self._digests.get(_slot(row)) == _digest(line) else row

    def add(self, lines: Sequence[bytes]) -> None:
        """Note that these are sent."""
        for line in lines:
            self._note(line)
        self._file.write(b"".join(lines))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _note(self, line: bytes) -> None:
        if (row := parse_row(line)) is not None:
            self._digests[_slot(row)] = _digest(line)


def _slot(row: Row) -> int:
    return hash((row.get("step"), *sorted(row)))


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()
