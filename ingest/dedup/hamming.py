"""All pairs of 64-bit hashes within a Hamming distance, found exactly and without comparing each with each.

r differing bits cannot touch all of r + 1 bands (pigeonhole). So two hashes within r agree in a whole band,
and in what is left of them, cut into r + 1 parts again, in a whole part. For each band and part the hashes
that agree in both make a bucket, and only members of one bucket are compared: at r = 3 that is 4 bands of 16
bits, each with 4 parts of 12. Buckets of 28 bits instead of 16 have 4,096 times fewer pairs each; there are
four times as many.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BITS = 64
MAX_RADIUS = 16
REACH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosePairs:
    """What was found in one band.

    Attributes:
        first, second: positions of the two hashes, first < second, each pair once, (p,) int64.
        distance: bits in which they differ, (p,) uint8.
        compared: pairs that were looked at.
        hot_buckets: buckets so full that not all their pairs were compared.
        hot_members: hashes in those, counted once per bucket.
        not_compared: pairs in those that were not; other bands and parts may still have found them.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.uint8]
    compared: int
    hot_buckets: int
    hot_members: int
    not_compared: int


def bands(width: int, radius: int) -> list[tuple[int, int]]:
    """Start and length of radius + 1 bands that cover `width` bits, from the highest bit on."""
    edges = [width * number // (radius + 1) for number in range(radius + 2)]
    return [(start, end - start) for start, end in pairwise(edges)]


def band_values(hashes: NDArray[np.uint64], radius: int, band: int) -> NDArray[np.uint64]:
    """The bits of one band as numbers. Hashes within the radius agree in at least one band's."""
    start, length = bands(BITS, radius)[band]
    return _rotate(hashes, start, BITS) >> np.uint64(BITS - length)


def close_pairs(hashes: NDArray[np.uint64], *, radius: int, band: int, reach: int = REACH) -> ClosePairs:
    """Every pair within `radius` that agrees in the band; all bands together have every pair.

    Args:
        hashes: ascending and distinct, (n,). Those that agree in the band must all be here; others may be.
        radius: the largest distance, 0 to MAX_RADIUS.
        band: 0 to radius.
        reach: in a bucket in ascending order, each hash is compared with so many that follow it.
    """
    start, length = bands(BITS, radius)[band]
    rest = BITS - length
    turned = _rotate(hashes, start, BITS)
    found = [np.empty(0, np.int64)]
    compared, hot = 0, np.zeros(3, np.int64)
    for inner, part in bands(rest, radius) if radius else []:
        # Rotated, band and part are the highest bits, so that sorting makes the buckets. The values alone
        # are sorted, which is several times faster than sorting positions: pairs are few, and looked up.
        table = np.sort(_rotate(turned, inner, rest))
        buckets = table >> np.uint64(rest - part)
        for lag, at in _at_lags(buckets, reach):
            compared += len(at)
            near = at[np.bitwise_count(table[at] ^ table[at + lag]) <= radius]
            if len(near):
                values = np.stack([table[near], table[near + lag]], axis=1)
                values = _rotate(_rotate(values, rest - inner, rest), BITS - start, BITS)
                ends = np.searchsorted(hashes, values)
                found.append(ends.min(axis=1) * len(hashes) + ends.max(axis=1))
        hot += _beyond(buckets, reach)
    first, second = np.divmod(np.unique(np.concatenate(found)), max(1, len(hashes)))
    return ClosePairs(
        first=first,
        second=second,
        distance=np.bitwise_count(hashes[first] ^ hashes[second]),
        compared=compared,
        hot_buckets=int(hot[0]),
        hot_members=int(hot[1]),
        not_compared=int(hot[2]),
    )


def _at_lags(buckets: NDArray[np.uint64], reach: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """For each lag: the positions whose bucket still holds the hash `lag` places further on."""
    at = np.flatnonzero(buckets[1:] == buckets[:-1])
    for lag in range(1, reach + 1):
        if not len(at):
            return
        yield lag, at
        at = at[at + lag + 1 < len(buckets)]
        at = at[buckets[at] == buckets[at + lag + 1]]


def _beyond(buckets: NDArray[np.uint64], reach: int) -> NDArray[np.int64]:
    """Buckets with pairs further apart than the reach: how many, their members, and those pairs."""
    full = np.unique(buckets[: -reach - 1][buckets[: -reach - 1] == buckets[reach + 1 :]])
    sizes = np.searchsorted(buckets, full, side="right") - np.searchsorted(buckets, full, side="left")
    over = sizes - reach
    return np.array([len(full), sizes.sum(), (over * (over - 1) // 2).sum()], np.int64)


def _rotate(values: NDArray[np.uint64], by: int, width: int) -> NDArray[np.uint64]:
    """The lowest `width` bits rotated by `by` places to the left; the higher bits stay."""
    if by in (0, width):
        return values
    mask = np.uint64((1 << width) - 1)
    low = values & mask
    low = ((low << np.uint64(by)) & mask) | (low >> np.uint64(width - by))
    return (values & ~mask) | low
