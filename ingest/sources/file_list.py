"""Files that a list names: its rows, as the plan has them, and the files' bytes.

A path is relative to the list's folder, or absolute, or a file:// URL. What is named twice is there twice.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.problem import PROBLEMS, Problem
from ingest.sources.folder import bytes_of, file_of
from ingest.sources.source import Found, Item
from ingest.sources.url_list import PATH_NAMES
from ingest.sources.url_listing import UrlListing


class FileList:
    """A `Listing`: a list whose addresses are paths."""

    kind = SourceKind.FILES

    def __init__(self, rows: UrlListing) -> None:
        self.name = rows.name
        self._rows = rows

    @property
    def extra(self) -> pa.Schema:
        """The list's further columns."""
        return self._rows.extra

    def rows(self) -> Iterator[pa.Table]:
        return self._rows.rows()

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        return self._rows.describe(listed, found).model_copy(update={"kind": self.kind})

    def close(self) -> None:
        self._rows.close()


class ListedFiles:
    """The files of a list that was planned.

    Args:
        location: of the list.
    """

    def __init__(self, location: str) -> None:
        self.name = Path(location).name
        self._folder = Path(location).parent

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            yield PROBLEMS[item.problem] if item.problem else self._bytes(item.path, max_bytes)

    def opened(self, path: bytes) -> io.BufferedIOBase | None:
        """A file, to look at parts of it; None if it cannot be opened."""
        try:
            return file_of(self._open(path))
        except (OSError, ValueError):
            return None

    def _open(self, path: bytes) -> int:
        # Without NONBLOCK, opening a pipe would wait for ever.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(_local(self._folder, path.decode()), flags)

    def _bytes(self, path: bytes, max_bytes: int) -> bytes | Problem:
        try:
            return bytes_of(self._open(path), max_bytes)
        except FileNotFoundError:
            return PROBLEMS["file_missing"]
        except (OSError, ValueError):  # the latter, of a name with a zero byte
            return PROBLEMS["io_error"]

    def shard(self) -> None:
        """Its images are copied."""

    def close(self) -> None:
        """Nothing stays open between files."""


def names_files(location: str, rows: UrlListing) -> bool:
    """Whether a list is one of files: the first of its addresses are no URLs, and a file is there for one, or
    their column is called like paths. What came from elsewhere names no files of ours.
    """
    if "://" in location:
        return False
    folder = Path(location).resolve().parent  # as `ListedFiles` will be told
    paths = rows.first_paths
    if not paths or any("://" in path and not path.startswith("file://") for path in paths):
        return False
    named = (rows.address_column or "").lower() in PATH_NAMES
    return named or any(_is_file(folder, path) for path in paths)


def _local(folder: Path, path: str) -> Path:
    return folder / (url2pathname(urlsplit(path).path) if path.startswith("file://") else path)


def _is_file(folder: Path, path: str) -> bool:
    try:
        return _local(folder, path).is_file()
    except (OSError, ValueError):  # too long a name, a zero byte in it, or no URL
        return False
