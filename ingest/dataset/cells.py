"""Cells that values are counted in: one for each value below 8,192, and 4,096 for each doubling from there.

So counts of small values are exact, those of others right to 1 in 4,096, and the number of cells is bounded
whatever the values are.
"""

import numpy as np
from numpy.typing import NDArray

_BITS = 13
_HALF = 1 << _BITS - 1
# As many bits as float64 has, whose exponents are asked for.
_LARGEST = (1 << 53) - 1


def cells_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The cell of each value, from 0 on."""
    values = np.clip(values, 0, _LARGEST)
    _, exponents = np.frexp(values.astype(np.float64))
    shifts = np.maximum(exponents.astype(np.int64) - _BITS, 0)
    cells: NDArray[np.int64] = shifts * _HALF + (values >> shifts)
    return cells


def starts_of(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest value of each cell."""
    shifts = np.maximum(cells // _HALF - 1, 0)
    starts: NDArray[np.int64] = cells - shifts * _HALF << shifts
    return starts


def rounded(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each value down to the smallest one of its cell."""
    return starts_of(cells_of(values))
