"""What became of a unit's rows, from the order in which they end to the order in which they were planned.

What comes early waits: in memory as long as a budget lasts that all units under way share, else in a file. So
one slow site delays its unit's end and nothing else, and memory stays bounded: of a row that waits in the
file, there is a number in memory.

The file may outlive its process: once a unit has been open for a while, every result goes there, whether it
waits or not, and whoever goes on with the unit asks for the rest only (`ingest.crawl.kept`). Records follow
each other in it. One that was torn by a kill or a full disk ends what is believed of a file, and so does one
that says anything else than what was kept.
"""

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal, NamedTuple, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ingest.dataset.layout import EXTENSIONS
from ingest.dataset.schema import VIDEO_SCHEMA
from ingest.image.check import Checked

# The mark of a record, the lengths of its text and of its bytes, and the CRC-32 of all but the bytes: these
# have a digest in the text.
_HEAD = struct.Struct("<4sIQI")
_MARK = b"IRS1"
_MOST_TEXT = 1 << 20
_MOST_BYTES = 1 << 30
_DIGESTED = 1 << 20  # at a time
_MOST_PIECE = 32 << 20
_AT_FAULT = "a file of results does not read back as it was written: the disk is at fault"
_FILE_BITS = 40
# Of what waits in memory, besides its bytes.
_ROW_BYTES = 1024

_Small = Annotated[int, Field(ge=0, lt=1 << 32)]


class Result(NamedTuple):
    """What became of a row.

    Attributes:
        verdict: without bytes.
        retryable: whether a later attempt may fare better.
        http_status: what the server answered, if one did.
    """

    verdict: Checked
    retryable: bool = False
    http_status: int | None = None


@dataclass
class Memory:
    """Bytes that may still be kept in memory."""

    left: int


