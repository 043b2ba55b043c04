"""A folder of images: every file below it, in the order of its path's bytes.

Hidden names (those beginning with a dot) are not planned. Companions of an image, as
`ingest.sources.companions` knows them, and what a `metadata.csv` says, go into the image's row.
Everything else is planned: what a file is, its content says. A link is followed if it ends inside the
folder at a file; one that leads out, or to a folder, gets a row that says so, unless all are to be followed.
"""

import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.problem import PROBLEMS, Problem
from ingest.sources.companions import COLUMNS, LARGEST_COMPANION, joined, member_of
from ingest.sources.folder_metadata import NAMES, FolderMetadata, read_metadata
from ingest.sources.remote_trouble import reading
from ingest.sources.source import Item, first_folder


class FolderSource:
    """Images below a folder; see the module's docstring."""

    kind = SourceKind.FOLDER
    extra = COLUMNS

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        self.name = os.fsencode(path.resolve().name).decode("utf-8", "backslashreplace")
        self._root = os.fsencode(path.resolve())
        self._follow_links = follow_links

    def describe(self) -> SourceRecord:
        if self._follow_links:
            return SourceRecord(kind=self.kind, name=self.name, follow_links=True)
        return SourceRecord(kind=self.kind, name=self.name)

    def close(self) -> None:
        """Nothing stays open between files."""

    def shard(self) -> None:
        """Its images are copied."""

    def items(self) -> Iterator[Item]:
        """All files but companions, in the order of whole paths, with one folder's names per level in memory.

        A folder sorts as if its name ended in a slash: then going down depth first is the order of paths. The
        levels are a stack of our own, for a hostile tree may be deeper than Python's.
        """
        return joined(member_of(item, self._beginning) for item in self._files())

    def _files(self) -> Iterator[Item]:
        levels = [self._within(b"", None)]
        while levels:
            below = next(levels[-1], None)
            if below is None:
                levels.pop()
            elif isinstance(below, Item):
                yield below
            else:
                levels.append(self._within(*below))

    def _within(
        self, folder: bytes, metadata: FolderMetadata | None
    ) -> Iterator[Item | tuple[bytes, FolderMetadata | None]]:
        """The items, and the paths of the folders, of one `folder` ("" or ending in a slash), sorted."""
        try:
            with os.scandir(self._root + b"/" + folder) as entries:
                names = sorted(
                    (entry.name + b"/" if self._is_folder(folder, entry) else entry.name, entry)
                    for entry in entries
                    if not entry.name.startswith(b".")
                )
        except OSError:
            yield Item(folder.rstrip(b"/"), problem="folder_unreadable")
            return
        own, described = self._metadata(folder, [name for name, _ in names], metadata)
        metadata = own or metadata
        for name, entry in names:
            if name.endswith(b"/"):
                yield folder + name, metadata
            elif name != described:
                item = self._item(folder + name, entry)
                yield replace(item, **metadata.about(item.path)) if metadata else item
        if own:
            yield from own.missing()

    def _metadata(
        self, folder: bytes, names: Sequence[bytes], above: FolderMetadata | None
    ) -> tuple[FolderMetadata | None, bytes]:
        """What the folder's metadata file says, and its name; None and "" without one."""
        for name in NAMES:
            file = self.opened(folder + name) if name in names else None
            if file is not None:
                with file, reading(os.fsdecode(self._root + b"/" + folder + name)):
                    found = read_metadata(folder, name, file, root=self._root, above=above)
                if found is not None:
                    return found, name
        return None, b""

    def _beginning(self, item: Item) -> bytes | None:
        """Of a companion."""
        try:
            with os.fdopen(self._open(item.path), "rb") as file:
                return file.read(LARGEST_COMPANION)
        except (OSError, _LinkOutsideError):
            return None

    def _is_folder(self, folder: bytes, entry: os.DirEntry[bytes]) -> bool:
        """Whether there is something below it: also below a link, but to a folder on the way here."""
        if entry.is_dir(follow_symlinks=False) or not (self._follow_links and entry.is_dir()):
            return entry.is_dir(follow_symlinks=False)
        ends = [0, *(place for place, byte in enumerate(folder) if byte == ord("/"))]
        way = {os.path.realpath(self._root + b"/" + folder[:end]) for end in ends}
        there = os.path.realpath(entry.path)
        return not any(each == there or each.startswith(there.rstrip(b"/") + b"/") for each in way)

    def _item(self, path: bytes, entry: os.DirEntry[bytes]) -> Item:
        try:
            if entry.is_symlink() and not self._ends_inside(path):
                return Item(path, problem="link_outside", labels=first_folder(path))
            status = entry.stat()
        except OSError:
            return Item(path, labels=first_folder(path))  # reading it tells, and a retry asks again
        if not stat.S_ISREG(status.st_mode):
            return Item(path, problem="not_a_file", labels=first_folder(path))
        return Item(path, size=status.st_size, labels=first_folder(path))

    def _ends_inside(self, path: bytes) -> bool:
        return self._follow_links or os.path.realpath(self._root + b"/" + path).startswith(
            self._root.rstrip(b"/") + b"/"
        )

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            if item.problem:
                yield PROBLEMS[item.problem]
            else:
                yield self._bytes(item.path, max_bytes)

    def opened(self, path: bytes) -> io.BufferedIOBase | None:
        """A file, to look at parts of it; None if it cannot be opened."""
        try:
            return file_of(self._open(path))
        except (OSError, _LinkOutsideError):
            return None

    def _bytes(self, path: bytes, max_bytes: int) -> bytes | Problem:
        try:
            return bytes_of(self._open(path), max_bytes)
        except _LinkOutsideError:
            return PROBLEMS["link_outside"]
        except OSError:
            return PROBLEMS["io_error"]

    def _open(self, path: bytes) -> int:
        # Without NONBLOCK, opening what has become a pipe since planning would wait for ever.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(self._root + b"/" + path, flags | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        if not self._ends_inside(path):
            raise _LinkOutsideError
        return os.open(self._root + b"/" + path, flags)


def bytes_of(descriptor: int, max_bytes: int) -> bytes | Problem:
    """What is in a file that was opened; it is closed.

    Raises:
        OSError: it cannot be read.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)  # Python opens no folders
        return PROBLEMS["not_a_file"]
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            return PROBLEMS["too_many_bytes"]
        # A file that grows while it is read ends where it ended when it was opened.
        return file.read(status.st_size)


def file_of(descriptor: int) -> io.BufferedIOBase | None:
    """A file that was opened; None if it is none, such as a pipe: then it is closed."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


class _LinkOutsideError(Exception):
    pass
