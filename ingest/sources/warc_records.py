"""The records of a WARC file, plain or compressed record by record (gzip, LZ4, Zstandard), one at a time.

fastwarc reads; this adds what damaged files need: an error where a file ends too early, which fastwarc takes
for its end, and what follows. What a record holds is told by `ingest.sources.warc_message`.
"""

import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from fastwarc.stream_io import GzipReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

RESPONSE = WarcRecordType.response
RESOURCE = WarcRecordType.resource
METADATA = WarcRecordType.metadata

_TYPES = {
    name.encode(): getattr(WarcRecordType, name)
    for name in (
        "warcinfo",
        "response",
        "resource",
        "request",
        "metadata",
        "revisit",
        "conversion",
        "continuation",
    )
}
# How records begin: gzip, LZ4, Zstandard, plain.
STARTS = (b"\x1f\x8b\x08", b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd", b"WARC/")
# Places in one file where a record might begin behind what is damaged, before the rest is given up; to read
# what stands there costs as much as to look at so many.
_MOST_PLACES = 1_000_000
_COST_OF_READING = 1_000
_PIECE = 1 << 20
_STEP = 1 << 16
_LONGEST_HEADER = 32 << 10
# With names in another case.
_LONGEST_RECORD = 256 << 20
_VERSION = re.compile(rb"WARC/[01]\.")
_HEADER = re.compile(rb"WARC/[^\r\n]*\r?\n(?:[^\r\n]+\r?\n)*\r?\n")
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,15})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_NAME = re.compile(rb"^[A-Za-z-]+(?=:)", re.MULTILINE)


class ArchiveError(Exception):
    """The file, or a record, cannot be read on from here; `problem` is a key of PROBLEMS.

    Attributes:
        at: where in the file the record begins that it is about.
    """

    def __init__(self, problem: str, at: int = 0) -> None:
        super().__init__(problem)
        self.problem = problem
        self.at = at


class Stored(NamedTuple):
    """A record, and where in the file it begins."""

    at: int
    record: WarcRecord


def records(
    file: BinaryIO, types: WarcRecordType = WarcRecordType.any_type
) -> Iterator[Stored | ArchiveError]:
    """Records of these types, from where the file stands. Each can be read until the next is asked for.

    What is damaged is one ArchiveError (warc_damaged or warc_truncated); after it come the records from the
    next beginning on that is one.

    Raises:
        ArchiveError: io_error.
    """
    at: int | None = file.tell() if file.seekable() else 0
    magic = b""
    budget = [_MOST_PLACES]
    try:
        if file.seekable():
            magic = file.read(5)
            file.seek(at or 0)
        while at is not None:
            damage: ArchiveError | None = None
            for found in _straight(file, at):
                if isinstance(found, ArchiveError):
                    damage = found
                elif int(found.record.record_type & types):
                    yield found
            if damage is None:
                return
            yield damage
            at = _next_start(file, damage.at + 1, magic, budget)
    except OSError as error:
        raise archive_error(error) from error


def _straight(file: BinaryIO, at: int) -> Iterator[Stored | ArchiveError]:
    """The records from `at` to the end, or to one error: about a record, or what is behind the last one."""
    try:
        for record in ArchiveIterator(file, parse_http=False, fsspec_args=False):
            at = record.stream_pos
            length = record.headers.get_bytes(b"Content-Length")
            # A header that the end of the file cuts short is no error to fastwarc.
            if length is None:
                yield ArchiveError("warc_truncated", at)
                return
            if record.content_length == 0 and length.strip(b" 0"):
                yield from _other_case(file, at)
                return
            yield Stored(at, _typed(record))
            if record.reader.tell() + record.consume() < record.content_length:
                yield ArchiveError("warc_truncated", at)
                return
        if file.seekable() and _more_begins(file, at):
            yield ArchiveError("warc_truncated", at)
    except OSError as error:
        if error.errno is not None:
            raise
        yield ArchiveError("warc_damaged", at)


def _more_begins(file: BinaryIO, at: int) -> bool:
    """Whether after the gzip member at `at`, that of the last record, another one begins."""
    file.seek(at)
    magic = file.read(2)
    file.seek(at)
    if magic != b"\x1f\x8b":
        return False
    members = GzipReader(file)
    members.read(1)
    first = members.frame_start_position()
    while members.read(1 << 20):
        pass
    return bool(members.frame_start_position() != first)


def _other_case(file: BinaryIO, at: int) -> Iterator[Stored | ArchiveError]:
    """Records in whose headers names are in another case, as the standard allows: fastwarc knows one only."""
    while True:
        file.seek(at)
        beginning = file.read(_LONGEST_HEADER)
        if not beginning.strip(b"\r\n"):
            return
        at += len(beginning) - len(beginning.lstrip(b"\r\n"))
        try:
            if beginning.startswith(STARTS[0]):
                data, end = _gzip_member(file, at)
            else:
                data, end = _plain_record(file, at)
            size = _size(data, at)
        except ArchiveError as error:
            yield error
            return
        if len(data) < size:
            yield ArchiveError("warc_truncated", at)
            return
        head = _NAME.sub(lambda name: b"-".join(map(_usual, name[0].split(b"-"))), _head(data, at))
        yield Stored(at, _typed(WarcRecord.from_bytes(head + data[len(head) :] + b"\r\n\r\n")))
        at = end