class _Text(BaseModel):
    """A result as a file says it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    row: int
    retryable: bool
    http_status: Annotated[int, Field(ge=0, lt=1 << 15)] | None
    status: Literal["kept", "rejected", "failed"]
    reason: str
    format: str | None
    width: _Small | None
    height: _Small | None
    original_width: _Small | None
    original_height: _Small | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    phash: Annotated[int, Field(ge=0, lt=1 << 64)] | None
    columns: dict[str, str | int | float | bool | None]

    @model_validator(mode="after")
    def _fits_a_row(self) -> Self:
        """Who writes to the folder must not end the crawl, nor damage the dataset."""
        if self.status == "kept" and (
            self.format not in EXTENSIONS or self.width is None or self.height is None
        ):
            raise ValueError("what is kept has a format and a size")
        try:
            for name, value in self.columns.items():
                pa.scalar(value, VIDEO_SCHEMA.field(name).type)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError("no column of clips") from error
        return self

    def result(self) -> Result:
        verdict = self.model_dump(exclude={"row", "retryable", "http_status"})
        return Result(Checked(**verdict), self.retryable, self.http_status)


class _Found(NamedTuple):
    row: int
    result: Result
    offset: int
    size: int


class _ResultFile:
    """A file of records, which one process appends to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = self._saved = os.fstat(descriptor).st_size

    def close(self) -> None:
        os.close(self._descriptor)

    def begin(self, header: bytes) -> None:
        """Say whose results these are."""
        self._append(header, b"")
        self._saved = self._end

    def unsaved(self) -> "Pieces | None":
        """What was appended since the last call."""
        start, self._saved = self._saved, self._end
        return Pieces(os.dup(self._descriptor), start, self._end) if start < self._end else None

    def append(self, row: int, result: Result, data: bytes) -> int:
        """Add a record; where it lies."""
        verdict = vars(result.verdict).copy()
        del verdict["data"]
        verdict["columns"] = dict(verdict["columns"])
        text = {"row": row, "retryable": result.retryable, "http_status": result.http_status, **verdict}
        return self._append(json.dumps(text).encode(), data)

    def read(self, offset: int) -> tuple[Result, bytes]:
        """The record that lies there."""
        record = self._text(offset)
        data = b"" if record is None else os.pread(self._descriptor, record[2], record[1])
        if record is None or len(data) != record[2]:
            raise OSError(_AT_FAULT)
        return _Text.model_validate_json(record[0]).result(), data

    def after(self, offset: int) -> int:
        """Where the record that lies there ends."""
        record = self._text(offset)
        if record is None:
            raise OSError(_AT_FAULT)
        return record[1] + record[2]

    def piece(self, start: int, stop: int) -> bytes:
        """Of the file, as they are."""
        data = os.pread(self._descriptor, stop - start, start)
        if len(data) != stop - start:
            raise OSError(_AT_FAULT)
        return data

    def found(self, header: bytes) -> Iterator[_Found]:
        """The records after this header, which may come again, up to the first that is not whole."""
        record = self._text(0)
        if record is None or record[0] != header:
            return
        offset = record[1]
        while (record := self._text(offset)) is not None:
            text, start, size = record
            if text == header:  # pieces follow each other
                offset = start + size
                continue
            try:
                said = _Text.model_validate_json(text)
            except ValidationError:
                return
            if said.status == "kept":
                if said.sha256 != self._digest(start, size):
                    return
            elif size:
                return
            yield _Found(said.row, said.result(), offset, size)
            offset = start + size

    def _append(self, text: bytes, data: bytes) -> int:
        offset = self._end
        lengths = _HEAD.pack(_MARK, len(text), len(data), 0)[:-4]
        checksum = zlib.crc32(text, zlib.crc32(lengths))
        left = memoryview(b"".join((lengths, struct.pack("<I", checksum), text, data)))
        while left:  # a disk that is nearly full takes a part
            left = left[os.pwrite(self._descriptor, left, self._end) :]
            self._end = offset + _HEAD.size + len(text) + len(data) - len(left)
        return offset

    def _text(self, offset: int) -> tuple[bytes, int, int] | None:
        """A record's text, and where its bytes begin and how many they are; None if it is not whole."""
        head = os.pread(self._descriptor, _HEAD.size, offset)
        if len(head) < _HEAD.size:
            return None
        mark, length, size, checksum = _HEAD.unpack(head)
        start = offset + _HEAD.size + length
        if mark != _MARK or length > _MOST_TEXT or size > _MOST_BYTES or start + size > self._end:
            return None
        text = os.pread(self._descriptor, length, offset + _HEAD.size)
        return (text, start, size) if zlib.crc32(text, zlib.crc32(head[:-4])) == checksum else None

    def _digest(self, start: int, size: int) -> str:
        digest = hashlib.sha256()
        for offset in range(start, start + size, _DIGESTED):
            digest.update(os.pread(self._descriptor, min(_DIGESTED, start + size - offset), offset))
        return digest.hexdigest()


def whole(descriptor: int, header: bytes) -> int:
    """How many bytes of a file of results there are up to the first record that is not whole; closes it."""
    file, end = _ResultFile(descriptor), 0
    for found in file.found(header):
        end = file.after(found.offset)
    file.close()
    return end


class Pieces:
    """Some of a file's records as files by themselves, of bounded size; for another thread.

    Args:
        descriptor: of the file; it is closed with this.
        start, end: where they begin and end.
    """

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self._file = _ResultFile(descriptor)
        self._start = start
        self._end = end

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        header = self._file.piece(0, self._file.after(0))
        first = offset = self._start
        while offset < self._end:
            after = self._file.after(offset)
            if after - first > _MOST_PIECE and offset > first:
                yield header + self._file.piece(first, offset)
                first = offset
            offset = after
        yield header + self._file.piece(first, self._end)


