"""Files of rows, one JSON object to a line, that grow at their end for as long as a run does.

They are read a row at a time, from either end: what looks at the end costs the same however long a file is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cluster.errors import UserError

Row = dict[str, Any]

_BLOCK = 64 * 1024  # bytes


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file from its start, without one that is being written at the moment.

    Raises:
        UserError: if a row is damaged; names its line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                row = parse_row(line)
                if row is None:
                    raise _damaged(f"line {number}", path)
                yield row


def last_row(path: Path, *, up_to_step: float = math.inf) -> Row | None:
    """The last row whose `step`, if it has one, is not above that; None if there is none.

    Raises:
        UserError: if a row is damaged.
    """
    for _, line in lines_from_end(path):
        row = parse_row(line)
        if row is None:
            raise _damaged("a line near the end", path)
        if row.get("step", 0) <= up_to_step:
            return row
    return None


def lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each whole line ends, as bytes from the start, and the line: the last one first."""
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        cut = b""  # the end of a line that may begin before `start`
        while start:
            size = min(max(_BLOCK, len(cut)), start)
            start = file.seek(start - size)
            cut, *lines = BytesIO(file.read(size) + cut).readlines()
            end = start + len(cut) + sum(map(len, lines))
            for line in reversed(lines):
                if line.endswith(b"\n"):  # not one that is being written
                    yield end, line
                end -= len(line)
        if cut.endswith(b"\n"):
            yield len(cut), cut


def parse_row(line: bytes) -> Row | None:
    """A line as a row; None if it is none, such as after a power cut."""
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _damaged(where: str, path: Path) -> UserError:
    return UserError(f"{where} of {path} is damaged: it is not a JSON object; remove that line")
