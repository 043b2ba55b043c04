"""What is in a sealed dataset, counted from its metadata in one pass and bounded memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset.open import open_dataset, sealed_units
from ingest.dataset.parquet import read_parquet
from ingest.dataset.plan_record import read_plan
from ingest.dataset.schema import META_SCHEMA
from ingest.report.clips import COLUMNS as CLIP_COLUMNS
from ingest.report.clips import ClipStats
from ingest.report.frequent import Frequent
from ingest.report.histogram import Histogram
from ingest.store.open import open_store
from ingest.store.store import Store
from ingest.video.container import CONTAINERS
from ingest.web.domain import hosts_of

# Bytes are counted in cells of this many; percentiles of file sizes are exact to one cell.
BYTES_CELL = 8
SAMPLES_PER_REASON = 50
HOSTS_LISTED = 50
COLUMNS = [
    "status",
    "reason",
    "retryable",
    "http_status",
    "url",
    "format",
    "width",
    "height",
    "size",
    "labels",
]


class Loss(NamedTuple):
    """An attempt that was not kept: its URL or path, and what the server answered."""

    url: str
    http_status: int | None


@dataclass(kw_only=True)
class Losses:
    """The attempts of one status and reason that were not kept.

    Attributes:
        status, reason: what they have in common.
        count: how many they are.
        retryable: how many of them `ingest retry` would try again.
        samples: some of them, drawn without regard to anything; always the same of one dataset.
    """

    status: str
    reason: str
    count: int = 0
    retryable: int = 0
    _drawn: list[tuple[float, str, int | None]] = field(default_factory=list)

    @property
    def samples(self) -> list[Loss]:
        return [Loss(url, http_status) for _, url, http_status in self._drawn]

    def draw(self, rows: pa.Table, random: NDArray[np.float64]) -> None:
        """Keep the rows with the lowest of these numbers, of all so far."""
        lowest = np.argsort(random, kind="stable")[:SAMPLES_PER_REASON]
        if len(self._drawn) == SAMPLES_PER_REASON:
            lowest = lowest[random[lowest] < self._drawn[-1][0]]
        chosen = rows.select(["url", "http_status"]).take(lowest)
        urls, http = (column.to_pylist() for column in chosen.columns)
        self._drawn += zip(random[lowest].tolist(), urls, http, strict=True)
        self._drawn = sorted(self._drawn, key=lambda drawn: drawn[0])[:SAMPLES_PER_REASON]


@dataclass(frozen=True, kw_only=True)
class HostCount:
    """A host's attempts, and how many of them were not kept."""

    host: str
    attempts: int
    rejected: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class HostCounts:
    """The hosts that URLs name, before redirects. Paths of folders and tars have none.

    Attributes:
        hosts: how many different ones there are; at least, if `missing_at_most` is not 0.
        missing_at_most: what any count may be too low by, as there were too many hosts to remember; else 0.
        most_attempts, most_failed: the first few.
    """

    hosts: int
    missing_at_most: int
    most_attempts: tuple[HostCount, ...]
    most_failed: tuple[HostCount, ...]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A sealed dataset in numbers.

    kept + rejected + failed = planned; an attempt that was retried counts once, by its newest row. Sizes are
    those of the kept images as they lie in the shards.

    Attributes:
        retryable: failures that `ingest retry` would try again.
        http_statuses: attempts by the server's last answer; those without one are not among them.
        columns: names of the metadata's columns besides those that every dataset has.
        labels: of the kept images, the most frequent first.
        labelled, many_labels: kept images that have labels, and those that have several.
        splits: kept images by their split; those without one are not among them.
        labels_missing_at_most: what any label's count may be too low by, if there were too many; else 0.
        clips: what is counted of clips besides.
    """

    path: str
    root: str
    units: int
    planned: int
    kept: int
    rejected: int
    failed: int
    retryable: int
    losses: tuple[Losses, ...]
    http_statuses: dict[int, int]
    hosts: HostCounts
    columns: tuple[str, ...]
    image_bytes: int
    shard_bytes: int
    meta_bytes: int
    formats: dict[str, int]
    labels: dict[str, int]
    labels_missing_at_most: int
    labelled: int
    many_labels: int
    splits: dict[str, int]
    widths: Histogram
    heights: Histogram
    short_sides: Histogram
    long_sides: Histogram
    sizes: Histogram
    clips: ClipStats

    @property
    def noun(self) -> str:
        """What a sample is called."""
        return "clip" if CONTAINERS.keys() & self.formats.keys() else "image"

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
            "retryable": self.retryable,
            "reasons": [
                {"status": x.status, "reason": x.reason, "count": x.count, "retryable": x.retryable}
                for x in self.losses
            ],
            "http_statuses": {str(status): count for status, count in self.http_statuses.items()},
            "hosts": asdict(self.hosts),
            "columns": list(self.columns),
            "bytes": {"images": self.image_bytes, "shards": self.shard_bytes, "meta": self.meta_bytes},
            "formats": self.formats,
            "labels": self.labels,
            "labels_missing_at_most": self.labels_missing_at_most,
            "labelled": self.labelled,
            "many_labels": self.many_labels,
            "splits": self.splits,
            "width": self.widths.summary(),
            "height": self.heights.summary(),
            "short_side": self.short_sides.summary(),
            "long_side": self.long_sides.summary(),
            "image_bytes": self.sizes.summary(),
            **({"clips": self.clips.as_json()} if self.clips.clips else {}),
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
    retried = _retried(store, set(units["generation"].to_pylist()))
    tally = _Tally()
    for done, (meta, generation) in enumerate(zip(metas, units["generation"].to_pylist(), strict=True)):
        progress(done, len(metas))
        try:
            with store.open(meta) as file:
                schema = pq.read_schema(file)
                rows = read_parquet(file, columns=[*COLUMNS, *({"split", *CLIP_COLUMNS} & set(schema.names))])
        except (OSError, pa.ArrowException):
            raise UserError(
                f"{store.where(meta)} cannot be read: see what else is damaged with `ingest verify {path}`"
            ) from None
        # An attempt that was made again counts by its newest row.
        tally.add(rows.filter(pc.invert(rows["retryable"])) if generation in retried else rows, schema)
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
        retryable=sum(loss.retryable for loss in losses),
        losses=tuple(losses),
        http_statuses=dict(sorted(tally.http_statuses.items())),
        hosts=tally.host_counts(),
        columns=tuple(sorted(tally.columns)),
        image_bytes=tally.sizes.total,
        shard_bytes=pc.sum(shards["shard_bytes_max"]).as_py(),
        meta_bytes=pc.sum(units["meta_bytes"]).as_py(),
        formats=dict(tally.formats.most_common()),
        labels={label: count for label, (count,) in tally.labels.top()},
        labels_missing_at_most=tally.labels.missing,
        labelled=tally.labelled,
        many_labels=tally.many_labels,
        splits={split: count for split, (count,) in tally.splits.top()},
        widths=tally.widths,
        heights=tally.heights,
        short_sides=tally.short_sides,
        long_sides=tally.long_sides,
        sizes=tally.sizes,
        clips=tally.clips,
    )


def _retried(store: Store, sealed: set[int]) -> set[int]:
    """The generations whose attempts that may succeed later were all made again in one of the sealed ones."""
    plans = [read_plan(store, generation) for generation in sorted(sealed)]
    return {each for plan in plans if plan is not None for each in plan.retries or ()}


class _Tally:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.planned = 0
        self.kept = 0
        self.losses: dict[tuple[str, str], Losses] = {}
        self.formats: Counter[str] = Counter()
        self.labels = Frequent()
        self.labelled = self.many_labels = 0
        self.splits = Frequent()
        self.http_statuses: Counter[int] = Counter()
        self.hosts = Frequent()
        self.columns: set[str] = set()
        # Only which samples are shown depends on it.
        self._random = np.random.Generator(np.random.Philox(0))
        self.widths = Histogram(cell=1)
        self.heights = Histogram(cell=1)
        self.short_sides = Histogram(cell=1)
        self.long_sides = Histogram(cell=1)
        self.sizes = Histogram(cell=BYTES_CELL)
        self.clips = ClipStats()

    def add(self, rows: pa.Table, schema: pa.Schema) -> None:
        """Take account of one unit: its rows, and all columns that it has."""
        self.columns.update(set(schema.names) - set(META_SCHEMA.names))
        self.planned += rows.num_rows
        is_kept = pc.equal(rows["status"], "kept")
        kept = rows.filter(is_kept)
        self.kept += kept.num_rows
        self.formats.update(_value_counts(kept["format"]))
        self.labels.add_all(_value_counts(pc.list_flatten(kept["labels"])))
        labels = pc.list_value_length(kept["labels"]).to_numpy()
        self.labelled += int(np.count_nonzero(labels))
        self.many_labels += int(np.count_nonzero(labels > 1))
        if "split" in kept.column_names:
            splits = pc.drop_null(kept["split"].cast(pa.string()))
            self.splits.add_all(_value_counts(splits))
        widths, heights = (kept[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        self.widths.add(widths)
        self.heights.add(heights)
        self.short_sides.add(np.minimum(widths, heights))
        self.long_sides.add(np.maximum(widths, heights))
        self.sizes.add(kept["size"].to_numpy().astype(np.int64))
        self.clips.add(kept)
        self.http_statuses.update(_value_counts(pc.drop_null(rows["http_status"])))
        self._add_losses(rows.filter(pc.invert(is_kept)))
        self._add_hosts(rows)

    def _add_losses(self, rows: pa.Table) -> None:
        random = self._random.random(rows.num_rows)
        rows = rows.set_column(
            rows.column_names.index("reason"), "reason", pc.fill_null(rows["reason"], "no reason given")
        )
        kinds = rows.group_by(["status", "reason"]).aggregate([])
        for kind in sorted(kinds.to_pylist(), key=lambda kind: (kind["status"], kind["reason"])):
            status, reason = kind["status"], kind["reason"]
            ours = pc.and_(pc.equal(rows["status"], status), pc.equal(rows["reason"], reason))
            loss = self.losses.setdefault((status, reason), Losses(status=status, reason=reason))
            lost = rows.filter(ours)
            loss.count += lost.num_rows
            loss.retryable += pc.sum(lost["retryable"]).as_py()
            loss.draw(lost, random[ours.to_numpy()])

    def _add_hosts(self, rows: pa.Table) -> None:
        # A tar that is used in place may have a URL as well, of a bucket.
        rows = rows.filter(pc.match_substring_regex(rows["url"], r"(?i)^\s*https?://"))
        hosts = hosts_of(rows["url"])
        statuses = {name: pc.equal(rows["status"], name).cast(pa.int64()) for name in ("rejected", "failed")}
        table = pa.table({"host": hosts, **statuses}).filter(pc.is_valid(hosts))
        counted = table.group_by("host").aggregate(
            [([], "count_all"), ("rejected", "sum"), ("failed", "sum")]
        )
        for row in counted.sort_by("host").to_pylist():
            self.hosts.add(row["host"], row["count_all"], row["rejected_sum"], row["failed_sum"])

    def host_counts(self) -> HostCounts:
        """The hosts of all rows so far."""

        def listed(by: int) -> tuple[HostCount, ...]:
            return tuple(
                HostCount(host=host, attempts=counts[0], rejected=counts[1], failed=counts[2])
                for host, counts in self.hosts.top(HOSTS_LISTED, by=by)
            )

        return HostCounts(
            hosts=len(self.hosts.counts),
            missing_at_most=self.hosts.missing,
            most_attempts=listed(0),
            most_failed=listed(2),
        )


def _value_counts(column: pa.ChunkedArray) -> dict[Any, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}
