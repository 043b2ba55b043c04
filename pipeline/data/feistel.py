"""Keyed bijections on {0 … n−1}, element by element: a shuffle that needs no list.

A Feistel network over Z_a × Z_b with a·b just above n (Black and Rogaway, 2002, "Ciphers with arbitrary
finite domains"): the few values that land in n … a·b − 1 walk on along their cycle until they are inside.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele et al., 2014): every input bit moves every output bit."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: ArrayLike) -> NDArray[np.uint64]:
    """One 64-bit key from several integers, each modulo 2^64; arrays broadcast, to at least one dimension."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        word = (
            np.uint64(part & 0xFFFF_FFFF_FFFF_FFFF) if isinstance(part, int) else np.asarray(part, np.uint64)
        )
        key = mix64((key ^ word) + _GOLDEN)
    return key


def permute(index: ArrayLike, size: ArrayLike, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a keyed permutation of {0 … size−1} sends `index`.

    Args:
        index, size, key: broadcast together; 0 ≤ index < size.

    Returns:
        int64, at least one dimension, in [0, size).
    """
    together = np.broadcast_arrays(
        np.atleast_1d(np.asarray(index, np.uint64)), np.asarray(size, np.uint64), key
    )
    x, limit, keys = (each.ravel() for each in together)
    columns = np.maximum(np.sqrt(limit.astype(np.float64)).astype(np.uint64), np.uint64(1))
    rows = (limit + columns - np.uint64(1)) // columns
    out = _rounds(x, rows, columns, keys)
    outside = np.flatnonzero(out >= limit)
    while outside.size:
        out[outside] = _rounds(out[outside], rows[outside], columns[outside], keys[outside])
        outside = outside[out[outside] >= limit[outside]]
    return out.astype(np.int64).reshape(together[0].shape)


def _rounds(
    x: NDArray[np.uint64], rows: NDArray[np.uint64], columns: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One pass over Z_rows × Z_columns."""
    row, column = x // columns, x % columns
    for number in range(_ROUNDS):
        round_key = mix64(keys + _ROUND_KEYS[number])
        # Two bits are given up so that the sum with the other half cannot wrap.
        if number % 2 == 0:
            row = (row + (mix64(column ^ round_key) >> np.uint64(2))) % rows
        else:
            column = (column + (mix64(row ^ round_key) >> np.uint64(2))) % columns
    return row * columns + column
