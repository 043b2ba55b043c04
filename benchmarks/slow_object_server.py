"""An object store over a folder, as slow and as unreliable as asked, for as little CPU as Python allows.

    python benchmarks/slow_object_server.py FOLDER --latency-ms 30 --fault-share 0.05

speaks S3's protocol: FOLDER/BUCKET/KEY is `/BUCKET/KEY`, whoever asks. It knows GET (ranges, If-Match), HEAD,
lists, PUT (If-None-Match), uploads in parts and DELETE. Every answer waits for the latency before its first
byte; a share of the reads is refused, cut off half-way or answered 500, in turn. `/.counts` tells how many
requests came and how many bytes of objects went out.

One process with one thread: some ten thousand ranges of 2 KB a second, far more than moto's server gives.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import mmap
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape, unescape

LISTED_AT_ONCE = 1000
MAPPED_FILES = 4096
FAULTS = ("refuse", "500", "cut")
Header = dict[str, str]


@dataclass(frozen=True)
class Mapped:
    """An object's bytes; `etag` without quotes."""

    view: memoryview
    etag: str
    modified: float


@dataclass
class Objects:
    """Files below a folder as objects, and uploads in parts that have not ended."""

    folder: Path
    mapped: dict[str, Mapped] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)  # of what was put here, as S3 makes them
    checksums: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes | bytearray]] = field(default_factory=dict)

    def get(self, key: str) -> Mapped | None:
        found = self.mapped.get(key)
        if found is None:
            try:
                with (self.folder / key).open("rb") as file:
                    status = os.fstat(file.fileno())
                    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if status.st_size else b""
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None
            etag = self.etags.get(key, f"{status.st_mtime_ns:x}{status.st_size:x}")
            found = Mapped(memoryview(data), etag, status.st_mtime)
            if len(self.mapped) >= MAPPED_FILES:
                self.mapped.pop(next(iter(self.mapped)))
            self.mapped[key] = found
        return found

    def put(self, key: str, data: bytes | bytearray, etag: str, checksum: str) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        draft.write_bytes(data)
        draft.replace(path)
        self.mapped.pop(key, None)
        self.etags[key], self.checksums[key] = etag, checksum

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)
        self.mapped.pop(key, None)

    def list(self, bucket: str, prefix: str) -> list[tuple[str, int, float]]:
        """(key, size, modified) of the bucket's objects that start with `prefix`, sorted."""
        root = self.folder / bucket
        place, found = root / prefix.rpartition("/")[0], []
        for folder, _, files in os.walk(place):
            for name in files:
                path = Path(folder, name)
                key = path.relative_to(root).as_posix()
                if key.startswith(prefix) and not (name.startswith(".") and name.endswith(".draft")):
                    status = path.stat()
                    found.append((key, status.st_size, status.st_mtime))
        return sorted(found)


@dataclass
class Settings:
    objects: Objects
    latency: float
    fault_share: float
    draw: random.Random
    counts: dict[str, int] = field(default_factory=lambda: {"requests": 0, "bytes": 0, "faults": 0})


