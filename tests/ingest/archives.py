"""Web archives, written record by record."""

import gzip
import io
import zlib

import brotli
from fastwarc.stream_io import Lz4Writer, ZstdWriter


def record(kind, uri, block, *, content_type="application/http; msgtype=response", extra=""):
    """One plain WARC record."""
    address = f"WARC-Target-URI: {uri}\r\n" if uri else ""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\n{address}WARC-Date: 2024-05-18T01:58:10Z\r\n{extra}"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(uri, body, content_type="text/html", *, status="200 OK", headers="", extra=""):
    http = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{headers}\r\n".encode()
    return record("response", uri, http + body, extra=extra)


def coded(body, coding):
    """The body under a coding of HTTP."""
    match coding:
        case "gzip":
            return gzip.compress(body)
        case "deflate":
            return zlib.compress(body)
        case "br":
            return brotli.compress(body)
    pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def archive(path, records, compression="gzip"):
    """Writes the records: "gzip", "lz4" or "zstd" one by one, "whole" as one gzip member, or "plain"."""
    match compression:
        case "gzip":
            data = b"".join(gzip.compress(each, mtime=0) for each in records)
        case "lz4":
            data = _one_by_one(Lz4Writer, records)
        case "zstd":
            data = _one_by_one(ZstdWriter, records)
        case "whole":
            data = gzip.compress(b"".join(records), mtime=0)
        case _:
            data = b"".join(records)
    path.write_bytes(data)
    return path


def _one_by_one(writer, records):
    frames = []
    for each in records:
        buffer = io.BytesIO()
        out = writer(buffer)
        out.write(each)
        out.finish()
        out.flush()
        frames.append(buffer.getvalue())
    return b"".join(frames)
