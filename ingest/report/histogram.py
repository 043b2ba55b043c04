"""How values are spread, without keeping them."""

import numpy as np
from numpy.typing import NDArray

from ingest.dataset.cells import cells_of, starts_of

PERCENTILES = (5, 25, 50, 75, 95)


class Histogram:
    """Counts of non-negative integers in cells, see `ingest.dataset.cells`, growing as needed."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(1, np.int64)
        self.smallest = 0
        self.largest = 0
        self.total = 0

    def add(
        self, values: NDArray[np.int64], times: NDArray[np.int64], *, smallest: int, largest: int, total: int
    ) -> None:
        """Take account of values.

        Args:
            values: what they are, or the smallest of their cells.
            times: how often there is each.
            smallest, largest, total: of the values themselves.
        """
        self.smallest = min(self.smallest, smallest) if self.counts.any() else smallest
        self.largest = max(self.largest, largest, smallest)  # whoever says so
        self.total += total
        cells = cells_of(values)
        size = 1 + int(max(cells.max(initial=0), cells_of(np.array(self.largest))))
        self.counts = np.pad(self.counts, (0, max(0, size - len(self.counts))))
        np.add.at(self.counts, cells, times)

    def percentile(self, percent: float) -> int:
        """The smallest value that at least `percent` of all do not exceed, to the width of a cell."""
        running = np.cumsum(self.counts)
        if not running[-1]:
            return 0
        cell = np.searchsorted(running, running[-1] * percent / 100)
        return min(max(int(starts_of(cell)), self.smallest), self.largest)

    def summary(self) -> dict[str, int]:
        """Smallest, percentiles and largest, ready for JSON."""
        return {
            "min": self.smallest,
            **{f"p{percent}": self.percentile(percent) for percent in PERCENTILES},
            "max": self.largest,
        }
