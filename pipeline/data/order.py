"""Which sample is where in which batch: a pure function of (counts, seed, epoch, step, B, L, W).

The shards are permuted and laid out on one axis, which is turned by a keyed offset and cut into L equal
lanes. In a lane, windows of W rows are shuffled. Batch t takes rows [t·B/L, (t+1)·B/L) of every lane, lane by
lane. What is left over, fewer than B + L samples, is another part of the dataset in every epoch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.errors import UserError
from pipeline.data.feistel import derive_key, permute

_MAX_LANES = 1024
# Which of the independent keyed choices a key is for.
_SHARDS, _TURN, _WINDOW = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Order:
    """The numbers that fix the order of a run; `plan_order` makes it."""

    samples: int
    batch_size: int
    lanes: int
    window: int
    seed: int

    @property
    def lane_length(self) -> int:
        """Rows of one lane."""
        return self.samples // self.lanes

    @property
    def lane_rows(self) -> int:
        """Rows that one batch takes from each lane."""
        return self.batch_size // self.lanes

    @property
    def windows(self) -> int:
        """Windows of one lane, whose remainder joins the last: a few rows would neither mix nor offer
        substitutes."""
        return max(self.lane_length // self.window, 1)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the same on every rank."""
        return self.lane_length // self.lane_rows


@dataclass(frozen=True, kw_only=True)
class EpochIndex:
    """One epoch's axis: the permuted shards and where each of them ends."""

    shards: NDArray[np.int64]
    ends: NDArray[np.int64]


