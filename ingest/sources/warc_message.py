"""What a record of a WARC holds: an answer of HTTP, or a resource, decoded in bounds."""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from fastwarc.stream_io import BrotliReader, ChunkedReader, GzipReader, ZstdReader
from fastwarc.warc import WarcRecord

from ingest.sources.warc_records import RESOURCE, ArchiveError, archive_error, content_type, header_values
from ingest.web.opt_outs import OptOut

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


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a record holds: an answer to a request, or a resource by itself.

    Attributes:
        status: of HTTP; 200 for a resource.
        content_type: without parameters, lower case.
        charset: as the header names it, if it does.
        opt_outs: values of headers that opt out, by name.
        body: decoded, up to the limit that was asked for, and one byte more if there are more.
        truncated: the crawler stored only the beginning.
    """

    status: int
    content_type: str
    charset: str | None
    opt_outs: Mapping[str, tuple[str, ...]]
    body: bytes
    truncated: bool

    def said(self, header: str) -> tuple[str, ...]:
        """What is told by a header that opts out."""
        return self.opt_outs.get(header, ())


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
            opt_outs={},
            body=body(record, max_bytes),
            truncated=_is_cut(record),
        )
    if not record.is_http:
        return None
    try:
        record.parse_http(quirks_mode=True)  # lines that end in LF alone
    except OSError as error:
        if error.errno is not None or "header length" not in str(error):
            raise archive_error(error) from error
        return None
    headers = record.http_headers
    if headers is None or headers.status_code is None:
        return None
    raw = body(record, max_bytes)
    return Message(
        status=headers.status_code,
        content_type=content_type(headers),
        charset=_charset(headers),
        opt_outs={each.header: tuple(header_values(headers, each.header.encode())) for each in OptOut},
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
        raise archive_error(error) from error
    if len(data) < wanted:
        raise ArchiveError("warc_truncated")
    return data


def _charset(headers: Any) -> str | None:
    named = _CHARSET.search(next(header_values(headers, b"Content-Type"), ""))
    return named[1] if named else None


def _is_cut(record: WarcRecord) -> bool:
    return record.headers.get_bytes(b"WARC-Truncated") is not None


def _decoded(data: bytes, headers: Any, max_bytes: int) -> bytes:
    """Undo transfer and content codings, the last applied first, each in bounds.

    Many crawlers store the decoded body and leave the header that names the coding: what does not decode is
    taken as it is.
    """
    named = [*header_values(headers, b"Content-Encoding"), *header_values(headers, b"Transfer-Encoding")]
    codings = [coding.strip().lower() for value in named for coding in value.split(",")]
    for coding in reversed(codings[-_MOST_CODINGS:]):
        opener = _CODINGS.get(coding)
        if opener is not None:
            try:
                data = opener(io.BytesIO(data)).read(max_bytes + 1)
            except OSError:
                return data
    return data
