"""A dataset on S3, or on a service that speaks its protocol and knows `If-None-Match` on PUT.

A request that fails for a reason that passes (500, 503 SlowDown, 429, a reset, a stall) is sent again, with
growing random pauses. That is safe for each of them: content-named files get the same bytes, and a create
that had reached the store although its answer was lost is told 412 the second time, when reading back tells
whose it is.
"""

import base64
import contextlib
import errno
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from cluster.errors import UserError
from ingest.store.s3_requests import MOST_TRIES, PastTheEndError, Requests
from ingest.store.store import Entry

PART_BYTES = 16 << 20
MOST_PARTS = 10_000
READ_AHEAD_BYTES = 8 << 20
READS_AT_ONCE = 32
UPLOADS_AT_ONCE = 4
PROBE = ".create-if-absent"


class S3Store:
    """Objects below `s3://bucket/prefix`. Credentials, region and endpoint come from where boto looks for
    them. May be pickled, and used by several threads and after a fork.
    """

    def __init__(self, url: str) -> None:
        self._bucket, _, self._prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        self.root = f"s3://{self._bucket}" + (f"/{self._prefix}" if self._prefix else "")
        if not self._bucket:
            raise UserError(f"{url} names no bucket: use s3://bucket/prefix")
        self._requests = Requests()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Store) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def prepare(self) -> None:
        # Some services take a conditional write and ignore the condition: nothing would be published once.
        self.create_if_absent(PROBE, b"")
        try:
            self._put(PROBE, b"", IfNoneMatch="*")
        except FileExistsError:
            return
        raise UserError(
            f"{self.root}: this store overwrites in spite of If-None-Match, so that two workers could undo "
            "each other's results: use one with conditional writes, or a folder"
        )

    def read(self, name: str) -> bytes:
        data: bytes = self._call("get_object", name)["Body"]
        return data

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            yield from pool.map(self._read_if_there, names)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self.read_version(name, offset, size)

    def read_version(self, name: str, offset: int, size: int, **version: str) -> bytes:
        """As `read_range`; OSError if the object is no longer the version asked for by `IfMatch`."""
        if size <= 0:
            return b""
        wanted = f"bytes={offset}-{offset + size - 1}"
        try:
            data: bytes = self._call("get_object", name, Range=wanted, **version)["Body"]
        except PastTheEndError:
            return b""
        except FileExistsError as error:
            raise OSError(errno.ESTALE, "changed while it was read", self.where(name)) from error
        return data

    def open(self, name: str) -> io.BufferedIOBase:
        head = self._call("head_object", name)
        raw = _RangedFile(self, name, head["ContentLength"], head["ETag"])
        return io.BufferedReader(raw, READ_AHEAD_BYTES)

    def size(self, name: str) -> int:
        return int(self._call("head_object", name)["ContentLength"])

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def list(self, folder: str) -> Iterator[Entry]:
        place: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self._key(f"{folder}/"), **place)
            for found in page.get("Contents", ()):
                yield Entry(
                    name=self._name(found["Key"]),
                    bytes=found["Size"],
                    modified=found["LastModified"].timestamp(),
                )
            if not page.get("IsTruncated"):
                return
            place = {"ContinuationToken": page["NextContinuationToken"]}

    def unfinished(self, folder: str) -> Iterator[Entry]:
        place: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", Prefix=self._key(f"{folder}/"), **place)
            for found in page.get("Uploads", ()):
                name, upload = self._name(found["Key"]), found["UploadId"]
                started = found["Initiated"].timestamp()
                yield Entry(name=name, bytes=self._uploaded(name, upload), modified=started, upload=upload)
            if not page.get("IsTruncated"):
                return
            place = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _uploaded(self, name: str, upload: str) -> int:
        """Bytes of an upload's parts, the first thousand of them."""
        try:
            parts = self._call("list_parts", name, UploadId=upload).get("Parts", ())
        except FileNotFoundError:
            return 0
        return sum(part["Size"] for part in parts)

    def create_if_absent(self, name: str, data: bytes) -> bytes:
        try:
            self._put(name, data, IfNoneMatch="*")
        except FileExistsError:
            return self.read(name)
        return data

    def replace(self, name: str, data: bytes) -> None:
        self._put(name, data)

    @contextmanager
    def draft(self, stem: str) -> Generator["S3Draft"]:
        try:
            # Without a name: a kill leaves nothing on the disk.
            with tempfile.TemporaryFile() as file:
                yield S3Draft(self, file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = f"{tempfile.gettempdir()}, where files are made before they are uploaded, is full"
            raise OSError(error.errno, f"{place}: free some space there, or set TMPDIR") from error

    def delete(self, entry: Entry) -> None:
        if not entry.upload:
            self._call("delete_object", entry.name)
            return
        with contextlib.suppress(FileNotFoundError):
            self._call("abort_multipart_upload", entry.name, UploadId=entry.upload)

    def upload(self, name: str, file: io.BufferedIOBase, size: int) -> str:
        """Send the whole file; returns the checksum that S3 must then have of it, base64."""
        if size <= PART_BYTES:
            file.seek(0)
            data = file.read()
            self._put(name, data)
            return _checksum(data)
        return self._upload_parts(name, file, size)

    def _upload_parts(self, name: str, file: io.BufferedIOBase, size: int) -> str:
        step = max(PART_BYTES, -(-size // MOST_PARTS))
        edges = [*range(0, size, step), size]
        # Two of the creates may reach the store if an answer is lost: the first is then left to `ingest gc`.
        started = self._call("create_multipart_upload", name, ChecksumAlgorithm="SHA256")["UploadId"]

        def send(number: int, first: int, end: int) -> dict[str, Any]:
            data = os.pread(file.fileno(), end - first, first)
            part = {"PartNumber": number, "ChecksumSHA256": _checksum(data)}
            answer = self._call("upload_part", name, UploadId=started, Body=data, **part)
            return part | {"ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
                ranges = [(number, *edge) for number, edge in enumerate(pairwise(edges), 1)]
                parts = list(pool.map(lambda part: send(*part), ranges))
            # A completion that is sent again because its answer was lost finds no such upload.
            with contextlib.suppress(FileNotFoundError):
                self._call(
                    "complete_multipart_upload", name, UploadId=started, MultipartUpload={"Parts": parts}
                )
        except BaseException:
            self.delete(Entry(name=name, bytes=size, modified=0, upload=started))
            raise
        digests = b"".join(base64.b64decode(part["ChecksumSHA256"]) for part in parts)
        return _checksum(digests)

    def holds(self, name: str, *, size: int, checksum: str, sha256: str) -> bool:
        """Whether the object is this one: by the store's own checksum of it, or else by reading it."""
        try:
            head = self._call("head_object", name, ChecksumMode="ENABLED")
        except FileNotFoundError:
            return False
        if head["ContentLength"] != size:
            return False
        # Of an object in parts it is the digest of their digests, and a dash and their number.
        if head.get("ChecksumSHA256", "").partition("-")[0] == checksum:
            return True
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256

    def _put(self, name: str, data: bytes, **condition: str) -> None:
        checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _checksum(data)}
        self._call("put_object", name, Body=data, **checksum, **condition)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self._prefix}/") if self._prefix else key

    def _call(self, method: str, name: str | None = None, **arguments: Any) -> dict[str, Any]:
        """A request about the object, or about the bucket; see `Requests.call`."""
        place = self.root if name is None else self.where(name)
        key = {} if name is None else {"Key": self._key(name)}
        return self._requests.call(method, place, Bucket=self._bucket, **key, **arguments)


class S3Draft:
    """A local file that is uploaded when it is whole."""

    def __init__(self, store: S3Store, file: io.BufferedIOBase) -> None:
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
            checksum = self._store.upload(name, self.file, size)
            if self._store.holds(name, size=size, checksum=checksum, sha256=sha256):
                return
        raise OSError(f"{self._store.where(name)} does not read back as it was uploaded")


class _RangedFile(io.RawIOBase):
    """An object as a file to read and seek in; one version of it, whatever happens to the name."""

    def __init__(self, store: S3Store, name: str, size: int, etag: str) -> None:
        self._read = functools.partial(store.read_version, name, IfMatch=etag)
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._read(self._place, min(len(view), self._size - self._place))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
