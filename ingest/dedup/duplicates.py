"""Which samples are duplicates of which, from hashes alone: arrays and scratch files, no images.

Each sample has an id. Ids of images that must not be in the dataset, those of evaluations, are the lowest
and are never dropped. Among samples with equal bytes the lowest id wins. Among those that look alike, ids are
taken in ascending order, and one is dropped if its perceptual hash lies within r bits of a lower one *that
was kept*. So what is dropped always has a kept twin within r, and chains do not form: when A is like B and B
like C, but A not like C, then C stays. The result depends on ids and hashes only, on no partition.

Both kinds are found in partitions that hold all that could be equal or alike (`exact_duplicates`,
`near_duplicates`); what they found is put together by `first_come` and `settle`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.dedup.hamming import BITS, ClosePairs, band_values, close_pairs
from ingest.dedup.partition import write_partitions

# Half of 256 bits: no two of 10 billion images are taken for equal by chance.
DIGESTS = np.dtype([("high", "<u8"), ("low", "<u8"), ("id", "<u8")])
HASHES = np.dtype([("hash", "<u8"), ("id", "<u8")])
ALIKE = np.dtype([("low", "<u8"), ("high", "<u8"), ("distance", "u1")])
DROPS = np.dtype([("id", "<u8"), ("winner", "<u8"), ("distance", "u1"), ("exact", "?")])

# The median of 64 coefficients leaves 32 bits set, or fewer if coefficients equal it. A single colour has at
# most one, a gradient along one axis at most 8, a picture that is symmetric both ways about 8: their hashes
# say too little to call two of them alike.
FLAT_BITS = 12
_EDGES_AT_ONCE = 1 << 20
_MIX = np.uint64(0x9E3779B97F4A7C15)


def is_flat(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a perceptual hash has too few bits set to compare by it, (n,) bool."""
    return np.bitwise_count(hashes) < FLAT_BITS


