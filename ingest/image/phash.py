"""A perceptual hash: 64 bits that hardly change when a picture is scaled or encoded again."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ingest.image.orientation import upright

HASH_SIDE = 32
# Of the weights with which pixels are summed: their sums stay within what float64 holds exactly.
_WEIGHT_BITS = 14


def perceptual_hash(picture: Image.Image, *, orientation: int = 1) -> int:
    """The sign pattern of the lowest frequencies.

    The picture is averaged over whole blocks of pixels until less than 128 are left of a side, made grey,
    resized to 32 x 32 (bilinear, aspect ignored), turned upright, and transformed by the two-dimensional
    DCT-II. Bit k, from the highest, says whether coefficient k of the 8 x 8 lowest, row by row, lies above
    the median of these 64.

    Whole numbers throughout: the hash is a function of the picture's pixels and nothing else. Pillow's and
    pillow-simd's resizing, which differ by a level here and there, have no part in it. Their decoders may
    still give other pixels for the same bytes: how a dataset's were made, its fingerprint holds.

    Args:
        picture: RGB or grey.
        orientation: as it lies, EXIF's.
    """
    width, height = picture.size
    across, down = (max(1, side // (2 * HASH_SIDE)) for side in picture.size)
    grey = np.asarray(picture.reduce((across, down)).convert("L"), np.float64)
    # Bilinear finds as many scaled and re-encoded copies as Lanczos does; plain averages find a tenth fewer.
    # Of whole numbers below 2^53, sums and products in float64 are exact in any order, and ten times faster.
    sums = _bilinear(height, down) @ grey @ _bilinear(width, across).T
    small = (sums.astype(np.int64) + (1 << 2 * _WEIGHT_BITS - 1)) >> 2 * _WEIGHT_BITS
    turned = np.asarray(upright(Image.fromarray(small.astype(np.uint8)), orientation), np.int64)
    coefficients = (_COSINES @ turned @ _COSINES.T).ravel()
    ordered = np.sort(coefficients)
    above = 2 * coefficients > ordered[31] + ordered[32]
    return int.from_bytes(np.packbits(above).tobytes(), "big")


@lru_cache(maxsize=256)
def _bilinear(length: int, block: int) -> NDArray[np.float64]:
    """What each block of pixels counts for each of 32 places, in units of 2^-14: (32, blocks).

    A place's weights fall linearly from its centre, over as many pixels as it has, one block at least.

    Args:
        length: of the side, in pixels.
        block: pixels of a block; the last one may have fewer.
    """
    blocks = -(-length // block)
    # Distances of centres and reach, all in 64ths of a pixel.
    centres = (2 * np.arange(HASH_SIDE) + 1)[:, None] * length
    distances = np.abs((2 * np.arange(blocks) + 1) * HASH_SIDE * block - centres)
    reach = max(2 * HASH_SIDE * block, 2 * length)
    weights = np.maximum(0, reach - distances)
    totals = weights.sum(axis=1, keepdims=True)
    shares: NDArray[np.int64] = ((weights << _WEIGHT_BITS) + totals // 2) // totals
    return shares.astype(np.float64)


def _cosines() -> NDArray[np.int64]:
    """The 8 lowest rows of the 32-point DCT-II, in 14-bit fixed point, (8, 32)."""
    return np.array(
        [
            [round(16384 * math.cos(math.pi * k * (2 * n + 1) / (2 * HASH_SIDE))) for n in range(HASH_SIDE)]
            for k in range(8)
        ],
        np.int64,
    )


_COSINES = _cosines()
