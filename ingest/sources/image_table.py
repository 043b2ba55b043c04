"""Parquet with the images in it: a column of bytes, or Hugging Face's `{bytes, path}`, and a row per image.

What is called like `train-00000-of-00002.parquet` is of the split `train`. What is in the file, a fenced
process reads (`ingest.sources.image_rows`).
"""

import io
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePath

import pyarrow as pa

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.fence.reading import MEMORY, read_fenced
from ingest.problem import PROBLEMS, Problem
from ingest.sources import image_rows
from ingest.sources.remote_trouble import is_trouble
from ingest.sources.source import Item
from ingest.sources.url_list import Columns
from ingest.store.files import open_file

_SPLIT = re.compile(r"([A-Za-z0-9_]+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")
# Of such a file, whatever is in it fits into the memory of every list's reader.
_SMALL = 256 << 20


def image_column(location: str, chosen: str | None = None) -> str | None:
    """The column of a Parquet file that has images in it; None if none has.

    Args:
        location: a path, or a URL.
        chosen: the only column to look at.

    Raises:
        UserError: a bucket is not there, or credentials are missing; or the file takes too much to be read.
    """
    try:
        file = open_file(_place(location))
        memory = _memory(file)
    except Exception as error:
        if not (is_trouble(error) or isinstance(error, ValueError)):
            raise
        return None  # whoever opens it next tells what is wrong
    with file:
        (found,) = read_fenced(
            image_rows.find_images, [file], {"chosen": chosen}, place=f"source {location}", memory=memory
        )
    return found.schema.metadata[b"image"].decode() or None


class ImageTable:
    """Images in a Parquet file, here, in a bucket or at a URL; see the module's docstring.

    Args:
        location: where it is.
        image: its column of images.
        columns: which of the others mean what.
    """

    kind = SourceKind.IMAGE_TABLE

    def __init__(self, location: str, image: str, columns: Columns) -> None:
        self.name = os.fsencode(PurePath(location).name).decode("utf-8", "backslashreplace")
        self._place = _place(location)
        self._image = image
        self._columns = columns
        split = _SPLIT.fullmatch(self.name)
        self._split = split[1] if split else None
        try:
            looked, ends = self._read(image_rows.look, location=location, columns=asdict(columns))
        except FileNotFoundError:
            raise UserError(f"source {location} does not exist") from None
        self._others = looked.schema.remove_metadata()
        self._used: dict[str, str | None] = json.loads(looked.schema.metadata[b"used"])
        # Of the row groups.
        self._ends: list[int] = ends["end"].to_pylist()
        self._damaged = range(0)
        self._images: Iterator[tuple[bytes | None, str]] | None = None
        self._next = 0

    @property
    def extra(self) -> pa.Schema:
        """Its further columns, and the split."""
        ours = self._split is not None and "split" not in self._others.names
        return pa.schema([*self._others, *([pa.field("split", pa.string())] if ours else [])])

    def describe(self) -> SourceRecord:
        with open_file(self._place) as file:
            size = file.seek(0, os.SEEK_END)
        return SourceRecord(kind=self.kind, name=self.name, bytes=size, columns=self._used)

    def shard(self) -> None:
        """Its images are copied."""

    def items(self) -> Iterator[Item]:
        """All rows; the images themselves are not looked at."""
        ours = {"split": self._split} if self._split else {}
        for table in self._read(image_rows.rows, location=f"{self._place}", columns=asdict(self._columns)):
            for row in table.to_pylist():
                own = {name: row.pop(name) for name in image_rows.OWN.names}
                yield Item(**own | {"labels": tuple(own["labels"])}, extra=ours | row)

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            yield PROBLEMS[item.problem] if item.problem else self._bytes(item.offset, max_bytes)

    def _bytes(self, row: int, max_bytes: int) -> bytes | Problem:
        group = bisect_right(self._ends, row)
        if group == len(self._ends) or row in self._damaged:
            return PROBLEMS["table_damaged"]
        # Going on is cheap, going back or to another row group begins anew.
        if self._images is None or bisect_right(self._ends, self._next) != group or row < self._next:
            self.close()
            self._images = self._images_from(row, max_bytes)
            self._next = row
        try:
            while self._next <= row:
                data, problem = next(self._images)
                self._next += 1
        except (UserError, StopIteration):
            self.close()
            self._damaged = range(row, self._ends[group])
            return PROBLEMS["table_damaged"]
        except OSError:
            self.close()
            return PROBLEMS["io_error"]
        return PROBLEMS[problem] if data is None else data

    def _images_from(self, row: int, max_bytes: int) -> Iterator[tuple[bytes | None, str]]:
        for table in self._read(image_rows.images, first=row, max_bytes=max_bytes):
            yield from zip(table["data"].to_pylist(), table["problem"].to_pylist(), strict=True)

    def close(self) -> None:
        self._images = None

    def _read(self, how: Callable[..., Iterator[pa.Table]], **arguments: object) -> Iterator[pa.Table]:
        with open_file(self._place) as file:
            yield from read_fenced(
                how,
                [file],
                {"image": self._image, **arguments},
                place=f"the table {self._place}",
                memory=_memory(file),
            )


def _memory(file: io.BufferedIOBase) -> int:
    """A page of images, which may be all of a file up to 2 GB, is held packed, unpacked and as values."""
    return MEMORY if file.seek(0, os.SEEK_END) <= _SMALL else MEMORY + (6 << 30)


def _place(location: str) -> Path | str:
    return location if "://" in location else Path(location)
