"""A dataset in an object store: S3 or what speaks its protocol, Google Cloud Storage, Azure Blob Storage; or,
to read only, on a web server.

A request that fails for a reason that passes (500, 503 SlowDown, 429, a reset, a stall) is sent again, with
growing random pauses. That is safe for each of them: content-named files get the same bytes, and a create
that had reached the store although its answer was lost is told that it exists the second time, when reading
back tells whose it is.
"""

import asyncio
import contextlib
import errno
import hashlib
import io
import os
import re
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import UserError
from ingest.store import clients, s3_uploads
from ingest.store.object_requests import MOST_TRIES, PastTheEndError, call, client, run, start
from ingest.store.ranged_file import RangedFile
from ingest.store.store import READS_AT_ONCE, Entry

if TYPE_CHECKING:
    from obstore import Bytes, ObjectMeta
    from obstore import GetOptions as Version

PART_BYTES = 16 << 20
MOST_PARTS = 10_000
READ_AHEAD_BYTES = 8 << 20
UPLOADS_AT_ONCE = 4
UPLOAD_TRIES = 3  # of the whole; each of its requests is sent again by itself
LISTED_AT_ONCE = 1000
PROBE = ".create-if-absent"

T = TypeVar("T")


class ObjectStore:
    """Objects below `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, or `https://host/path`.

    `clients` says where credentials come from. May be pickled, and used by several threads and after a fork.
    """

    def __init__(self, url: str) -> None:
        self._bucket, self._prefix = clients.split(url)
        self.root = url.rstrip("/")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStore) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def prepare(self) -> None:
        # Some services take a conditional write and ignore the condition: nothing would be published once.
        self.create_if_absent(PROBE, b"")
        try:
            self._put(PROBE, b"", "create")
        except FileExistsError:
            return
        raise UserError(
            f"{self.root}: this store overwrites in spite of If-None-Match, so that two workers could undo "
            "each other's results: use one with conditional writes, or a folder"
        )

    def read(self, name: str) -> bytes:
        return bytes(run(self.read_async(name)))

    async def read_async(self, name: str) -> "Bytes":
        """As `read`, for a process with hundreds of requests in flight."""

        async def send() -> "Bytes":
            answer = await client(self._bucket).get_async(self._key(name))
            return await answer.bytes_async()

        return await call("get", self.where(name), send)

    def read_many(self, names: Sequence[str], *, at_once: int = READS_AT_ONCE) -> Iterator[bytes | None]:
        reading: deque[Future[Bytes | None]] = deque()
        try:
            for name in names:
                reading.append(start(self._read_if_there(name)))
                if len(reading) == at_once:
                    yield _as_bytes(reading.popleft().result())
            while reading:
                yield _as_bytes(reading.popleft().result())
        finally:
            for future in reading:
                future.cancel()

    async def _read_if_there(self, name: str) -> "Bytes | None":
        try:
            return await self.read_async(name)
        except FileNotFoundError:
            return None

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return bytes(run(self._read_range(name, offset, size)))

    async def read_ranges(
        self, name: str, starts: Sequence[int], sizes: Sequence[int]
    ) -> "list[Bytes | bytes]":
        """As many `read_range`, each a request of its own, all at once: ten are little more work than one."""
        if len(starts) > 1:
            with contextlib.suppress(Exception):  # of one of them: each is asked for by itself, then
                bucket, key = client(self._bucket), self._key(name)
                return list(await bucket.get_ranges_async(key, starts=starts, lengths=sizes, coalesce=0))
        ranges = list(zip(starts, sizes, strict=True))
        if len(ranges) == 1:
            return [await self._read_range(name, *ranges[0])]
        return await asyncio.gather(*(self._read_range(name, *one) for one in ranges))

    async def _read_range(
        self, name: str, offset: int, size: int, version: "Version | None" = None
    ) -> "Bytes | bytes":
        """As `read_range`; OSError if the object is no longer the version asked for."""
        if size <= 0:
            return b""

        async def send() -> "Bytes":
            store, key = client(self._bucket), self._key(name)
            if version is None:  # half the CPU time
                return await store.get_range_async(key, start=offset, length=size)
            answer = await store.get_async(key, options={"range": (offset, offset + size), **version})
            return await answer.bytes_async()

        try:
            return await call("get", self.where(name), send)
        except PastTheEndError:
            return b""
        except FileExistsError as error:
            raise OSError(errno.ESTALE, "changed while it was read", self.where(name)) from error

    def open(self, name: str) -> io.BufferedIOBase:
        head = self._head(name)
        version = _version(head)

        def read(offset: int, size: int) -> "Bytes | bytes":
            return run(self._read_range(name, offset, size, version))

        return io.BufferedReader(RangedFile(read, head["size"]), READ_AHEAD_BYTES)

    def size(self, name: str) -> int:
        return self._head(name)["size"]

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def _head(self, name: str) -> "ObjectMeta":
        return self._call("head", name, lambda: client(self._bucket).head_async(self._key(name)))

    def list(self, folder: str) -> Iterator[Entry]:
        if not clients.is_bucket(self.root):
            raise UserError(f"{self.root} is on a web server, which does not tell what files it has")
        pages: AsyncIterator[Sequence[ObjectMeta]] | None = None
        last: str | None = None

        async def page() -> "Sequence[ObjectMeta]":
            nonlocal pages
            if pages is None:
                prefix = self._key(folder).rstrip("/")
                pages = aiter(client(self._bucket).list(prefix, offset=last, chunk_size=LISTED_AT_ONCE))
            try:
                return await anext(pages)
            except StopAsyncIteration:
                return ()
            except Exception:
                pages = None  # the next try goes on after what has come
                raise

        while found := self._call("list", folder, page):
            for entry in found:
                yield Entry(
                    name=self._name(entry["path"]),
                    bytes=entry["size"],
                    modified=entry["last_modified"].timestamp(),
                )
            last = found[-1]["path"]

    def unfinished(self, folder: str) -> Iterator[Entry]:
        # Azure forgets unfinished uploads after a week, Google by a rule of the bucket's owner.
        if self.root.startswith("s3://"):
            for entry in s3_uploads.unfinished(self._bucket, self._key(f"{folder}/")):
                yield replace(entry, name=self._name(entry.name))

    def create_if_absent(self, name: str, data: bytes) -> bytes:
        try:
            self._put(name, data, "create")
        except FileExistsError:
            return self.read(name)
        return data

    def replace(self, name: str, data: bytes) -> None:
        self._put(name, data, "overwrite")

    @contextmanager
    def draft(self, stem: str) -> Generator["ObjectDraft"]:
        try:
            # Without a name: a kill leaves nothing on the disk.
            with tempfile.TemporaryFile() as file:
                yield ObjectDraft(self, file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = f"{tempfile.gettempdir()}, where files are made before they are uploaded, is full"
            raise OSError(error.errno, f"{place}: free some space there, or set TMPDIR") from error

    def delete(self, entry: Entry) -> None:
        self._refuse_read_only()
        if entry.upload:
            s3_uploads.abort(self._bucket, self._key(entry.name), entry.upload)
            return
        with contextlib.suppress(FileNotFoundError):
            key = self._key(entry.name)
            self._call("delete", entry.name, lambda: client(self._bucket).delete_async(key))

    def upload(self, name: str, file: io.BufferedIOBase, size: int) -> None:
        """Send the whole file. A kill meanwhile leaves an unfinished upload."""
        file.seek(0)
        if size <= PART_BYTES:
            self.replace(name, file.read())
            return

        async def send() -> None:
            patient, key = client(self._bucket, patient=True), self._key(name)
            file.seek(0)
            await patient.put_async(key, file, chunk_size=_part_bytes(size), max_concurrency=UPLOADS_AT_ONCE)

        self._refuse_read_only()
        # Two of the creates may reach the store if an answer is lost: the first is then left to `ingest gc`.
        # A completion that is sent again because its answer was lost may find no such upload.
        with contextlib.suppress(FileNotFoundError):
            run(call("upload", self.where(name), send, most_tries=UPLOAD_TRIES))

    def holds(self, name: str, file: io.BufferedIOBase, *, size: int, sha256: str) -> bool:
        """Whether the object is this file: by the MD5 that most stores name it by, or else by reading it."""
        try:
            head = self._head(name)
        except FileNotFoundError:
            return False
        if head["size"] != size:
            return False
        tag = (head["e_tag"] or "").strip('"')
        if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) and tag == _md5_tag(file, size, in_parts="-" in tag):
            return True
        with self.open(name) as there:
            return hashlib.file_digest(there, "sha256").hexdigest() == sha256

    def _put(self, name: str, data: bytes, mode: Any) -> None:
        self._refuse_read_only()

        def send() -> Awaitable[Any]:
            return client(self._bucket).put_async(self._key(name), data, mode=mode, use_multipart=False)

        self._call("put", name, send)

    def _refuse_read_only(self) -> None:
        if not clients.is_bucket(self.root):
            raise UserError(f"{self.root} is on a web server, to read only: write to a folder or a bucket")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self._prefix}/") if self._prefix else key

    def _call(self, action: str, name: str, send: Callable[[], Awaitable[T]]) -> T:
        return run(call(action, self.where(name), send))


