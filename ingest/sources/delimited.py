"""CSV and TSV as people have them: every value is text, every line a row or a line that is told of.

pyarrow reads blocks in which quotes say what they should. A block with any other, or with a row of too many
or too few values, is read line by line: there, quotes that do not enclose a value are part of it.

Quotes in CSV enclose values, and are doubled within them, or escaped with a backslash if that is what makes
rows of lines. In TSV, as data sets of captions have it, a quote is a character like others, unless quotes are
doubled in values or enclose tabs.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as pa_csv

from cluster.errors import UserError
from ingest.sources.text_blocks import Opened, blocks

# Lines that are looked at to find out what quotes mean.
_SAMPLE = 1_000
# A value that goes on over more than this much text is none: its quote has no end.
_LONGEST_VALUE = 1 << 17
# Each column of a list is one of every dataset that is made of it.
_MOST_COLUMNS = 4_096
_ESCAPED = re.compile(rb'\\([\\"])')
_LINE_END = re.compile(rb"(?<=\n)|(?<=\r)(?!\n)")
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_OTHER_DELIMITERS = "\t;|"


def refuse_many_columns(place: str, columns: int) -> None:
    """Before much is made of each of them.

    Raises:
        UserError: no list has so many.
    """
    if columns > _MOST_COLUMNS:
        raise UserError(
            f"{place} has {columns:,} columns, and no list has more than {_MOST_COLUMNS:,}: write it anew "
            "with the useful ones"
        )


@dataclass(frozen=True)
class Part:
    """A part of a list: rows, and lines that are none, by what is told of them."""

    table: pa.Table
    odd: Sequence[str] = ()


def read_delimited(opened: Opened, kind: str, names: Sequence[str] | None, *, place: str) -> Iterator[Part]:
    """The rows in tables of binary columns.

    Args:
        opened: opens the file.
        kind: "csv" or "tsv".
        names: of its columns, if the first line does not name them.
        place: what to call the file.

    Raises:
        UserError: the first line has another number of values than there are names.
        LongLineError: there is one.
    """
    reader: _Reader | None = None
    rest = b""
    for block in blocks(opened):
        if reader is None:
            reader, block = _begun(block, kind, names, place)  # noqa: PLW2901
        if reader is not None:
            part, rest = reader.read(rest + block)
            yield part
    if reader is not None and rest:
        yield reader.read(rest, last=True)[0]


def _begun(
    block: bytes, kind: str, names: Sequence[str] | None, place: str
) -> tuple["_Reader | None", bytes]:
    """A reader, once there is a line, and the rows behind the one that names the columns."""
    rows = block.lstrip(b"\r\n")
    if not rows:
        return None, b""
    header = _LINE_END.split(rows, maxsplit=1)[0]
    text = _text(header).rstrip("\r\n")
    delimiter = _DELIMITERS[kind]
    if kind == "csv" and delimiter not in text:
        delimiter = next((other for other in _OTHER_DELIMITERS if other in text), delimiter)
    found = _values([text], delimiter) or text.split(delimiter)
    refuse_many_columns(place, len(found))
    line = 1 + _line_ends(block[: len(block) - len(rows)])
    if names is not None and len(names) != len(found):
        raise UserError(
            f"{place} has {len(found)} values in its first line, and --columns names {len(names)}: name as "
            "many"
        )
    quoted = True if kind == "csv" else None
    if names is not None:
        return _Reader(list(names), delimiter, quoted, line), rows
    return _Reader(found, delimiter, quoted, line + 1), rows[len(header) :]


@dataclass
class _Reader:
    """What is known of a file while it is read.

    Attributes:
        names: of its columns.
        delimiter: between values.
        quoted: whether quotes enclose values; None until one is seen.
        line: the number of the next line, from 1.
        escaped: whether quotes in values are escaped with a backslash; None until one is seen.
    """

    names: list[str]
    delimiter: str
    quoted: bool | None
    line: int
    escaped: bool | None = None

    def read(self, block: bytes, *, last: bool = False) -> tuple[Part, bytes]:
        """A block's rows, and what of it must be read with the next one."""
        if not block.strip(b"\r\n"):
            self.line += _line_ends(block)
            return self._part([], []), b""
        if self.quoted is None and b'"' in block:
            self.quoted = _is_quoted(block, self.delimiter, len(self.names))
        text = block
        if self.quoted and b'\\"' in block and self.escaped is None:
            self.escaped = self._is_escaped(block)
        if self.escaped:
            text = _unescaped(block)
        if not (self.quoted and b'"' in text and self._has_odd_quotes(text)):
            table = self._fast(text)
            if table is not None:
                self.line += _line_ends(text)
                return Part(table), b""
        part, left = self._carefully(text, last=last)
        return part, b"".join(block.splitlines(keepends=True)[-left:]) if left else b""

    def _has_odd_quotes(self, block: bytes) -> bool:
        """Whether a line's quotes are no pairs, or one neither begins nor ends a value."""
        data = np.frombuffer(block, np.uint8)
        quotes = np.flatnonzero(data == ord('"'))
        ends = np.append(np.flatnonzero(data == ord("\n")), len(data))
        if (np.searchsorted(quotes, ends) % 2).any():
            return True
        padded = np.frombuffer(b"\n" + block + b"\n\n", np.uint8)
        edge = np.zeros(256, bool)
        edge[[ord(self.delimiter), ord("\n"), ord("\r")]] = True
        before, behind, second = (edge[padded[quotes + step]] for step in (0, 2, 3))
        doubled_before, doubled_behind = (padded[quotes + step] == ord('"') for step in (0, 2))
        lone = ~before & ~behind & ~doubled_before & ~doubled_behind
        # `""a`, where a value begins.
        third = padded[quotes + 3] == ord('"') if len(quotes) else np.zeros(0, bool)
        empty = before & doubled_behind & ~second & ~third
        return bool((lone | empty).any())

    def _fast(self, block: bytes) -> pa.Table | None:
        """The rows; None if one has another number of values."""
        odd = False

        def ragged(row: pa_csv.InvalidRow) -> str:
            nonlocal odd
            odd = True
            return "skip"

        table = pa_csv.read_csv(
            pa.BufferReader(block),
            read_options=pa_csv.ReadOptions(
                column_names=self.names, use_threads=False, block_size=max(len(block), 1) + 1
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if self.quoted else False,
                invalid_row_handler=ragged,
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(self.names, pa.binary()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        return None if odd else table

    def _carefully(self, block: bytes, *, last: bool) -> tuple[Part, int]:
        """Line by line; the number of lines at the end whose value may go on in the next block."""
        lines = block.splitlines(keepends=True)
        unpaired = [bool(self.quoted) and line.count(b'"') % 2 == 1 for line in lines]
        rows: list[list[str]] = []
        odd: list[str] = []
        at = 0
        while at < len(lines):
            line = _text(lines[at]).rstrip("\r\n")
            by_rules = self.quoted and ('"' in line or not line)
            taken, row = 1, _values([line], self.delimiter) if by_rules else line.split(self.delimiter)
            if row is None and unpaired[at]:
                end = next((n for n in range(at + 1, len(lines)) if unpaired[n]), None)
                value = lines[at:] if end is None else lines[at : end + 1]
                if sum(map(len, value)) <= _LONGEST_VALUE:
                    if end is None and not last:
                        return self._part(rows, odd), len(value)
                    several = _values(list(map(_text, value)), self.delimiter)
                    if several is not None and len(several) == len(self.names):
                        taken, row = len(value), several
            if row is None:  # its quotes are characters like others
                row = line.split(self.delimiter)
            if len(row) == len(self.names):
                rows.append(row)
            elif line:
                odd.append(f"line {self.line}")
            self.line += taken
            at += taken
        return self._part(rows, odd), 0

    def _part(self, rows: Sequence[Sequence[str]], odd: Sequence[str]) -> Part:
        columns = zip(*rows, strict=True) if rows else ([] for _ in self.names)
        arrays = [
            pa.array([value.encode("utf-8", "backslashreplace") or None for value in column], pa.binary())
            for column in columns
        ]
        return Part(pa.table(arrays, names=self.names), odd)

    def _is_escaped(self, block: bytes) -> bool:
        """Whether more lines are rows if a backslash escapes the quote behind it."""
        lines = [line for line in block.splitlines() if b'\\"' in line][:_SAMPLE]
        plain, escaped = (
            sum(self._is_row(line) for line in each) for each in (lines, map(_unescaped, lines))
        )
        return escaped > plain

    def _is_row(self, line: bytes) -> bool:
        row = _values([_text(line)], self.delimiter)
        return row is not None and len(row) == len(self.names)


def _line_ends(text: bytes) -> int:
    """Of lines as `bytes.splitlines` has them: old ones end with a carriage return."""
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def _unescaped(text: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: b'""' if found[1] == b'"' else found[1], text)


def _is_quoted(block: bytes, delimiter: str, columns: int) -> bool:
    """Whether quotes enclose values in this TSV: all of them could, and some have to."""
    lines = [_text(line) for line in block.splitlines() if b'"' in line][:_SAMPLE]
    rows = [_values([line], delimiter) for line in lines]
    if not lines or not all(row is not None and len(row) == columns for row in rows):
        return False
    everything = all(
        value[:1] + value[-1:] == '""' and len(value) > 1 for line in lines for value in line.split(delimiter)
    )
    return everything or any(
        line.count(delimiter) >= columns or re.search(f'[^{delimiter}"]""|""[^{delimiter}"]', line)
        for line in lines
    )


def _values(lines: Sequence[str], delimiter: str) -> list[str] | None:
    """The values of the one row that these lines are by the rules of CSV; None if they are none."""
    try:
        rows = list(csv.reader(lines, _dialect(delimiter)))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


@cache
def _dialect(delimiter: str) -> Any:
    """Made once: that takes longer than to read a line by it."""
    return csv.reader([], delimiter=delimiter, strict=True).dialect


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
