"""What is in a sealed dataset, counted from its metadata in one pass and bounded memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset import open_dataset, sealed_units
from ingest.store import open_store

PERCENTILES = (5, 25, 50, 75, 95)
# Bytes are counted in cells of this many; percentiles of file sizes are exact to one cell.
BYTES_CELL = 8
URLS_KEPT_PER_REASON = 50
COLUMNS = ["status", "reason", "url", "format", "width", "height", "size", "labels"]


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


@dataclass(kw_only=True)
class Losses:
    """The attempts of one status and reason that were not kept."""

    status: str
    reason: str
    count: int = 0
    first_urls: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A sealed dataset in numbers.

    kept + rejected + failed = planned. Sizes are those of the kept images as they lie in the shards.
    """

    path: str
    root: str
    units: int
    planned: int
    kept: int
    rejected: int
    failed: int
    losses: tuple[Losses, ...]
    image_bytes: int
    shard_bytes: int
    meta_bytes: int
    formats: dict[str, int]
    labels: dict[str, int]
    widths: Histogram
    heights: Histogram
    short_sides: Histogram
    long_sides: Histogram
    sizes: Histogram

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain JSON values; pixels and bytes."""
        return {
            "path": self.path,
            "root": self.root,
            "units": self.units,
            "planned": self.planned,
            "kept": self.kept,
            "rejected": self.rejected,
            "failed": self.failed,
            "reasons": [{"status": x.status, "reason": x.reason, "count": x.count} for x in self.losses],
            "bytes": {"images": self.image_bytes, "shards": self.shard_bytes, "meta": self.meta_bytes},
            "formats": self.formats,
            "labels": self.labels,
            "width": self.widths.summary(),
            "height": self.heights.summary(),
            "short_side": self.short_sides.summary(),
            "long_side": self.long_sides.summary(),
            "image_bytes": self.sizes.summary(),
        }


def count(path: str | Path, *, progress: Callable[[int, int], None]) -> Stats:
    """Count a sealed dataset, one unit's metadata in memory at a time.

    Args:
        path: the dataset's folder or URL.
        progress: is told units counted and units there are.

    Raises:
        UserError: it is not a sealed dataset, or a metadata file cannot be read.
    """
    store = open_store(path)
    root = open_dataset(path).root
    units = sealed_units(path, root)
    metas = units["meta"].to_pylist()
    tally = _Tally()
    for done, meta in enumerate(metas):
        progress(done, len(metas))
        try:
            with store.open(meta) as file:
                tally.add(pq.read_table(file, columns=COLUMNS))
        except (OSError, pa.ArrowException):
            raise UserError(
                f"{store.where(meta)} cannot be read: see what else is damaged with `ingest verify {path}`"
            ) from None
    progress(len(metas), len(metas))
    # A foreign tar may be the shard of several units.
    shards = units.group_by("shard").aggregate([("shard_bytes", "max")])
    losses = sorted(
        tally.losses.values(), key=lambda loss: (loss.status != "rejected", -loss.count, loss.reason)
    )
    return Stats(
        path=str(path),
        root=root,
        units=len(metas),
        planned=tally.planned,
        kept=tally.kept,
        rejected=sum(loss.count for loss in losses if loss.status == "rejected"),
        failed=sum(loss.count for loss in losses if loss.status == "failed"),
        losses=tuple(losses),
        image_bytes=tally.sizes.total,
        shard_bytes=pc.sum(shards["shard_bytes_max"]).as_py(),
        meta_bytes=pc.sum(units["meta_bytes"]).as_py(),
        formats=dict(tally.formats.most_common()),
        labels=dict(sorted(tally.labels.items(), key=lambda item: (-item[1], item[0]))),
        widths=tally.widths,
        heights=tally.heights,
        short_sides=tally.short_sides,
        long_sides=tally.long_sides,
        sizes=tally.sizes,
    )


class _Tally:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.planned = 0
        self.kept = 0
        self.losses: dict[tuple[str, str], Losses] = {}
        self.formats: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.widths = Histogram(cell=1)
        self.heights = Histogram(cell=1)
        self.short_sides = Histogram(cell=1)
        self.long_sides = Histogram(cell=1)
        self.sizes = Histogram(cell=BYTES_CELL)

    def add(self, rows: pa.Table) -> None:
        self.planned += rows.num_rows
        is_kept = pc.equal(rows["status"], "kept")
        kept = rows.filter(is_kept)
        self.kept += kept.num_rows
        self.formats.update(_value_counts(kept["format"]))
        self.labels.update(_value_counts(pc.list_flatten(kept["labels"])))
        widths, heights = (kept[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        self.widths.add(widths)
        self.heights.add(heights)
        self.short_sides.add(np.minimum(widths, heights))
        self.long_sides.add(np.maximum(widths, heights))
        self.sizes.add(kept["size"].to_numpy().astype(np.int64))
        for row in rows.filter(pc.invert(is_kept)).select(["status", "reason", "url"]).to_pylist():
            key = (row["status"], row["reason"] or "no reason given")
            loss = self.losses.setdefault(key, Losses(status=key[0], reason=key[1]))
            loss.count += 1
            if len(loss.first_urls) < URLS_KEPT_PER_REASON:
                loss.first_urls.append(row["url"])


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}