class ObjectDraft:
    """A local file that is uploaded when it is whole."""

    def __init__(self, store: ObjectStore, file: io.BufferedIOBase) -> None:
        self._store = store
        self.file = file

    def publish(self, name: str, sha256: str) -> None:
        self.file.flush()
        self.file.seek(0)
        if hashlib.file_digest(self.file, "sha256").hexdigest() != sha256:
            raise OSError(
                f"{tempfile.gettempdir()} does not give back what was written: its disk is at fault"
            )
        size = self.file.seek(0, io.SEEK_END)
        for _ in range(MOST_TRIES):
            self._store.upload(name, self.file, size)
            if self._store.holds(name, self.file, size=size, sha256=sha256):
                return
        raise OSError(f"{self._store.where(name)} does not read back as it was uploaded")


def _version(head: "ObjectMeta") -> "Version":
    """What asks for the very object that this is about, whatever happens to the name."""
    tag = head["e_tag"]
    # A weak tag, of some web servers, matches nothing.
    return {"if_match": tag} if tag and tag[0] == '"' else {"if_unmodified_since": head["last_modified"]}


def _as_bytes(data: "Bytes | None") -> bytes | None:
    return None if data is None else bytes(data)


def _part_bytes(size: int) -> int:
    return max(PART_BYTES, -(-size // MOST_PARTS))


def _md5_tag(file: io.BufferedIOBase, size: int, *, in_parts: bool) -> str:
    """What S3 calls the file's content: its MD5, or that of its parts' MD5s, a dash and their number."""
    step = _part_bytes(size) if in_parts else max(size, 1)
    digests = [
        hashlib.md5(os.pread(file.fileno(), step, first), usedforsecurity=False).digest()
        for first in range(0, max(size, 1), step)
    ]
    if not in_parts:
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
