"""The records of a WARC file, plain or compressed record by record (gzip, LZ4, Zstandard), one at a time.

fastwarc reads; this adds what hostile and damaged files need: bodies decoded in bounds, and an error where a
file ends too early, which fastwarc takes for its end.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from fastwarc.stream_io import BrotliReader, ChunkedReader, GzipReader, ZstdReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

RESPONSE = WarcRecordType.response
RESOURCE = WarcRecordType.resource
METADATA = WarcRecordType.metadata

_CHARSET = re.compile(r"""charset\s*=\s*["']?([\w.:-]{1,40})""", re.IGNORECASE)
_MOST_CODINGS = 3
_CODINGS: dict[str, Callable[[BinaryIO], Any]] = {
    "chunked": ChunkedReader,
    "gzip": GzipReader,
    "x-gzip": GzipReader,
    "deflate": partial(GzipReader, zlib=True),
    "br": BrotliReader,
    "zstd": ZstdReader,
}


class ArchiveError(Exception):
    """The file cannot be read on from here; `problem` is a key of PROBLEMS."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a record holds: an answer to a request, or a resource by itself.

    Attributes:
        status: of HTTP; 200 for a resource.
        content_type: without parameters, lower case.
        charset: as the header names it, if it does.
        robots: values of X-Robots-Tag.
        body: decoded, up to the limit that was asked for, and one byte more if there are more.
        truncated: the crawler stored only the beginning.
    """

    status: int
    content_type: str
    charset: str | None
    robots: tuple[str, ...]
    body: bytes
    truncated: bool


def records(file: BinaryIO, types: WarcRecordType = WarcRecordType.any_type) -> Iterator[WarcRecord]:
    """Records of these types, from where the file stands. Each can be read until the next is asked for.

    Raises:
        ArchiveError: warc_damaged or warc_truncated, after the last whole record; io_error.
    """
    at = -1
    try:
        for record in ArchiveIterator(file, parse_http=False, fsspec_args=False):
            at = record.stream_pos
            # A header that the end of the file cuts short is no error to fastwarc.
            if record.headers.get_bytes(b"Content-Length") is None:
                raise ArchiveError("warc_truncated")
            if int(record.record_type & types):
                yield record
            if record.reader.tell() + record.consume() < record.content_length:
                raise ArchiveError("warc_truncated")
        if at >= 0 and file.seekable() and _more_begins(file, at):
            raise ArchiveError("warc_truncated")
    except OSError as error:
        raise _archive_error(error) from error


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


def message(record: WarcRecord, *, max_bytes: int) -> Message | None:
    """What the record holds, its body decoded up to `max_bytes` and one more; None if it is no message.

    Raises:
        ArchiveError: the record is damaged or ends too early.
    """
    if record.record_type == RESOURCE:
        return Message(
            status=200,
            content_type=content_type(record.headers),
            charset=None,
            robots=(),
            body=body(record, max_bytes),
            truncated=_is_cut(record),
        )
    if not record.is_http:
        return None
    try:
        record.parse_http()
    except OSError as error:
        if error.errno is not None or "header length" not in str(error):
            raise _archive_error(error) from error
        return None
    headers = record.http_headers
    if headers is None or headers.status_code is None:
        return None
    raw = body(record, max_bytes)
    return Message(
        status=headers.status_code,
        content_type=content_type(headers),
        charset=_charset(headers),
        robots=tuple(_values(headers, b"X-Robots-Tag")),
        body=_decoded(raw, headers, max_bytes),
        truncated=_is_cut(record),
    )


def body(record: WarcRecord, max_bytes: int) -> bytes:
    """The record's content from where it stands, as it is stored: up to `max_bytes`, and one byte more.

    Raises:
        ArchiveError: the record is damaged or ends too early.
    """
    wanted = min(max_bytes + 1, record.content_length)
    try:
        data: bytes = record.reader.read(wanted) if wanted else b""
    except OSError as error:
        raise _archive_error(error) from error
    if len(data) < wanted:
        raise ArchiveError("warc_truncated")
    return data


def target(record: WarcRecord) -> bytes:
    """The record's address; some writers put it between < and >."""
    named: bytes = record.headers.get_bytes(b"WARC-Target-URI") or b""
    return named.strip().removeprefix(b"<").removesuffix(b">")


def content_type(headers: Any) -> str:
    """Without parameters, lower case."""
    return next(_values(headers, b"Content-Type"), "").partition(";")[0].strip().lower()


def _charset(headers: Any) -> str | None:
    named = _CHARSET.search(next(_values(headers, b"Content-Type"), ""))
    return named[1] if named else None


def _values(headers: Any, name: bytes) -> Iterator[str]:
    """All values of a header; fastwarc's own text is UTF-8, and raises where a header is not."""
    return (value.decode("latin-1") for value in headers.get_bytes_multiple(name))


def _is_cut(record: WarcRecord) -> bool:
    return record.headers.get_bytes(b"WARC-Truncated") is not None


def _archive_error(error: OSError) -> ArchiveError:
    # What fastwarc cannot decode carries no number; what the system cannot read does.
    return ArchiveError("warc_damaged" if error.errno is None else "io_error")


def _decoded(data: bytes, headers: Any, max_bytes: int) -> bytes:
    """Undo transfer and content codings, the last applied first, each in bounds.

    Many crawlers store the decoded body and leave the header that names the coding: what does not decode is
    taken as it is.
    """
    named = [*_values(headers, b"Content-Encoding"), *_values(headers, b"Transfer-Encoding")]
    codings = [coding.strip().lower() for value in named for coding in value.split(",")]
    for coding in reversed(codings[-_MOST_CODINGS:]):
        opener = _CODINGS.get(coding)
        if opener is not None:
            try:
                data = opener(io.BytesIO(data)).read(max_bytes + 1)
            except OSError:
                return data
    return data
