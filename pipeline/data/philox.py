"""Uniform numbers that are a pure function of what they are for: Philox-4x32-10, many counters at once.

Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3" (https://doi.org/10.1145/2063384.2063405).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.data.feistel import derive_key

_LOW = np.uint64(0xFFFF_FFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_COPY_SHIFT = np.uint64(10)  # below are the rows that a substitute is ahead


def philox4x32(
    counter: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]],
    key: tuple[int, int],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four arrays that broadcast together, each element a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four arrays of 32-bit words, held in uint64.
    """
    c0, c1, c2, c3 = counter
    for number in range(_ROUNDS):
        k0 = np.uint64((key[0] + number * _WEYL[0]) & 0xFFFF_FFFF)
        k1 = np.uint64((key[1] + number * _WEYL[1]) & 0xFFFF_FFFF)
        left, right = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (right >> _SHIFT) ^ c1 ^ k0, right & _LOW, (left >> _SHIFT) ^ c3 ^ k1, left & _LOW
    return c0, c1, c2, c3


def uniforms(
    *, seed: int, epoch: int, keys: ArrayLike, ahead: ArrayLike, views: int, draws: int, copies: ArrayLike = 0
) -> NDArray[np.float64]:
    """The draws of some samples' views, each in the open interval (0, 1), in steps of 2^-32.

    Args:
        seed, epoch: of the run.
        keys: (samples,) the samples' 64-bit keys.
        ahead: (samples,) 0, or for a substitute how many rows after the bad one it stands: its views then
            differ from those it has in its own place. Fewer than 1,024.
        views: of each sample.
        draws: numbers for each view.
        copies: (samples,) which of a sample's copies each is, of those that an epoch has of it.

    Returns:
        (samples, views, draws) float64.
    """
    blocks = -(-draws // 4)
    sample_keys = np.asarray(keys, np.uint64).reshape(-1, 1)
    numbers = np.arange(views * blocks, dtype=np.uint64)
    run_key = int(derive_key(seed, epoch)[0])
    words = philox4x32(
        (
            sample_keys & _LOW,
            sample_keys >> _SHIFT,
            ((numbers // np.uint64(blocks)) << np.uint64(16)) | (numbers % np.uint64(blocks)),
            (np.asarray(copies, np.uint64) << _COPY_SHIFT | np.asarray(ahead, np.uint64)).reshape(-1, 1),
        ),
        (run_key & 0xFFFF_FFFF, run_key >> 32),
    )
    flat = np.stack(words, axis=-1).reshape(-1, views, blocks * 4)[:, :, :draws]
    return (flat.astype(np.float64) + 0.5) * 2.0**-32
