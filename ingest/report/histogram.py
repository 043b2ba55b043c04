"""How values are spread, without keeping them."""

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (5, 25, 50, 75, 95)


class Histogram:
    """Counts of non-negative integers in cells of equal width, growing as needed."""

    def __init__(self, *, cell: int) -> None:
        self.cell = cell
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self.smallest = 0
        self.largest = 0
        self.total = 0

    def add(self, values: NDArray[np.int64]) -> None:
        if not len(values):
            return
        low, high = int(values.min()), int(values.max())
        self.smallest = min(self.smallest, low) if len(self.counts) else low
        self.largest = max(self.largest, high)
        self.total += int(values.sum())
        cells, counts = np.unique(values // self.cell, return_counts=True)
        if cells[-1] >= len(self.counts):
            self.counts = np.pad(self.counts, (0, int(cells[-1]) + 1 - len(self.counts)))
        self.counts[cells] += counts

    def percentile(self, percent: float) -> int:
        """The smallest value that at least `percent` of all do not exceed, to the width of a cell."""
        running = np.cumsum(self.counts)
        if not len(running) or not running[-1]:
            return 0
        cell = int(np.searchsorted(running, running[-1] * percent / 100))
        return min(max(cell * self.cell, self.smallest), self.largest)

    def summary(self) -> dict[str, int]:
        """Smallest, percentiles and largest, ready for JSON."""
        return {
            "min": self.smallest,
            **{f"p{percent}": self.percentile(percent) for percent in PERCENTILES},
            "max": self.largest,
        }
