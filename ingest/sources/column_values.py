"""Values of strangers' columns as what rows hold: text, lists of labels, numbers, times."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ingest.dataset.schema import LABELS


def cast_to(kind: pa.DataType, column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.Array]:
    """A column in another type, null where a value is none of it; and where that is."""
    column = column if column.type == kind else as_text(column)
    try:
        return column.cast(kind), pa.array(np.zeros(len(column), bool))
    except pa.ArrowInvalid:
        values = [_value(value, kind) for value in column.to_pylist()]
    cast_column = pa.chunked_array([pa.array(values, kind)])
    return cast_column, pc.and_not(cast_column.is_null(), column.is_null()).combine_chunks()


def _value(text: str | None, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(text, pa.string()).cast(kind).as_py()
    except pa.ArrowInvalid:
        return None


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as text; bytes that are no UTF-8 show as \\x escapes."""
    column = _decoded(column)
    if _is_bytes_or_text(column.type):
        column = column.cast(pa.binary())
        try:
            return column.cast(pa.string())
        except pa.ArrowInvalid:
            texts = [None if x is None else x.decode("utf-8", "backslashreplace") for x in column.to_pylist()]
            return pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_nested(column.type):
        texts = [
            None if x is None else json.dumps(x, default=str, sort_keys=True) for x in column.to_pylist()
        ]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return column.cast(pa.string())


def as_labels(column: pa.ChunkedArray | None, rows: int) -> pa.ChunkedArray:
    """Lists of text. A text is one label, or several between commas, or hashtags between spaces."""
    if column is None:
        return pa.chunked_array([pa.array([[]] * rows, LABELS)])
    column = _decoded(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = [
            [str(label) for label in labels or () if label is not None] for labels in column.to_pylist()
        ]
    else:
        values = [split_labels(text) for text in as_text(column).to_pylist()]
    return pa.chunked_array([pa.array(values, LABELS)])


def split_labels(text: str | None) -> list[str]:
    """Labels in a text: `#sky #sea` or `sky, sea`."""
    if not text:
        return []
    if "#" in text:
        return [word.lstrip("#") for word in text.replace(",", " ").replace("#", " #").split() if word != "#"]
    return [label.strip() for label in text.split(",") if label.strip()]


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column that filters can work on: numbers, truth values and times as they are, all else as text."""
    column = _decoded(column)
    kind = column.type
    as_it_is = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return column if as_it_is or pa.types.is_temporal(kind) else as_text(column)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.dictionary_decode(column) if pa.types.is_dictionary(column.type) else column


def _is_bytes_or_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
