"""Rows of a unit as few ranges of its tar: neighbours are read together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_GAP = 16 << 10  # bytes that are read in vain rather than asked for apart


@dataclass(frozen=True)
class Range:
    """Bytes `start` … `start + size` − 1 of a tar, in which the `rows` are; rows of a unit, ascending."""

    start: int
    size: int
    rows: NDArray[np.int64]


def coalesce(
    rows: NDArray[np.int64],
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64],
    *,
    most_bytes: int,
    most_gap: int = MOST_GAP,
) -> Iterator[Range]:
    """Ranges that hold all of the rows, each once, in the order of the tar.

    Args:
        rows: (n,) of one unit, each once.
        offsets, sizes: (n,) where each is.
        most_bytes: of a range of more than one row.
        most_gap: bytes between two rows of a range.
    """
    by_place = np.argsort(offsets, kind="stable")
    rows, offsets = rows[by_place], offsets[by_place]
    ends = offsets + sizes[by_place]
    gaps = np.flatnonzero(offsets[1:] - ends[:-1] > most_gap) + 1
    first = 0
    for stop in [*gaps.tolist(), len(rows)]:
        while first < stop:
            fitting = int(np.searchsorted(ends[:stop], offsets[first] + most_bytes, side="right"))
            end = max(fitting, first + 1)
            start = int(offsets[first])
            yield Range(start, int(ends[end - 1]) - start, rows[first:end])
            first = end