class Results:
    """Results of the rows 0, 1, 2, … of one unit, each with its bytes, given in any order and handed on in
    order.

    Args:
        rows: of the unit.
        memory: shared by all units under way.
        new_file: makes the file for them, and returns its descriptor.
        header: what the file begins with: whose results these are.

    Attributes:
        next: the row that is due.
        keeps: every result goes to the file; otherwise those for which memory lacks.
    """

    def __init__(
        self, rows: int, memory: Memory, *, new_file: Callable[[], int], header: bytes = b""
    ) -> None:
        self._rows = rows
        self._memory = memory
        self._new_file = new_file
        self._header = header
        self.keeps = False
        self._own: _ResultFile | None = None
        self._files: list[_ResultFile] = []
        self._held: dict[int, tuple[Result, bytes]] = {}
        # Where each row's record is: its file's number and its offset, or -1.
        self._at = self._nowhere()
        self._kept = self._nowhere()
        self.next = 0

    def load(
        self, descriptors: Iterable[int], *, lasts: Callable[[Result], bool] = lambda result: True
    ) -> Iterator[tuple[Result, int]]:
        """Look for what earlier processes have kept, before all else; yields each result, and the number of
        its bytes.

        Args:
            descriptors: of their files.
            lasts: whether a result is one for this process, too.
        """
        for descriptor in descriptors:
            file, of_use = self._add(descriptor), False
            for row, result, offset, size in file.found(self._header):
                if 0 <= row < self._rows and self._kept[row] < 0 and lasts(result):
                    self._kept[row] = self._place(file, offset)
                    of_use = True
                    yield result, size
            if not of_use:  # anybody may put thousands there, and each takes a descriptor
                self._files.remove(file)
                file.close()

    def is_kept(self, row: int) -> bool:
        """Whether that has found this row."""
        return self._kept[row] >= 0

    def take_up(self, row: int) -> Iterator[tuple[Result, bytes]]:
        """Take what was found of a row; yields all that are due now."""
        self._at[row] = self._kept[row]
        yield from self._due()

    def unsaved(self) -> Pieces | None:
        """What went to the file since the last call."""
        return None if self._own is None else self._own.unsaved()

    def keep(self, written: Iterable[tuple[Result, bytes]]) -> None:
        """From now on all results go to the file, and so do those that came before.

        Args:
            written: those that were due, in order.
        """
        self.keeps = True
        for row, (result, data) in chain(enumerate(written), self._held.items()):
            if self._at[row] < 0:
                self._at[row] = self._append(row, result, data)

    def put(self, row: int, result: Result, data: bytes) -> Iterator[tuple[Result, bytes]]:
        """Take one; yields all that are due now. Each row comes once."""
        fits = len(data) + _ROW_BYTES <= self._memory.left
        is_due = row == self.next
        if self.keeps or not (fits or is_due):
            self._at[row] = self._append(row, result, data)
        if is_due:
            self.next += 1
            yield result, data
            yield from self._due()
        elif fits:
            self._memory.left -= len(data) + _ROW_BYTES
            self._held[row] = result, data

    def close(self) -> None:
        """Let go of what still waits; files stay as they are."""
        while self._held:
            self._release(self._held.popitem()[1])
        for file in self._files:
            file.close()
        self._files.clear()

    def _nowhere(self) -> "array[int]":
        return array("q", [-1]) * self._rows

    def _due(self) -> Iterator[tuple[Result, bytes]]:
        while self.next < self._rows:
            if self.next in self._held:
                due = self._release(self._held.pop(self.next))
            elif (place := self._at[self.next]) >= 0:
                due = self._files[place >> _FILE_BITS].read(place & ((1 << _FILE_BITS) - 1))
            else:
                return
            self.next += 1
            yield due

    def _release(self, held: tuple[Result, bytes]) -> tuple[Result, bytes]:
        self._memory.left += len(held[1]) + _ROW_BYTES
        return held

    def _append(self, row: int, result: Result, data: bytes) -> int:
        if self._own is None:
            self._own = self._add(self._new_file())
            self._own.begin(self._header)
        return self._place(self._own, self._own.append(row, result, data))

    def _add(self, descriptor: int) -> _ResultFile:
        self._files.append(_ResultFile(descriptor))
        return self._files[-1]

    def _place(self, file: _ResultFile, offset: int) -> int:
        return self._files.index(file) << _FILE_BITS | offset