def of_length(milliseconds: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """What a clip's hash is combined with by an exclusive or, (n,): equal for lengths that round to the same
    second, and far apart for others.
    """
    seconds = (milliseconds.astype(np.uint64) + np.uint64(500)) // np.uint64(1000)
    return seconds * _MIX


def scatter_digests(path: Path, sha256: NDArray[np.uint8], ids: NDArray[np.uint64], partitions: int) -> None:
    """Write samples, ids ascending, by partition of their digests, (n, 32) uint8."""
    words = np.ascontiguousarray(sha256[:, :16]).view(">u8")
    records = np.empty(len(ids), DIGESTS)
    records["high"], records["low"], records["id"] = words[:, 0], words[:, 1], ids
    write_partitions(path, records, _spread(records["high"], partitions), partitions)


def scatter_hashes(
    path: Path, hashes: NDArray[np.uint64], ids: NDArray[np.uint64], *, radius: int, partitions: int
) -> None:
    """Write samples, ids ascending, once for each band: partition p of band b is b * partitions + p."""
    records = np.empty(len(ids), HASHES)
    records["hash"], records["id"] = hashes, ids
    where = [
        band * partitions + _spread(band_values(hashes, radius, band), partitions)
        for band in range(radius + 1)
    ]
    write_partitions(path, np.tile(records, radius + 1), np.concatenate(where), (radius + 1) * partitions)


def exact_duplicates(records: NDArray[Any], *, first_own: int) -> NDArray[Any]:
    """Samples with the bytes of a lower one.

    Args:
        records: all of one partition, DIGESTS, ids ascending.
        first_own: ids below are never dropped.

    Returns:
        DROPS, the winner being the lowest id of equal bytes.
    """
    order = np.lexsort((records["low"], records["high"]))
    records = records[order]
    new = np.ones(len(records), bool)
    new[1:] = (records["high"][1:] != records["high"][:-1]) | (records["low"][1:] != records["low"][:-1])
    return _dropped(records["id"], new, first_own=first_own, exact=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class NearDuplicates:
    """What one partition of one band shows.

    Attributes:
        same: DROPS of samples with exactly the hash of a lower one; of band 0 only, as each band shows all.
        alike: ALIKE pairs among the lowest samples of each hash, by id; another band may show them too.
        pairs: how they were found.
    """

    same: NDArray[Any]
    alike: NDArray[Any]
    pairs: ClosePairs


def near_duplicates(records: NDArray[Any], *, radius: int, band: int, first_own: int) -> NearDuplicates:
    """Samples that look alike, among those of one partition: HASHES, ids ascending."""
    order = np.argsort(records["hash"], kind="stable")
    hashes, ids = records["hash"][order], records["id"][order]
    new = np.ones(len(hashes), bool)
    new[1:] = hashes[1:] != hashes[:-1]
    same = _dropped(ids, new, first_own=first_own, exact=False) if band == 0 else np.empty(0, DROPS)
    lowest = ids[new]
    pairs = close_pairs(hashes[new], radius=radius, band=band)
    ends = np.stack([lowest[pairs.first], lowest[pairs.second]])
    alike = np.empty(len(pairs.first), ALIKE)
    alike["low"], alike["high"], alike["distance"] = ends.min(axis=0), ends.max(axis=0), pairs.distance
    return NearDuplicates(same=same, alike=alike[alike["high"] >= first_own], pairs=pairs)


def first_come(alike: NDArray[Any]) -> NDArray[Any]:
    """Take ids in ascending order, and drop each that is like a lower one that was kept.

    Args:
        alike: ALIKE pairs in any order, some more than once. An id that is never `high` is kept.

    Returns:
        DROPS by ascending id, the winner being the lowest id that was kept and is alike.
    """
    pairs = alike[np.lexsort((alike["low"], alike["high"]))]
    ids = np.unique(np.concatenate([pairs["low"], pairs["high"]]))
    kept = bytearray(b"\1") * len(ids)
    # One after the other, since each answer depends on those before; there are only as many as look alike.
    for start in range(0, len(pairs), _EDGES_AT_ONCE):
        some = pairs[start : start + _EDGES_AT_ONCE]
        lower, higher = (np.searchsorted(ids, some[name]).tolist() for name in ("low", "high"))
        for low, high in zip(lower, higher, strict=True):
            if kept[low]:
                kept[high] = 0
    stays = np.frombuffer(kept, bool)
    pairs = pairs[stays[np.searchsorted(ids, pairs["low"])]]
    _, first = np.unique(pairs["high"], return_index=True)
    drops = np.zeros(len(first), DROPS)
    drops["id"], drops["winner"] = pairs["high"][first], pairs["low"][first]
    drops["distance"] = pairs["distance"][first]
    return drops


def settle(exact: NDArray[Any], same: NDArray[Any], alike: NDArray[Any]) -> NDArray[Any]:
    """Put the three reasons to drop a sample together, and lead each to a winner that is kept.

    Returns:
        DROPS by ascending id, each once. `distance` is that of the perceptual hashes of sample and winner,
        and `exact` says that their bytes are equal.
    """
    drops = np.concatenate([exact, same, alike])
    _, first = np.unique(drops["id"], return_index=True)  # the first: equal bytes before equal hashes
    drops = drops[first]
    while len(drops):
        at = np.minimum(np.searchsorted(drops["id"], drops["winner"]), len(drops) - 1)
        lost = drops["id"][at] == drops["winner"]
        if not lost.any():
            break
        # All steps to the winner but one are between equal hashes, so that the distances add up.
        drops["distance"][lost] += drops["distance"][at[lost]]
        drops["exact"][lost] &= drops["exact"][at[lost]]
        drops["winner"][lost] = drops["winner"][at[lost]]
    return drops


def _dropped(ids: NDArray[np.uint64], new: NDArray[np.bool_], *, first_own: int, exact: bool) -> NDArray[Any]:
    """Of groups side by side, each beginning where `new` is true with its lowest id: all others of ours."""
    winners = ids[new][np.cumsum(new) - 1]
    gone = ~new & (ids >= first_own)
    drops = np.zeros(int(gone.sum()), DROPS)
    drops["id"], drops["winner"], drops["exact"] = ids[gone], winners[gone], exact
    return drops


def _spread(values: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    """Equal values to one partition; values that have bits in common, to all of them alike."""
    mixed = (values * _MIX) >> np.uint64(BITS // 2)
    return ((mixed * np.uint64(partitions)) >> np.uint64(BITS // 2)).astype(np.int64)
