"""What is in a sealed dataset, added up from the counts of its units in bounded memory."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.map.processes import one_by_one
from cluster.map.tasks import MapTasks
from ingest.dataset.open import latest_root, read_each, sealed_units
from ingest.dataset.plan_record import read_plan
from ingest.dataset.unit_counts import MEASURES, UnitCounts, count_rows, has_counted, read_counts
from ingest.report.clips import ClipStats
from ingest.report.frequent import Frequent
from ingest.report.histogram import Histogram
from ingest.store.open import open_store
from ingest.store.store import Store
from ingest.video.container import CONTAINERS

ROWS_PER_TASK = 200_000
UNITS_PER_TASK = 256
_LINES_AT_ONCE = 1 << 20
HOSTS_LISTED = 50


@dataclass(kw_only=True)
class Losses:
    """The attempts of one status and reason that were not kept.

    Attributes:
        status, reason: what they have in common.
        count: how many they are.
        retryable: how many of them `ingest retry` would try again.
        units, counts: places of units in the sealed list, ascending, and how many of them each has.
    """

    status: str
    reason: str
    count: int = 0
    retryable: int = 0
    units: "array[int]" = field(default_factory=lambda: array("q"))
    counts: "array[int]" = field(default_factory=lambda: array("q"))


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


def count(
    path: str | Path, *, progress: Callable[[int, int], None], map_tasks: MapTasks = one_by_one
) -> Stats:
    """Count a sealed dataset: what was counted when units were made is added up, other units' rows are read.

    Args:
        path: the dataset's folder or URL.
        progress: is told units counted and units there are.
        map_tasks: counts many rows.

    Raises:
        UserError: it is not a sealed dataset, or a metadata file cannot be read.
    """
    store = open_store(path)
    root = latest_root(store)
    sealed = sealed_units(path, root)
    units = sealed.to_pylist()
    retried = retried_generations(store, sealed)
    tally = _Tally()
    missing: list[int] = []
    done = 0
    progress(0, len(units))

    def take(place: int, counts: UnitCounts) -> None:
        nonlocal done
        # An attempt that was made again counts by its newest row.
        tally.add(place, counts, settled=units[place]["generation"] in retried)
        progress(done := done + 1, len(units))

    for place, counts in enumerate(read_counts(store, units)):
        if counts is None:
            missing.append(place)
        else:
            take(place, counts)
    tasks = [
        CountTask(path=str(path), metas=[units[place]["meta"] for place in some])
        for some in _portions(missing, units)
    ]
    # To start a process takes as long as to count a hundred thousand rows.
    answers = (map_tasks if len(tasks) > 1 else one_by_one)(count_units, tasks)
    places = iter(missing)
    for answer in answers:
        for counts in answer:
            take(next(places), counts)
    tally.end()
    # A foreign tar may be the shard of several units.
    shards = sealed.group_by("shard", use_threads=False).aggregate([("shard_bytes", "max")])
    losses = sorted(
        tally.losses.values(), key=lambda loss: (loss.status != "rejected", -loss.count, loss.reason)
    )
    width, height, short_side, long_side, size, milliseconds, gap = (
        tally.measures[name] for name in MEASURES
    )
    return Stats(
        path=str(path),
        root=root,
        units=len(units),
        planned=tally.planned,
        kept=tally.kept,
        rejected=sum(loss.count for loss in losses if loss.status == "rejected"),
        failed=sum(loss.count for loss in losses if loss.status == "failed"),
        retryable=sum(loss.retryable for loss in losses),
        losses=tuple(losses),
        http_statuses=dict(sorted(tally.values["http"].items())),
        hosts=tally.host_counts(),
        columns=tuple(sorted(tally.names["column"])),
        image_bytes=size.total,
        shard_bytes=pc.sum(shards["shard_bytes_max"]).as_py(),
        meta_bytes=pc.sum(sealed["meta_bytes"]).as_py(),
        formats=_most_first(tally.names["format"]),
        labels={label: count for label, (count,) in tally.labels.top()},
        labels_missing_at_most=tally.labels.missing,
        labelled=sum(times for labels, times in tally.values["labels"].items() if labels),
        many_labels=sum(times for labels, times in tally.values["labels"].items() if labels > 1),
        splits={split: count for split, (count,) in tally.splits.top()},
        widths=width,
        heights=height,
        short_sides=short_side,
        long_sides=long_side,
        sizes=size,
        clips=ClipStats(
            clips=tally.values["clip"].total(),
            video_codecs=_most_first(tally.names["video codec"]),
            audio_codecs=_most_first(tally.names["audio codec"]),
            quiet=tally.values["quiet"].total(),
            still=tally.values["still"].total(),
            milliseconds=milliseconds,
            gaps=gap,
        ),
    )


def retried_generations(store: Store, sealed: pa.Table) -> set[int]:
    """Those whose attempts that may succeed later were all made again in another of the sealed units'."""
    plans = [read_plan(store, generation) for generation in sorted(set(sealed["generation"].to_pylist()))]
    return {each for plan in plans if plan is not None for each in plan.retries or ()}


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """Units of a dataset to count, by their metadata files."""

    path: str
    metas: list[str]