def _gzip_member(file: BinaryIO, at: int) -> tuple[bytes, int]:
    """What the member at `at` unpacks to, and where the next one begins.

    Raises:
        ArchiveError: it is damaged, cut short, or too much.
    """
    unpacker = zlib.decompressobj(31)
    file.seek(at)
    data, read = b"", 0
    while not unpacker.eof:
        piece = file.read(_PIECE)
        if not piece:
            raise ArchiveError("warc_truncated", at)
        read += len(piece)
        try:
            data += unpacker.decompress(piece, _LONGEST_RECORD + 1)
        except zlib.error:
            raise ArchiveError("warc_damaged", at) from None
        if len(data) > _LONGEST_RECORD:
            raise ArchiveError("warc_damaged", at)
    return data, at + read - len(unpacker.unused_data)


def _plain_record(file: BinaryIO, at: int) -> tuple[bytes, int]:
    """The bytes of the record at `at`, fewer where the file ends, and where it should end.

    Raises:
        ArchiveError: none begins there, or it is too much.
    """
    file.seek(at)
    size = _size(file.read(_LONGEST_HEADER), at)
    if size > _LONGEST_RECORD:
        raise ArchiveError("warc_damaged", at)
    file.seek(at)
    return file.read(size), at + size


def _head(data: bytes, at: int) -> bytes:
    """The head that a record begins with, and its empty line."""
    head = _HEADER.match(data)
    if head is None:
        raise ArchiveError("warc_damaged", at)
    return head[0]


def _size(data: bytes, at: int) -> int:
    """Bytes of a record, head and body, as its head has it."""
    head = _head(data, at)
    length = _LENGTH.search(head)
    if length is None:
        raise ArchiveError("warc_damaged", at)
    return len(head) + int(length[1])


def _usual(part: bytes) -> bytes:
    return part.upper() if part.upper() in (b"WARC", b"URI", b"ID", b"IP") else part.capitalize()


def _typed(record: WarcRecord) -> WarcRecord:
    """The record with its type, which fastwarc knows in the usual case only."""
    if int(record.record_type) in (0, int(WarcRecordType.unknown)):
        named = (record.headers.get_bytes(b"WARC-Type") or b"").strip().lower()
        record.record_type = _TYPES.get(named, WarcRecordType.unknown)
        if named in (b"response", b"request", b"revisit"):
            record.is_http = content_type(record.headers) == "application/http"
    return record


def _next_start(file: BinaryIO, at: int, magic: bytes, budget: list[int]) -> int | None:
    """Where, from `at` on, the next record begins as the first one does; None if none does.

    Args:
        file, at: see above.
        magic: the first bytes of the file.
        budget: how many places may be looked at; is counted down.
    """
    start = next((start for start in STARTS if magic.startswith(start)), None)
    if start is None or not file.seekable():
        return None
    while budget[0] > 0 and (found := _find(file, start, at)) is not None:
        file.seek(found)
        likely = _is_likely(start, file.read(_STEP >> 4))
        budget[0] -= _COST_OF_READING if likely else 1
        if likely:
            file.seek(found)
            first = next(_straight(file, found), None)
            if isinstance(first, Stored) and first.at == found:
                file.seek(found)
                return found
        at = found + 1
    return None


def _is_likely(start: bytes, data: bytes) -> bool:
    """Whether this may be a record, for what it costs to see it."""
    if start == STARTS[0]:
        try:
            data = zlib.decompressobj(31).decompress(data, 8)
        except zlib.error:
            return False
    return start not in (STARTS[0], STARTS[-1]) or _VERSION.match(data) is not None


def _find(file: BinaryIO, wanted: bytes, at: int) -> int | None:
    """Where these bytes are, at or behind `at`."""
    file.seek(at)
    held = b""
    while piece := file.read(_STEP):
        held += piece
        if (place := held.find(wanted)) >= 0:
            return at + place
        done = max(0, len(held) - len(wanted) + 1)
        at, held = at + done, held[done:]
    return None


def target(record: WarcRecord) -> bytes:
    """The record's address; some writers put it between < and >."""
    named: bytes = record.headers.get_bytes(b"WARC-Target-URI") or b""
    return named.strip().removeprefix(b"<").removesuffix(b">")


def content_type(headers: Any) -> str:
    """Without parameters, lower case."""
    return next(header_values(headers, b"Content-Type"), "").partition(";")[0].strip().lower()


def header_values(headers: Any, name: bytes) -> Iterator[str]:
    """All values of a header; fastwarc's own text is UTF-8, and raises where a header is not."""
    return (value.decode("latin-1") for value in headers.get_bytes_multiple(name))


def archive_error(error: OSError) -> ArchiveError:
    # What fastwarc cannot decode carries no number; what the system cannot read does.
    return ArchiveError("warc_damaged" if error.errno is None else "io_error")
