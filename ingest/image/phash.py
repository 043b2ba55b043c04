"""A perceptual hash: 64 bits that hardly change when a picture is scaled or encoded again."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ingest.image.orientation import upright

HASH_SIDE = 32
_MOST_COLUMNS = 4096
_PIXELS_OF_STRIP = 1 << 20
# What red, green and blue count in a grey of 256ths.
_SHARES = (77, 150, 29)


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
    # the lowest frequencies show. Columns only where there are thousands.
    down, across = max(1, height // (2 * HASH_SIDE)), max(1, width // _MOST_COLUMNS)
    # Sums and products of whole numbers below 2^53 are exact in float64, whatever their order, and a library
    # does them ten times faster than those of integers.
    sums = np.concatenate([_sums(part, down) for part in _strips(picture, down)])
    grey = _sums(_grey(sums, picture.mode).T, across).T
    (rows, of_rows), (columns, of_columns) = _bilinear(height, down), _bilinear(width, across)
    whole = 256 * np.outer(of_rows, of_columns)
    # Rounded, halves up.
    small = np.floor((2 * (rows.T @ (grey @ columns)) + whole) / (2 * whole))
    if orientation != 1:
        small = np.asarray(upright(Image.fromarray(small.astype(np.uint8)), orientation), np.float64)
    # Bilinear finds as many scaled and re-encoded copies as Lanczos does; plain averages find a tenth fewer.
    coefficients = (_COSINES @ small @ _COSINES.T).ravel()
    ordered = np.sort(coefficients)
    above = 2 * coefficients > ordered[31] + ordered[32]
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def _strips(picture: Image.Image, block: int) -> Iterator[NDArray[np.uint8]]:
    """The picture from top to bottom in some strips of whole blocks of rows: (rows, numbers of a row)."""
    rows = max(1, _PIXELS_OF_STRIP // (picture.width * block)) * block
    for top in range(0, picture.height, rows):
        # A copy of the whole of a large picture would be too much beside it.
        end = min(top + rows, picture.height)
        part = picture if rows >= picture.height else picture.crop((0, top, picture.width, end))
        yield np.asarray(part).reshape(part.height, -1)


def _grey(sums: NDArray[Any], mode: str) -> NDArray[Any]:
    """Grey in 256ths, of one number per pixel or of three."""
    if mode == "L":
        return sums * np.float64(256)
    # float32 is exact for what 16 bits hold, and takes half the time.
    exact = np.float64 if sums.dtype == np.float64 else np.float32
    grey: NDArray[Any] = sums.astype(exact).reshape(-1, 3) @ np.array(_SHARES, exact)
    return grey.reshape(len(sums), -1).astype(np.float64)


def _sums(numbers: NDArray[Any], block: int) -> NDArray[Any]:
    """Sums of so many rows each, (blocks, numbers of a row); the last may be of fewer."""
    if block == 1:
        return numbers
    kind = np.uint16 if numbers.dtype == np.uint8 and block <= 257 else np.float64
    whole = len(numbers) // block * block
    sums: NDArray[Any] = numbers[:whole].reshape(-1, block, numbers.shape[1]).sum(axis=1, dtype=kind)
    rest = numbers[whole:].sum(axis=0, dtype=kind, keepdims=True)
    return sums if whole == len(numbers) else np.concatenate([sums, rest])


@lru_cache(maxsize=32)
def _bilinear(length: int, block: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much a pixel of each block counts for each of 32 places, 0 to 255; and the sums over all pixels.

    It falls linearly from the place's centre, over as many pixels as the place has, one block at least.

    Args:
        length: of the side, in pixels.
        block: pixels of a block; the last one may have fewer.

    Returns:
        Whole numbers: (blocks, 32) and (32,).
    """
    starts = np.arange(0, length, block)
    ends = np.minimum(starts + block, length)
    # Distances of centres, and how far a place reaches, all in 64ths of a pixel.
    distances = np.abs((starts + ends) * HASH_SIDE - (2 * np.arange(HASH_SIDE) + 1)[:, None] * length)
    reach = max(2 * HASH_SIDE * block, 2 * length)
    weights = 255 * np.maximum(0, reach - distances) // reach
    return np.ascontiguousarray(weights.T, np.float64), (weights @ (ends - starts)).astype(np.float64)


def _cosines() -> NDArray[np.float64]:
    """The 8 lowest rows of the 32-point DCT-II, in 14-bit fixed point, (8, 32)."""
    return np.array(
        [
            [round(16384 * math.cos(math.pi * k * (2 * n + 1) / (2 * HASH_SIDE))) for n in range(HASH_SIDE)]
            for k in range(8)
        ],
        np.float64,
    )


_COSINES = _cosines()
