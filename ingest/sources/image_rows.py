"""Parquet with the images in it, as a fenced process reads it (`ingest.sources.image_table`).

Labels are those of the column that is called so; numbers become the names that Hugging Face's metadata gives
them. Further columns go into the rows, but for further images.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.dataset.schema import LABELS
from ingest.sources.column_values import split_labels
from ingest.sources.companions import MOST_LABELS
from ingest.sources.delimited import refuse_many_columns
from ingest.sources.table_layout import TableLayout, image_column, read_layout, stays
from ingest.sources.text_blocks import Opened
from ingest.sources.url_list import PARQUET_BUFFER, Columns

_ROWS_AT_A_TIME = 1_024
_IMAGES_AT_A_TIME = 16
# What every row has.
OWN = pa.schema(
    [
        pa.field("path", pa.binary()),
        pa.field("offset", pa.uint64()),
        pa.field("caption", pa.string()),
        pa.field("labels", LABELS),
    ]
)


def find_images(opened: Opened, *, chosen: str | None) -> Iterator[pa.Table]:
    """A table without columns, whose metadata have the name of the column of images; "" if there is none."""
    yield pa.table({}).replace_schema_metadata({"image": image_column(opened, chosen) or ""})


def look(opened: Opened, *, location: str, image: str, columns: Mapping[str, Any]) -> Iterator[pa.Table]:
    """A table without rows, of the further columns, with the names of those that are used as metadata; and
    one of the rows at which row groups end.
    """
    with opened() as file, pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as parquet:
        refuse_many_columns(location, parquet.metadata.num_columns)
        layout = read_layout(location, parquet.schema_arrow, image, Columns(**columns))
        used = {"image": image, "caption": layout.caption, "labels": layout.labels}
        yield pa.schema(list(layout.others.values()), {"used": json.dumps(used)}).empty_table()
        ends = [0]
        for number in range(parquet.metadata.num_row_groups):
            ends.append(ends[-1] + parquet.metadata.row_group(number).num_rows)
        yield pa.table({"end": pa.array(ends[1:], pa.int64())})


def rows(opened: Opened, *, location: str, image: str, columns: Mapping[str, Any]) -> Iterator[pa.Table]:
    """All rows: path, offset, caption, labels, and the further columns; the images are not looked at."""
    with opened() as file, pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as parquet:
        layout = read_layout(location, parquet.schema_arrow, image, Columns(**columns))
        read = [name for name in (layout.caption, layout.labels, *layout.others) if name is not None]
        read += [f"{image}.path"] if layout.has_path else []
        row = 0
        for group in range(parquet.num_row_groups):
            for batch in _batches(parquet, group, read):
                items = [_item(layout, row + n, values) for n, values in enumerate(batch)]
                row += len(items)
                schema = pa.schema([*OWN, *layout.others.values()])
                yield pa.Table.from_pylist(items, schema)


def _batches(parquet: pq.ParquetFile, group: int, read: list[str]) -> Iterator[list[dict[str, Any]]]:
    if read:
        for batch in parquet.iter_batches(_ROWS_AT_A_TIME, [group], read, use_threads=False):
            yield batch.to_pylist()
        return
    left = parquet.metadata.row_group(group).num_rows
    while left > 0:
        yield [{}] * min(left, _ROWS_AT_A_TIME)
        left -= _ROWS_AT_A_TIME


def images(opened: Opened, *, image: str, first: int, max_bytes: int) -> Iterator[pa.Table]:
    """The images from a row on, and in place of some a key of PROBLEMS."""
    with opened() as file, pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as parquet:
        end = 0
        for group in range(parquet.num_row_groups):
            row, end = end, end + parquet.metadata.row_group(group).num_rows
            if end <= first:
                continue
            for batch in parquet.iter_batches(_IMAGES_AT_A_TIME, [group], [image], use_threads=False):
                values = batch.column(0)[max(0, first - row) :].to_pylist()
                row += len(batch)
                if values:
                    yield _images(values, max_bytes)


def _images(values: Iterable[Any], max_bytes: int) -> pa.Table:
    found: list[bytes | None] = []
    problems: list[str] = []
    for value in values:
        data = value.get("bytes") if isinstance(value, dict) else value
        problems.append(
            "" if data and len(data) <= max_bytes else "too_many_bytes" if data else "no_image_bytes"
        )
        found.append(None if problems[-1] else data)
    return pa.table({"data": pa.array(found, pa.large_binary()), "problem": pa.array(problems, pa.string())})


def _item(layout: TableLayout, row: int, values: Mapping[str, Any]) -> dict[str, Any]:
    path = (values.get(layout.image) or {}).get("path") if layout.has_path else None
    caption = values[layout.caption] if layout.caption else None
    labels = _labels(layout, layout.labels, values[layout.labels]) if layout.labels else []
    return {
        "path": _text(path).encode() if path else str(row).encode(),
        "offset": row,
        "caption": None if caption is None else _text(caption),
        "labels": labels[:MOST_LABELS],
        **{field.name: _value(layout, name, values[name]) for name, field in layout.others.items()},
    }


def _labels(layout: TableLayout, column: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    named = [text for each in values if (text := _name(layout, column, each)) is not None]
    if isinstance(value, str) and column.lower() in ("labels", "hashtags", "tags"):
        return split_labels(named[0]) if named else []
    return named


def _name(layout: TableLayout, column: str, value: Any) -> str | None:
    names = layout.names.get(column)
    if value is None or value == "":
        return None
    if names is None or not isinstance(value, int):
        return _text(value)
    # -1 is Hugging Face's "nobody has said".
    return names[value] if 0 <= value < len(names) else None if value == -1 else str(value)


def _value(layout: TableLayout, column: str, value: Any) -> Any:
    if value is None or column in layout.names:
        return _name(layout, column, value)
    return value if stays(layout.others[column].type) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