def plan_order(*, samples: int, batch_size: int, window: int, seed: int) -> Order:
    """Choose the lanes: the largest power of two that divides B and is at most min(1024, samples // W).

    Raises:
        UserError: if the dataset is smaller than one batch.
    """
    if samples < batch_size:
        raise UserError(
            f"data.batch_size is {batch_size} but the dataset has {samples} samples: "
            f"use a batch size of at most {samples}, or a larger dataset"
        )
    most = min(_MAX_LANES, samples // window)
    lanes = 1
    while batch_size % (2 * lanes) == 0 and 2 * lanes <= most:
        lanes *= 2
    return Order(samples=samples, batch_size=batch_size, lanes=lanes, window=window, seed=seed)


def rank_rows(batch_size: int, *, rank: int, world_size: int) -> slice:
    """The contiguous rows of every global batch that a rank takes.

    Raises:
        UserError: if the world size does not divide the batch; names the nearest that do.
    """
    if batch_size % world_size:
        legal = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
        near = sorted(sorted(legal, key=lambda size: abs(size - world_size))[:4])
        raise UserError(
            f"{world_size} ranks cannot share data.batch_size {batch_size} evenly: use a number of ranks "
            f"that divides it, such as {', '.join(map(str, near))}, or another batch size"
        )
    rows = batch_size // world_size
    return slice(rank * rows, (rank + 1) * rows)


def global_batch(
    order: Order,
    *,
    epoch: int,
    step: int,
    rows: slice = slice(None),
    ahead: ArrayLike = 0,
) -> NDArray[np.int64]:
    """Positions on the epoch's axis of one global batch: a pure function, no state, O(rows) time.

    Args:
        step: of the epoch, below `order.steps_per_epoch`.
        rows: of the global batch; all of them by default.
        ahead: how many rows further in the window to look, wrapping: the substitutes of bad samples.

    Returns:
        (rows,) int64, each below `order.samples`.
    """
    numbers = np.arange(order.batch_size, dtype=np.int64)[rows]
    lane = numbers // order.lane_rows
    row = step * order.lane_rows + numbers % order.lane_rows
    window = np.minimum(row // order.window, order.windows - 1)
    start = window * order.window
    size = np.where(window == order.windows - 1, order.lane_length - start, order.window)
    keys = derive_key(_WINDOW, order.seed, epoch, lane, window)
    inside = permute((row - start + np.asarray(ahead, np.int64)) % size, size, keys)
    positions: NDArray[np.int64] = lane * order.lane_length + start + inside
    return (positions + _turn(order, epoch)) % order.samples


def _turn(order: Order, epoch: int) -> int:
    return int(derive_key(_TURN, order.seed, epoch)[0] % np.uint64(order.samples))


def windows_at(order: Order, step: int) -> range:
    """The windows, counted in each lane alike, that the batch of a step takes rows from."""
    first, last = step * order.lane_rows, (step + 1) * order.lane_rows - 1
    return range(_window(order, first), _window(order, last) + 1)


def windows_after(order: Order, epoch: int, windows: range) -> tuple[int, range]:
    """The epoch and the windows of the first batch that needs others than these, and later ones."""
    step = windows.stop * order.window // order.lane_rows
    if windows.stop == order.windows or step >= order.steps_per_epoch:
        return epoch + 1, windows_at(order, 0)
    return epoch, windows_at(order, step)


def share_of_step(order: Order, step: int, count: int) -> slice:
    """Of `count` things to do while the last window of this step lasts, those for this step.

    All steps of a window together do each of them once, evenly spread.
    """
    window = windows_at(order, step)[-1]
    start = window * order.window
    size = order.lane_length - start if window == order.windows - 1 else order.window
    before, after = step * order.lane_rows - start, (step + 1) * order.lane_rows - start
    if step + 1 == order.steps_per_epoch or windows_at(order, step + 1)[-1] != window:
        after = size
    return slice(max(before, 0) * count // size, after * count // size)


def _window(order: Order, row: int) -> int:
    return min(row // order.window, order.windows - 1)


def units_of(
    order: Order, index: EpochIndex, *, epoch: int, rows: slice, windows: range
) -> NDArray[np.int64]:
    """The shards that some windows touch, in all lanes that a rank takes rows from: O(shards) time.

    Args:
        index: of the epoch.
        rows: of every global batch, which the rank takes.

    Returns:
        Indices in the dataset, ascending.
    """
    lanes = np.arange(rows.start // order.lane_rows, (rows.stop - 1) // order.lane_rows + 1)
    start = windows.start * order.window
    stop = order.lane_length if windows.stop == order.windows else windows.stop * order.window
    first = (lanes * order.lane_length + start + _turn(order, epoch)) % order.samples
    last = (first + stop - start - 1) % order.samples
    # Each stretch of the axis covers neighbouring places; one that runs over the axis' end covers both ends.
    opened, closed = (np.searchsorted(index.ends, position, side="right") for position in (first, last))
    change = np.zeros(len(index.ends) + 1, np.int64)
    np.add.at(change, opened, 1)
    np.add.at(change, closed + 1, -1)
    change[0] += np.count_nonzero(last < first)
    return np.sort(index.shards[np.cumsum(change[:-1]) > 0])


def smallest_window(order: Order) -> int:
    """Rows of the smallest window: how many candidates stand in for a bad sample, itself included."""
    return min(order.window, order.lane_length)


def epoch_index(order: Order, counts: NDArray[np.int64], *, epoch: int) -> EpochIndex:
    """The axis of an epoch: O(shards) time and memory.

    Args:
        counts: (shards,) samples of each shard; they sum to `order.samples`.
    """
    shards = permute(np.arange(len(counts)), len(counts), derive_key(_SHARDS, order.seed, epoch))
    return EpochIndex(shards=shards, ends=np.cumsum(counts[shards], dtype=np.int64))


def locate(index: EpochIndex, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The shard (its index in the dataset) and the row in it of each position on the axis."""
    place = np.searchsorted(index.ends, positions, side="right")
    shard = index.shards[place]
    before = np.where(place > 0, index.ends[place - 1], 0)
    return shard, positions - before


def window_spans(order: Order, *, epoch: int, lane: int, window: int) -> list[tuple[int, int]]:
    """Where a lane's window lies on the epoch's axis: (first, end), and once more if it runs over the end."""
    size = largest_window(order) if window == order.windows - 1 else order.window
    first = (lane * order.lane_length + window * order.window + _turn(order, epoch)) % order.samples
    end = first + size
    return [(first, min(end, order.samples)), (0, end - order.samples)][: 1 + (end > order.samples)]


def largest_window(order: Order) -> int:
    """Rows of the largest window: the last of a lane, which takes what is left."""
    return order.lane_length - (order.windows - 1) * order.window
