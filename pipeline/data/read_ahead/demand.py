"""What the ranks of one node will read, by number: pure arithmetic, for who reads ahead of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data import order as orders
from pipeline.data.copies import Copies

# Rows of units, in one order: (n,) indices of units in the dataset, and (n,) rows in them.
Places = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, order=True)
class Piece:
    """Neighbouring rows of one unit: `first` … `end` − 1."""

    unit: int
    first: int
    end: int


class Demand(Protocol):
    """What is read, and when. Steps are counted over all epochs."""

    @property
    def window_rows(self) -> int:
        """Rows of the largest windows that are open at the same time; 0 if windows are not read whole."""
        ...

    def places(self, step: int) -> list[Places] | None:
        """What each rank of the node reads at a step; None behind the last."""
        ...

    def windows(self, step: int) -> range:
        """Numbers of the windows that a step reads of, over all epochs; empty if they are not read whole."""
        ...

    def pieces(self, window: int) -> list[Piece]:
        """All rows that the node's lanes have in a window."""
        ...


@dataclass(frozen=True, eq=False)
class Training:
    """The rows of global batches that a node's ranks take.

    Windows are read whole where the node takes all rows of its lanes: another node's share of them would be
    read in vain.

    Args:
        counts: (units,) samples of each unit, or rows if samples have copies.
        rows: of every global batch, those of each rank of the node.
        copies: of samples that an epoch has several times.
    """

    order: orders.Order
    counts: NDArray[np.int64]
    rows: tuple[slice, ...]
    copies: Copies | None = None
    _epochs: dict[int, orders.EpochIndex] = field(default_factory=dict, init=False, repr=False)

    @property
    def window_rows(self) -> int:
        return len(self._whole_lanes) * orders.largest_window(self.order)

    def places(self, step: int) -> list[Places]:
        epoch, of_epoch = divmod(step, self.order.steps_per_epoch)
        index = self._index(epoch)
        return [
            self._samples(
                *orders.locate(index, orders.global_batch(self.order, epoch=epoch, step=of_epoch, rows=rows))
            )
            for rows in self.rows
        ]

    def windows(self, step: int) -> range:
        if not self._whole_lanes:
            return range(0)
        epoch, of_epoch = divmod(step, self.order.steps_per_epoch)
        used = orders.windows_at(self.order, of_epoch)
        before = epoch * self._windows_per_epoch
        return range(before + used.start, before + used.stop)

    def pieces(self, window: int) -> list[Piece]:
        epoch, of_epoch = divmod(window, self._windows_per_epoch)
        index = self._index(epoch)
        return [
            self._of_samples(piece)
            for lane in self._whole_lanes
            for start, end in orders.window_spans(self.order, epoch=epoch, lane=lane, window=of_epoch)
            for piece in _pieces(index, start, end)
        ]

    def _samples(self, units: NDArray[np.int64], rows: NDArray[np.int64]) -> Places:
        return units, rows if self.copies is None else self.copies.samples(units, rows)[0]

    def _of_samples(self, piece: Piece) -> Piece:
        """The samples whose copies a piece has, each once."""
        ends = np.array([piece.first, piece.end - 1])
        _, (first, last) = self._samples(np.full(2, piece.unit), ends)
        return Piece(piece.unit, int(first), int(last) + 1)

    @cached_property
    def _windows_per_epoch(self) -> int:
        """Those that batches are made of: the last rows of a lane may be in none."""
        return orders.windows_at(self.order, self.order.steps_per_epoch - 1).stop

    @cached_property
    def _whole_lanes(self) -> Sequence[int]:
        return whole_lanes(self.order, self.rows)

    def _index(self, epoch: int) -> orders.EpochIndex:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # the end of one epoch is read together with the start of the next
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = orders.epoch_index(self.order, self.counts, epoch=epoch)
        return self._epochs[epoch]


@dataclass(frozen=True, eq=False)
class Listed:
    """Positions of a dataset's axis, `batch_size` at each step: what one process evaluates.

    Args:
        counts: (units,) samples of each unit.
        positions: in the order in which they are read.
    """

    counts: NDArray[np.int64]
    positions: NDArray[np.int64]
    batch_size: int

    window_rows = 0

    def at(self, step: int) -> Places:
        """What is read at a step; nothing behind the last."""
        positions = self.positions[step * self.batch_size : (step + 1) * self.batch_size]
        units = np.searchsorted(self._ends, positions, side="right")
        return units, positions - self._ends[units] + self.counts[units]

    def places(self, step: int) -> list[Places] | None:
        return [self.at(step)] if step * self.batch_size < len(self.positions) else None

    def windows(self, step: int) -> range:
        return range(0)

    def pieces(self, window: int) -> list[Piece]:
        raise ValueError(f"there is no window {window}: a list is read in its own order")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts)


def whole_lanes(order: orders.Order, rows: Sequence[slice]) -> range:
    """The lanes of which these rows of a global batch are all rows; none if one of them is shared."""
    first, end = min(part.start for part in rows), max(part.stop for part in rows)
    together = sum(part.stop - part.start for part in rows)
    if together != end - first or first % order.lane_rows or end % order.lane_rows:
        return range(0)
    return range(first // order.lane_rows, end // order.lane_rows)


def _pieces(index: orders.EpochIndex, start: int, end: int) -> list[Piece]:
    """The rows of the axis from `start` to before `end`, unit by unit."""
    pieces = []
    while start < end:
        (unit,), (row,) = orders.locate(index, np.array([start]))
        place = int(np.searchsorted(index.ends, start, side="right"))
        count = min(end, int(index.ends[place])) - start
        pieces.append(Piece(int(unit), int(row), int(row) + count))
        start += count
    return pieces
