"""A dataset in a folder."""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

from ingest.store.store import READS_AT_ONCE, Entry


def make_folder(path: Path) -> None:
    """Create the folder and its parents so that they survive a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@dataclass(frozen=True)
class PosixStore:
    """A folder of a file system that has hard links: local, or shared by the workers."""

    root: Path

    def where(self, name: str) -> Path:
        return self.root / name

    def prepare(self) -> None:
        make_folder(self.root)

    def read(self, name: str) -> bytes:
        with _open_regular(self.where(name)) as file:
            return file.read()

    def read_many(self, names: Sequence[str], *, at_once: int = READS_AT_ONCE) -> Iterator[bytes | None]:
        for name in names:
            try:
                yield self.read(name)
            except FileNotFoundError:
                yield None

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        with _open_regular(self.where(name)) as file:
            file.seek(offset)
            return file.read(size)

    def open(self, name: str) -> io.BufferedIOBase:
        return _open_regular(self.where(name))

    def size(self, name: str) -> int:
        status = self.where(name).stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{self.where(name)} is not a file")
        return status.st_size

    def exists(self, name: str) -> bool:
        return self.where(name).is_file()

    def list(self, folder: str) -> Iterator[Entry]:
        return (entry for entry in self._walk(folder) if not _is_draft(entry.name))

    def unfinished(self, folder: str) -> Iterator[Entry]:
        return (entry for entry in self._walk(folder) if _is_draft(entry.name))

    def _walk(self, folder: str) -> Iterator[Entry]:
        for path in sorted(self.where(folder).rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # others may remove their drafts meanwhile
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    name = str(path.relative_to(self.root))
                    yield Entry(name=name, bytes=status.st_size, modified=status.st_mtime)

    def create_if_absent(self, name: str, data: bytes) -> bytes:
        with self.draft(str(PurePath(name).with_suffix(""))) as draft:
            draft.write(data)
            with contextlib.suppress(FileExistsError):
                os.link(draft.path, self.where(name))
        sync_folder(self.where(name).parent)
        return self.read(name)

    def replace(self, name: str, data: bytes) -> None:
        with self.draft(str(PurePath(name).with_suffix(""))) as draft:
            draft.write(data)
            draft.path.replace(self.where(name))
        sync_folder(self.where(name).parent)

    @contextmanager
    def draft(self, stem: str) -> Generator["PosixDraft"]:
        place = self.where(stem)
        make_folder(place.parent)
        path = place.parent / f".{place.name}-{secrets.token_hex(8)}.tmp"
        try:
            with io.BufferedRandom(io.FileIO(path, "x+"), 1 << 20) as file:
                yield PosixDraft(self, path, file)
        finally:
            path.unlink(missing_ok=True)

    def delete(self, entry: Entry) -> None:
        self.where(entry.name).unlink(missing_ok=True)


@dataclass(frozen=True)
class PosixDraft:
    """A file beside its final place, under a hidden name."""

    store: PosixStore
    path: Path
    file: io.BufferedIOBase

    def write(self, data: bytes) -> None:
        """All of the file, durable."""
        self.file.write(data)
        self._make_durable()

    def publish(self, name: str, sha256: str) -> None:
        self._make_durable()
        final = self.store.where(name)
        with self.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise OSError(
                    f"{final} does not read back as it was written: the disk or file system is at fault"
                )
        make_folder(final.parent)
        self.path.replace(final)
        sync_folder(final.parent)

    def _make_durable(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def _open_regular(path: Path) -> io.BufferedIOBase:
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe or a device, which may never end
        file.close()
        raise OSError(errno.EIO, "it is no regular file", str(path))
    return file


def _without_waiting(path: str, flags: int) -> int:
    """Opens; of a pipe, nobody needs to be there who writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_draft(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file.startswith(".") and file.endswith(".tmp")


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