class Connection(asyncio.Protocol):
    """One client's connection: a request, its answer, the next request."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._buffer = bytearray()
        self._answering = False
        self._request: tuple[str, str, Header] | None = None
        self._body_size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._look()

    def _look(self) -> None:
        if self._answering:
            return
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            del self._buffer[: end + 4]
            method, target, _ = first.split(" ", 2)
            header = {}
            for line in lines:
                name, _, value = line.partition(":")
                header[name.lower()] = value.strip()
            self._request = method, target, header
            self._body_size = int(header.get("content-length", 0))
            if header.get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if len(self._buffer) < self._body_size:
            return
        (method, target, header), self._request = self._request, None
        body, self._buffer = self._buffer[: self._body_size], self._buffer[self._body_size :]
        self._answering = True
        answer = self._answer(method, target, header, body)
        latency = 0 if target == "/.counts" else self._settings.latency
        if latency:
            asyncio.get_running_loop().call_later(latency, self._send, answer)
        else:
            self._send(answer)

    def _send(self, answer: Callable[[], None]) -> None:
        if self._transport.is_closing():
            return
        answer()
        self._answering = False
        if self._buffer:
            self._look()

    def _answer(self, method: str, target: str, header: Header, body: bytearray) -> Callable[[], None]:
        """What is to be sent when the latency is over; writes take effect then, too."""
        settings = self._settings
        if target == "/.counts":
            return lambda: self._reply(200, json.dumps(settings.counts).encode())
        settings.counts["requests"] += 1
        path, _, query = target.partition("?")
        key, asked = unquote(path).lstrip("/"), dict(parse_qsl(query, keep_blank_values=True))
        if method not in ("GET", "HEAD"):
            return lambda: self._write(method, key, asked, header, body)
        fault = ""
        if method == "GET" and settings.fault_share and settings.draw.random() < settings.fault_share:
            fault = FAULTS[settings.counts["faults"] % len(FAULTS)]
            settings.counts["faults"] += 1
        if fault == "refuse":
            return self._transport.close
        if fault == "500":
            return lambda: self._fail(500, "InternalError")
        if "list-type" in asked or "/" not in key.rstrip("/"):
            return lambda: self._list(key.strip("/"), asked)
        return lambda: self._get(key, header, head=method == "HEAD", cut=fault == "cut")

    def _get(self, key: str, header: Header, *, head: bool, cut: bool) -> None:
        found = self._settings.objects.get(key)
        if found is None:
            self._fail(404, "NoSuchKey", head=head)
            return
        if header.get("if-match", "*").strip('"') not in ("*", found.etag):
            self._fail(412, "PreconditionFailed")
            return
        size, status, extra = len(found.view), 200, ""
        first, end = 0, size
        if "range" in header:
            start, _, last = header["range"].removeprefix("bytes=").partition("-")
            first = int(start) if start else max(0, size - int(last))
            end = min(size, int(last) + 1) if start and last else size
            if first >= size:
                self._fail(416, "InvalidRange")
                return
            status, extra = 206, f"Content-Range: bytes {first}-{end - 1}/{size}\r\n"
        checksum = self._settings.objects.checksums.get(key)
        if checksum and status == 200 and header.get("x-amz-checksum-mode") == "ENABLED":
            extra += f"x-amz-checksum-sha256: {checksum}\r\n"
        extra += f'ETag: "{found.etag}"\r\nLast-Modified: {formatdate(found.modified, usegmt=True)}\r\n'
        self._reply(status, found.view[first:end], extra, head=head, cut=cut)
        if not head:
            self._settings.counts["bytes"] += end - first

    def _list(self, bucket: str, asked: Header) -> None:
        after, most = asked.get("continuation-token", asked.get("start-after", "")), LISTED_AT_ONCE
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        found = [entry for entry in self._settings.objects.list(bucket, prefix) if entry[0] > after]
        folders = set()
        if delimiter:
            for key, _, _ in found:
                inside = key[len(prefix) :]
                if delimiter in inside:
                    folders.add(prefix + inside.partition(delimiter)[0] + delimiter)
            found = [entry for entry in found if delimiter not in entry[0][len(prefix) :]]
        more = len(found) > most
        texts = [f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(found[:most])}</KeyCount>"]
        if more:
            texts.append(f"<NextContinuationToken>{escape(found[most - 1][0])}</NextContinuationToken>")
        for key, size, modified in found[:most]:
            when = f"<LastModified>{_iso(modified)}</LastModified>"
            texts.append(f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>{when}</Contents>")
        texts += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        self._xml("ListBucketResult", f"<Name>{bucket}</Name>" + "".join(texts))

    def _write(self, method: str, key: str, asked: Header, header: Header, body: bytearray) -> None:
        objects = self._settings.objects
        checksum = header.get("x-amz-checksum-sha256", "")
        if method == "DELETE":
            objects.uploads.pop(asked.get("uploadId", ""), None)
            if "uploadId" not in asked:
                objects.delete(key)
            self._reply(204, b"")
        elif "uploads" in asked:
            upload = f"{len(objects.etags)}-{self._settings.draw.getrandbits(64):x}"
            objects.uploads[upload] = {}
            self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        elif "delete" in asked:
            names = [text.partition("</Key>")[0] for text in body.decode().split("<Key>")[1:]]
            for name in names:
                objects.delete(f"{key.strip('/')}/{unescape(name)}")
            self._xml("DeleteResult", "".join(f"<Deleted><Key>{n}</Key></Deleted>" for n in names))
        elif "uploadId" in asked and asked["uploadId"] not in objects.uploads:
            self._fail(404, "NoSuchUpload")
        elif "partNumber" in asked:
            objects.uploads[asked["uploadId"]][int(asked["partNumber"])] = body
            self._reply(200, b"", f'ETag: "{_md5(body)}"\r\nx-amz-checksum-sha256: {checksum}\r\n')
        elif "uploadId" in asked:
            parts = [part for _, part in sorted(objects.uploads.pop(asked["uploadId"]).items())]
            etag = _md5(b"".join(bytes.fromhex(_md5(part)) for part in parts)) + f"-{len(parts)}"
            objects.put(key, b"".join(parts), etag, "")
            self._xml("CompleteMultipartUploadResult", f"<ETag>{etag}</ETag>")
        elif "/" not in key:
            (objects.folder / key).mkdir(exist_ok=True)
            self._reply(200, b"")
        elif method == "PUT" and not (header.get("if-none-match") == "*" and objects.get(key)):
            objects.put(key, body, etag := _md5(body), checksum)
            self._reply(200, b"", f'ETag: "{etag}"\r\n')
        else:
            self._fail(412, "PreconditionFailed")

    def _fail(self, status: int, code: str, *, head: bool = False) -> None:
        self._reply(
            status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), head=head
        )

    def _xml(self, kind: str, inside: str) -> None:
        self._reply(200, f"<{kind}>{inside}</{kind}>".encode(), "Content-Type: application/xml\r\n")

    def _reply(
        self,
        status: int,
        body: bytes | memoryview,
        extra: str = "",
        *,
        head: bool = False,
        cut: bool = False,
    ) -> None:
        top = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode()
        if head or status == 204:
            self._transport.write(top)
        elif cut:
            self._transport.write(top + body[: len(body) // 2])
            self._transport.close()
        elif len(body) < 65536:
            self._transport.write(top + body)
        else:
            self._transport.write(top)
            self._transport.write(body)


def _md5(data: bytes | bytearray) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def served(folder: Path, *, latency_ms: float = 0, fault_share: float = 0) -> Iterator[str]:
    """Serve the folder from a process of its own meanwhile; gives the endpoint's URL."""
    command = [sys.executable, __file__, str(folder), "--latency-ms", str(latency_ms)]
    server = subprocess.Popen(
        [*command, "--fault-share", str(fault_share)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def counts(url: str) -> dict[str, int]:
    """`requests`, `bytes` of objects and `faults` since the server at this URL started."""
    with urllib.request.urlopen(f"{url}/.counts") as answer:
        found: dict[str, int] = json.load(answer)
        return found


async def serve(settings: Settings, port: int) -> None:
    """Serve until cancelled; prints the endpoint's URL when it can be used."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(settings), "127.0.0.1", port, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve a folder as the options say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="Before an answer's first byte.")
    parser.add_argument("--fault-share", type=float, default=0.0, help="Share of the reads that go wrong.")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    settings = Settings(Objects(given.folder), given.latency_ms / 1000, given.fault_share, random.Random(0))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(settings, given.port))


if __name__ == "__main__":
    main()