def count_units(task: CountTask) -> list[UnitCounts]:
    """The counts of each of these units.

    Raises:
        UserError: a metadata file cannot be read.
    """

    def counted(_: int, parquet: pq.ParquetFile) -> UnitCounts:
        columns = parquet.schema_arrow.names
        return count_rows(parquet.read(columns=has_counted(columns), use_threads=False), columns)

    return list(read_each(open_store(task.path), task.metas, counted))


def _portions(places: Sequence[int], units: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """These units in tasks of so many rows, or units."""
    some: list[int] = []
    rows = 0
    for place in places:
        some.append(place)
        rows += units[place]["rows"]
        if rows >= ROWS_PER_TASK or len(some) == UNITS_PER_TASK:
            yield some
            some, rows = [], 0
    if some:
        yield some


class _Tally:
    """What has been added up so far.

    Attributes:
        planned, kept: attempts.
        losses: by status and reason.
        names, values: counts by what they are of, see `ingest.dataset.unit_counts`.
        measures: those of kept images and clips.
    """

    def __init__(self) -> None:
        self.planned = 0
        self.kept = 0
        self.losses: dict[tuple[str, str], Losses] = {}
        self.names: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.values: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.labels, self.splits, self.hosts = Frequent(), Frequent(), Frequent()
        self.measures = {name: Histogram() for name in MEASURES}
        self._waiting: list[pa.Table] = []
        self._lines = 0

    def add(self, place: int, counts: UnitCounts, *, settled: bool) -> None:
        """Take account of one unit.

        Args:
            place: in the sealed list.
            counts: see `ingest.dataset.unit_counts`.
            settled: leave out what may succeed later.
        """
        found: Counter[tuple[str, str]] = Counter()
        for each in counts.attempts:
            if each.retryable and settled:
                continue
            self.planned += each.rows
            if each.status == "kept":
                self.kept += each.rows
                continue
            kind = each.status, each.reason
            loss = self.losses.setdefault(kind, Losses(status=each.status, reason=each.reason))
            loss.count += each.rows
            loss.retryable += each.rows if each.retryable else 0
            found[kind] += each.rows
        for kind, times in found.items():
            self.losses[kind].units.append(place)
            self.losses[kind].counts.append(times)
        lines = counts.lines.filter(pc.invert(counts.lines["retryable"])) if settled else counts.lines
        self._waiting.append(lines)
        self._lines += len(lines)
        if self._lines > _LINES_AT_ONCE:
            self.end()

    def end(self) -> None:
        """Add up what is waiting: many units take little longer than one."""
        counts = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._lines = [], 0
        whats = counts["what"].chunk(0).dictionary_encode()
        groups = {
            what: counts.filter(pc.equal(whats.indices, code))
            for code, what in enumerate(whats.dictionary.to_pylist())
        }
        for what in ("column", "format", "video codec", "audio codec"):
            self.names[what].update(dict(_by("name", groups.get(what))))
        for what in ("http", "labels", "clip", "quiet", "still"):
            self.values[what].update(dict(_by("value", groups.get(what))))
        for what, frequent in (("label", self.labels), ("split", self.splits)):
            for name, times in _by("name", groups.get(what)):
                frequent.add(name, times)
        for place, status in enumerate(("kept", "rejected", "failed")):
            for host, times in _by("name", groups.get(f"host {status}")):
                self.hosts.add(host, times, *(times if place == which else 0 for which in (1, 2)))
        for what, histogram in self.measures.items():
            if what in groups:
                histogram.add(
                    *(groups[what][column].to_numpy() for column in ("value", "count")),
                    smallest=min(
                        (value for value, _ in _by("value", groups.get(f"least {what}"))), default=0
                    ),
                    largest=max((value for value, _ in _by("value", groups.get(f"most {what}"))), default=0),
                    total=sum(times for _, times in _by("value", groups.get(f"total {what}"))),
                )

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


def _by(column: str, counts: pa.Table | None) -> Iterator[tuple[Any, int]]:
    """Each name or value, in their order, and how many there are."""
    if counts is not None:
        sums = counts.group_by(column, use_threads=False).aggregate([("count", "sum")]).sort_by(column)
        yield from zip(sums[column].to_pylist(), sums["count_sum"].to_pylist(), strict=True)


def _most_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
