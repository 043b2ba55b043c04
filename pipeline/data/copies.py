"""Samples that an epoch has several times: copies of a sample follow each other on the epoch's axis, of which
the order is made, and each is cut and coloured by draws of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_KEPT = 1_024  # units: 128 MB, of units of 16,384 samples


class Copies:
    """How often each sample is there.

    Args:
        counts: of each unit, over its samples: (units,) int64.
        of_unit: by the unit's index, of each of its samples, 1 or more: (samples,).
    """

    def __init__(self, counts: NDArray[np.int64], of_unit: Callable[[int], NDArray[np.uint32]]) -> None:
        self.counts = counts
        self._of_unit = of_unit
        self._ends: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def samples(
        self, units: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each row of a unit on the axis, the sample's row in the unit, and which of its copies it is,
        counted from 0: (n,) int64 each.

        Raises:
            UserError: how often they are there cannot be read.
        """
        samples, numbers = np.empty_like(rows), np.empty_like(rows)
        for unit in np.unique(units).tolist():
            there = units == unit
            ends = self._ends_of(unit)
            samples[there] = found = np.searchsorted(ends, rows[there], side="right")
            numbers[there] = rows[there] - np.where(found > 0, ends[found - 1], 0)
        return samples, numbers

    def _ends_of(self, unit: int) -> NDArray[np.int64]:
        if unit not in self._ends:
            self._ends[unit] = np.cumsum(self._of_unit(unit), dtype=np.int64)
            while len(self._ends) > _KEPT:
                self._ends.popitem(last=False)
        self._ends.move_to_end(unit)
        return self._ends[unit]
