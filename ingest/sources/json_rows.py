"""JSON Lines, or one JSON array of objects: every value is text, every object a row or one that is told of.

pyarrow reads blocks of lines; one in which it finds something odd is read line by line.
"""

import codecs
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from ingest.sources.delimited import Part
from ingest.sources.json_stream import JsonStream
from ingest.sources.text_blocks import Opened, blocks, pieces

# From here on, a float may stand for several whole numbers.
_EXACT = 2.0**53
_BATCH = 1 << 16
_END = object()


def read_json(opened: Opened) -> Iterator[Part]:
    """The rows in tables of columns of text, lists of text, or other nested values.

    Raises:
        LongLineError: there is one.
    """
    if next(pieces(opened), b"").lstrip().startswith(b"["):
        yield from _array(pieces(opened))
        return
    lines = _Lines()
    for block in blocks(opened):
        yield lines.read(block)


class _Lines:
    """JSON Lines, block by block.

    Attributes:
        line: the number of the next line, from 1.
    """

    def __init__(self) -> None:
        self.line = 1
        # Columns in whose texts pyarrow would see times.
        self._texts: dict[str, pa.DataType] = {}

    def read(self, block: bytes) -> Part:
        table = self._fast(block)
        if table is not None:
            self.line += block.count(b"\n")
            return Part(table)
        values: list[dict[str, Any]] = []
        odd: list[str] = []
        for line in block.splitlines():
            if line.strip():
                value = _object(line)
                if value is None:
                    odd.append(f"line {self.line}")
                else:
                    values.append(value)
            self.line += 1
        return Part(_table(values), odd)

    def _fast(self, block: bytes) -> pa.Table | None:
        """The rows as pyarrow sees them; None if it sees something odd, or may see numbers wrongly."""
        try:
            table = self._parsed(block)
            times = {
                each.name: _as_text(each.type) for each in table.schema if _as_text(each.type) != each.type
            }
            if times:
                self._texts |= times
                table = self._parsed(block)
        except pa.ArrowException:
            return None
        if any(_is_inexact(column) for column in table.columns):
            return None
        return table

    def _parsed(self, block: bytes) -> pa.Table:
        schema = pa.schema(list(self._texts.items())) if self._texts else None
        return pa_json.read_json(
            pa.BufferReader(block),
            read_options=pa_json.ReadOptions(block_size=len(block) + 1, use_threads=False),
            parse_options=pa_json.ParseOptions(explicit_schema=schema),
        )


def _as_text(kind: pa.DataType) -> pa.DataType:
    """The type with text in the place of times, which pyarrow sees in texts."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_text(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(_as_text(each.type)) for each in kind])
    return kind


def _is_inexact(column: pa.ChunkedArray) -> bool:
    """Whether there is a float, at any depth, that may have been a whole number of many digits."""
    if pa.types.is_floating(column.type):
        return bool(pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py())
    if pa.types.is_list(column.type):
        return _is_inexact(pc.list_flatten(column))
    if pa.types.is_struct(column.type):
        return any(_is_inexact(pc.struct_field(column, n)) for n in range(column.type.num_fields))
    return False


def _object(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if there is none."""
    try:
        value = json.loads(line.decode("utf-8", "backslashreplace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _table(values: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for value in values for name in value)
    return pa.table({_sound(name): _column([value.get(name) for value in values]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """Texts; or lists of texts, if all are lists of simple values."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, list) and not any(map(_is_nested, value)) for value in known):
        lists = [None if value is None else list(map(_spelled, value)) for value in values]
        return pa.array(lists, pa.list_(pa.string()))
    return pa.array([_spelled(value) for value in values], pa.string())


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


def _spelled(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value if value is None else _sound(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):  # as pyarrow does
        return str(pa.scalar(value).cast(pa.string()))
    return _sound(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _sound(text: str) -> str:
    """Halves of characters, which JSON can spell and no file can hold, show as \\u escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _array(pieces: Iterator[bytes]) -> Iterator[Part]:
    """The objects of one JSON array, a batch at a time."""
    characters = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    items = JsonStream(map(characters.decode, pieces)).items()
    values: list[dict[str, Any]] = []
    odd: list[str] = []
    for number in count(1):
        try:
            value = next(items, _END)
        except (ValueError, RecursionError):  # what follows cannot be told from it
            value, items = None, iter(())
        if value is _END:
            break
        if isinstance(value, dict):
            values.append(value)
        else:
            odd.append(f"item {number}")
        if len(values) + len(odd) >= _BATCH:
            yield Part(_table(values), odd)
            values, odd = [], []
    if values or odd:
        yield Part(_table(values), odd)
