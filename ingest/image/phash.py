"""A perceptual hash: 64 bits that hardly change when a picture is scaled or encoded again."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ingest.image.orientation import upright

HASH_SIDE = 32
# Shares of red, green and blue in a grey of 256ths; of grey itself.
_SHARES = {"RGB": (77, 150, 29), "L": (256,)}


def perceptual_hash(picture: Image.Image, *, orientation: int = 1) -> int:
    """The sign pattern of the lowest frequencies.

    The picture is made grey, resized to 32 x 32 (bilinear, aspect ignored), turned upright, and transformed
    by the two-dimensional DCT-II. Bit k, from the highest, says whether coefficient k of the 8 x 8 lowest,
    row by row, lies above the median of these 64.

    Whole numbers throughout, and none of Pillow's arithmetic: Pillow and pillow-simd resize, average and grey
    to levels that differ by one here and there. So the hash is a function of the pixels and nothing else.
    Decoders of other versions may still give other pixels for the same bytes; a dataset's fingerprint names
    those that made it.

    Args:
        picture: RGB or grey.
        orientation: as it lies, EXIF's.
    """
    width, height = picture.size
    # Rows are summed in blocks first, 64 or more of them: that is most of the work, and changes nothing that
    # the lowest frequencies show.
    block = max(1, height // (2 * HASH_SIDE))
    bands = zip(_SHARES[picture.mode], picture.split(), strict=True)
    grey = sum(share * _sums(np.asarray(band), block) for share, band in bands)
    # Sums and products of whole numbers below 2^53 are exact in float64, whatever their order, and a library
    # does them ten times faster than those of integers.
    down, across = _bilinear(height, block).astype(np.float64), _bilinear(width, 1).astype(np.float64)
    rows_of_block = np.minimum(block, height - np.arange(0, height, block))
    shares = (256 * np.outer(down @ rows_of_block, across.sum(axis=1))).astype(np.int64)
    small = ((down @ grey @ across.T).astype(np.int64) + shares // 2) // shares
    if orientation != 1:
        small = np.asarray(upright(Image.fromarray(small.astype(np.uint8)), orientation), np.int64)
    # Bilinear finds as many scaled and re-encoded copies as Lanczos does; plain averages find a tenth fewer.
    coefficients = (_COSINES @ small @ _COSINES.T).ravel()
    ordered = np.sort(coefficients)
    above = 2 * coefficients > ordered[31] + ordered[32]
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def _sums(pixels: NDArray[np.uint8], block: int) -> NDArray[np.uint32]:
    """Sums of so many rows each; the last may be of fewer."""
    if block == 1:
        return pixels.astype(np.uint32)
    whole = len(pixels) // block * block
    sums = pixels[:whole].reshape(-1, block, pixels.shape[1]).sum(axis=1, dtype=np.uint32)
    rest = pixels[whole:].sum(axis=0, dtype=np.uint32, keepdims=True)
    return sums if whole == len(pixels) else np.concatenate([sums, rest])


@lru_cache(maxsize=128)
def _bilinear(length: int, block: int) -> NDArray[np.uint8]:
    """How much each block of pixels counts for each of 32 places, from 0 to 255: (32, blocks).

    It falls linearly from the place's centre, over as many pixels as the place has, one block at least.

    Args:
        length: of the side, in pixels.
        block: pixels of a block; the last one may have fewer.
    """
    starts = np.arange(0, length, block, dtype=np.int32)
    ends = np.minimum(starts + block, length)
    places = np.arange(HASH_SIDE, dtype=np.int32)[:, None]
    # Distances of centres, and how far a place reaches, all in 64ths of a pixel.
    distances = np.abs((starts + ends) * HASH_SIDE - (2 * places + 1) * length)
    reach = max(2 * HASH_SIDE * block, 2 * length)
    weights: NDArray[np.int32] = 255 * np.maximum(0, reach - distances) // reach
    return weights.astype(np.uint8)


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
