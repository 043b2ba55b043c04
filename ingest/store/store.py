"""Where a dataset's files lie: a POSIX folder, or `s3://bucket/prefix`.

Names are relative to the dataset (`ingest.dataset.layout` has them), with forward slashes. A file becomes
visible whole or not at all, and what is created if absent is created once, whoever asks and however often. A
kill may leave unfinished writes, which no reader sees.
"""

import contextlib
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from cluster.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a store.

    Attributes:
        name: relative to the store.
        bytes: its size.
        modified: when it was written, seconds since 1970.
        upload: of an unfinished write, what the store knows it by; empty for others.
    """

    name: str
    bytes: int
    modified: float
    upload: str = ""


class Draft(Protocol):
    """A file being made, seen by nobody; it vanishes unless it is published."""

    @property
    def file(self) -> io.BufferedIOBase:
        """To write, and to read back."""

    def publish(self, name: str, sha256: str) -> None:
        """Make the file durable under its content name, after what was written was read back.

        Two workers that made the same bytes use the same name: either's file serves both.

        Raises:
            OSError: what comes back is not what was written, or it cannot be written.
        """


class Store(Protocol):
    """The operations that datasets are made of. All raise OSError for trouble that repeating did not mend.

    Attributes:
        root: the folder or URL; names are below it.
    """

    @property
    def root(self) -> Path | str: ...

    def where(self, name: str) -> Path | str:
        """The file's whole path or URL."""

    def prepare(self) -> None:
        """Make sure that files can be written here.

        Raises:
            UserError: the place is not there and cannot be made.
        """

    def read(self, name: str) -> bytes:
        """The file; FileNotFoundError if there is none."""

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The files in the order of their names, None for those that are not there; many at once."""

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on: fewer only where the file ends."""

    def open(self, name: str) -> io.BufferedIOBase:
        """The file, to read and seek in; FileNotFoundError if there is none."""

    def size(self, name: str) -> int:
        """Bytes of the file; FileNotFoundError if there is none."""

    def exists(self, name: str) -> bool: ...

    def list(self, folder: str) -> Iterator[Entry]:
        """Every file below a folder, sorted by name; none if there is no such folder."""

    def unfinished(self, folder: str) -> Iterator[Entry]:
        """Writes below a folder that have not ended: in progress, or left by a kill."""

    def create_if_absent(self, name: str, data: bytes) -> bytes:
        """Publish `data` under this name unless something is there; returns what is there afterwards."""

    def replace(self, name: str, data: bytes) -> None:
        """Move the name to new content in one step: readers see the old bytes or the new ones."""

    def draft(self, stem: str) -> AbstractContextManager[Draft]:
        """A new file to write, for a name that starts with `stem`."""

    def delete(self, entry: Entry) -> None:
        """Remove a file, or an unfinished write; no error if it is gone."""


def open_store(path: str | Path) -> Store:
    """The store at a folder, or at `s3://bucket/prefix`. Nothing is read or written yet.

    Raises:
        UserError: it is a URL of another kind, or s3fs is not installed.
    """
    if isinstance(path, Path) or "://" not in path:
        return PosixStore(Path(path))
    if not path.startswith("s3://"):
        raise UserError(f"{path} is no place for a dataset: use a folder, or s3://bucket/prefix")
    try:
        from ingest.store.s3 import S3Store
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs {error.name}, which is not installed: python -m pip install s3fs"
        ) from error
    return S3Store(path)


def absolute(store: Store) -> str:
    """The store's folder or URL, to open it by on another machine, whatever the working directory there."""
    return str(store.root.resolve()) if isinstance(store.root, Path) else store.root


def home_of(store: Store, name: str) -> tuple[Store, str]:
    """The store that a file of a dataset is in, and its name there.

    A dataset's own files have names relative to its store. A tar that others made, and that is used where it
    lies, is named by its absolute path or `s3://` URL.
    """
    if name.startswith("/"):
        return PosixStore(Path("/")), name[1:]
    if name.startswith("s3://"):
        folder, _, file = name.rpartition("/")
        return open_store(folder), file
    return store, name


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
        return self.where(name).read_bytes()

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        for name in names:
            try:
                yield self.read(name)
            except FileNotFoundError:
                yield None

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        with self.open(name) as file:
            file.seek(offset)
            return file.read(size)

    def open(self, name: str) -> io.BufferedIOBase:
        return self.where(name).open("rb")

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


def _is_draft(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file.startswith(".") and file.endswith(".tmp")


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
