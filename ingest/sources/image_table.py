"""Parquet with the images in it: a column of bytes, or Hugging Face's `{bytes, path}`, and a row per image.

Labels are those of the column that is called so; numbers become the names that Hugging Face's metadata gives
them. What is called like `train-00000-of-00002.parquet` is of the split `train`. Further columns go into the
rows, but for further images.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.problem import PROBLEMS, Problem
from ingest.sources.companions import MOST_LABELS
from ingest.sources.source import Item
from ingest.sources.table_layout import read_layout, stays
from ingest.sources.url_list import Columns, split_labels
from ingest.store.files import open_file

_ROWS_AT_A_TIME = 1_024
_IMAGES_AT_A_TIME = 16
_SPLIT = re.compile(r"([A-Za-z0-9_]+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")


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
        self._place = location if "://" in location else Path(location)
        split = _SPLIT.fullmatch(self.name)
        self._split = split[1] if split else None
        with self._open() as parquet:
            self._layout = read_layout(location, parquet.schema_arrow, image, columns)
        self._rows: _Rows | None = None

    @property
    def extra(self) -> pa.Schema:
        """Its further columns, and the split."""
        others = list(self._layout.others.values())
        ours = self._split is not None and "split" not in [each.name for each in others]
        return pa.schema([*others, *([pa.field("split", pa.string())] if ours else [])])

    def describe(self) -> SourceRecord:
        with open_file(self._place) as file:
            size = file.seek(0, os.SEEK_END)
        layout = self._layout
        used = {"image": layout.image, "caption": layout.caption, "labels": layout.labels}
        return SourceRecord(kind=self.kind, name=self.name, bytes=size, columns=used)

    def shard(self) -> None:
        """Its images are copied."""

    def items(self) -> Iterator[Item]:
        """All rows; the images themselves are not looked at."""
        layout = self._layout
        read = [name for name in (layout.caption, layout.labels, *layout.others) if name is not None]
        read += [f"{layout.image}.path"] if layout.has_path else []
        with self._open() as parquet:
            row = 0
            for group in range(parquet.num_row_groups):
                if read:
                    batches = parquet.iter_batches(_ROWS_AT_A_TIME, [group], read, use_threads=False)
                    rows: Iterable[dict[str, Any]] = (each for batch in batches for each in batch.to_pylist())
                else:
                    rows = ({} for _ in range(parquet.metadata.row_group(group).num_rows))
                for values in rows:
                    yield self._item(row, values)
                    row += 1

    def _item(self, row: int, values: dict[str, Any]) -> Item:
        layout = self._layout
        path = (values.get(layout.image) or {}).get("path") if layout.has_path else None
        extra = {field.name: self._value(name, values[name]) for name, field in layout.others.items()}
        labels = self._labels(layout.labels, values[layout.labels]) if layout.labels else ()
        caption = values[layout.caption] if layout.caption else None
        return Item(
            path=_text(path).encode() if path else str(row).encode(),
            offset=row,
            caption=None if caption is None else _text(caption),
            labels=labels[:MOST_LABELS],
            extra=({"split": self._split} if self._split else {}) | extra,
        )

    def _labels(self, column: str, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        named = [text for each in values if (text := self._name(column, each)) is not None]
        if isinstance(value, str) and column.lower() in ("labels", "hashtags", "tags"):
            return tuple(split_labels(named[0])) if named else ()
        return tuple(named)

    def _name(self, column: str, value: Any) -> str | None:
        names = self._layout.names.get(column)
        if value is None or value == "":
            return None
        if names is None or not isinstance(value, int):
            return _text(value)
        # -1 is Hugging Face's "nobody has said".
        return names[value] if 0 <= value < len(names) else None if value == -1 else str(value)

    def _value(self, column: str, value: Any) -> Any:
        if value is None or column in self._layout.names:
            return self._name(column, value)
        return value if stays(self._layout.others[column].type) else _text(value)

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            yield PROBLEMS[item.problem] if item.problem else self._bytes(item.offset, max_bytes)

    def _bytes(self, row: int, max_bytes: int) -> bytes | Problem:
        try:
            if self._rows is None:
                self._rows = _Rows(self._place, self._layout.image)
            value = self._rows.value(row)
        except (pa.ArrowException, EOFError):
            self.close()
            return PROBLEMS["table_damaged"]
        except OSError as error:
            self.close()
            return PROBLEMS["io_error" if error.errno is not None else "table_damaged"]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            return PROBLEMS["no_image_bytes"]
        return data if len(data) <= max_bytes else PROBLEMS["too_many_bytes"]

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        try:
            with open_file(self._place) as file, pq.ParquetFile(file) as parquet:
                yield parquet
        except FileNotFoundError:
            raise UserError(f"source {self._place} does not exist") from None
        except pa.ArrowException as error:
            raise UserError(f"the table {self._place} is damaged: {error}") from error


class _Rows:
    """Values of a column by row, a few at a time: going on is cheap, going back begins a row group anew."""

    def __init__(self, place: Path | str, column: str) -> None:
        self._file = open_file(place)
        self._parquet = pq.ParquetFile(self._file)
        self._column = column
        groups = self._parquet.metadata
        self._ends: list[int] = []
        for number in range(groups.num_row_groups):
            self._ends.append(groups.row_group(number).num_rows + (self._ends[-1] if self._ends else 0))
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first, self._batch = 0, pa.array([])

    def value(self, row: int) -> Any:
        group = next((number for number, end in enumerate(self._ends) if row < end), None)
        if group is None:
            raise EOFError
        if group != self._group or row < self._first:
            self._batches = self._parquet.iter_batches(
                _IMAGES_AT_A_TIME, [group], [self._column], use_threads=False
            )
            self._group, self._first, self._batch = group, self._ends[group - 1] if group else 0, pa.array([])
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise EOFError
            self._batch = batch.column(0)
        return self._batch[row - self._first].as_py()

    def close(self) -> None:
        self._parquet.close()
        self._file.close()


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
