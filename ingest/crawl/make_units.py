"""Units of a plan become shards: read or fetch, check, write in the plan's order, commit."""

import gc
import logging
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from cluster.errors import UserError
from ingest.crawl.lanes import WINDOW, Lane, Lanes
from ingest.crawl.reorder import Memory, Reorder
from ingest.dataset.commit import commit, read_commit, read_commits
from ingest.dataset.shard import InPlaceWriter, ShardWriter
from ingest.image.check import Checked
from ingest.image.check_pool import Checker
from ingest.plan.plan import Plan, items_of
from ingest.plan.segmented import span_of
from ingest.plan.settings import CrawlSettings
from ingest.problem import PROBLEMS, Problem
from ingest.progress.counts import Counts, Progress
from ingest.sources.opening import open_planned
from ingest.sources.source import Images, Item
from ingest.web.domain import hosts_of
from ingest.web.errands import Fetched
from ingest.web.settings import FetchSettings

if TYPE_CHECKING:
    from ingest.web.fetcher import Fetcher

# What may wait in memory for its turn in a shard, in all units together.
_WAITING_BYTES = 32 << 20
_HOSTS_EVERY_S = 2.0
_ROOM_EVERY_S = 1.0
# Of the room that there was for temporary files: a quarter, but not more where the dataset fills the disk.
_ROOM_KEPT = 0.25
_MOST_KEPT = 16 << 30
_MOST_FILES = 65_536
# After which Python looks for cycles among them.
_NEW_OBJECTS = 10_000

logger = logging.getLogger(__name__)


class _Attempt(NamedTuple):
    unit: int
    row: int
    source: int
    item: Item
    host: str | None = None
    http_status: int | None = None


def crawl_units(
    plan: Plan,
    units: Iterable[int],
    *,
    fetch: FetchSettings,
    workers: int,
    progress: Progress,
    counts: Counts,
) -> None:
    """Make and commit those of the plan's units that nobody has committed yet."""
    _allow_many_files()
    settings = plan.settings
    with ExitStack() as stack, _few_collections():
        sources: dict[int, Images] = {}
        for number, (source, place) in enumerate(zip(plan.sources, plan.locations, strict=True)):
            if not source.kind.is_fetched:
                sources[number] = open_planned(source, place)
                stack.callback(sources[number].close)
        checker = stack.enter_context(_checker(settings, workers))
        crawl = _Crawl(
            plan=plan,
            units=list(units),
            sources=sources,
            fetch=fetch,
            counts=counts,
            progress=progress,
        )
        stack.callback(crawl.close)
        for attempt, data, verdict in checker.run(crawl.arrivals()):
            crawl.take(attempt, data, verdict)


def _checker(settings: CrawlSettings, workers: int) -> Checker[_Attempt]:
    bounds: dict[str, Any] = {
        "workers": workers,
        "seconds": settings.seconds,
        "memory_mb": settings.memory_mb,
    }
    if settings.video is None:
        return Checker(settings.treatment, **bounds)
    return Checker(
        settings.treatment,
        **bounds,
        module="ingest.video.check_worker",
        more={"video": asdict(settings.video)},
        detail=lambda attempt: span_of(attempt.item.extra),
    )


def _allow_many_files() -> None:
    """Lift this process's limit of open files: connections and units under way may be more than the usual
    1,024, and a connection that cannot be opened would look like a host that cannot be reached.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def _few_collections() -> Iterator[None]:
    """Within the block, look for cycles seldom, and not among what is here already.

    What was imported, rows and requests under way are many objects, and form none: going through them again
    and again took a fourteenth of a crawler's time.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class _Unit:
    """A unit under way: rows come in any order, and are written in the plan's."""

    def __init__(self, rows: int, writer: ShardWriter | InPlaceWriter, memory: Memory) -> None:
        self.rows = rows
        self.writer = writer
        self.reorder = Reorder[tuple[_Attempt, bool, Checked]](memory)
        self._closing = ExitStack()
        self._closing.callback(self.reorder.close)
        self._closing.enter_context(self.writer)

    def close(self) -> None:
        self._closing.close()


class _Crawl:
    """One run over some units of a plan."""

    def __init__(
        self,
        *,
        plan: Plan,
        units: Sequence[int],
        sources: Mapping[int, Images],
        fetch: FetchSettings,
        counts: Counts,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._settings = plan.settings
        self._sources = sources
        self._fetch = replace(fetch, max_bytes=plan.settings.treatment.limits.max_bytes)
        self._counts = counts
        self._progress = progress
        self._memory = Memory(_WAITING_BYTES)
        self._extra = plan.extra_columns()
        self._rows: dict[int, int] = {}
        self._open: dict[int, _Unit] = {}
        self._lanes: dict[int, Lane[list[_Attempt]]] = {}  # of the units with URLs that are under way
        self._hosts_due = self._room_due = 0.0
        self._room = self._room_before = 0  # bytes: now, and when the crawl began
        self._indexed: dict[str, str] = {}  # sha256 of foreign tars that units name
        self._left = self._not_done(units)

    def close(self) -> None:
        """Give up what is under way."""
        for unit in self._open.values():
            unit.close()

    def arrivals(self) -> Iterator[tuple[_Attempt, bytes | Problem]]:
        """Every attempt of the units left, with what came of getting its bytes, in the order of arrival."""
        if self._sources:
            yield from self._read()
        if len(self._sources) < len(self._plan.sources):
            from ingest.web.fetcher import Fetcher  # takes long, and folders need none

            with Fetcher[list[_Attempt]](self._fetch, window=WINDOW) as fetcher:
                turns = self._turns(fetcher.is_idle)
                for attempts, outcome in fetcher.run(self._requests(turns)):
                    self._look_at_hosts(fetcher, turns)
                    self._lanes[attempts[0].unit].ended(attempts, attempts[0].host)
                    body = outcome.data if isinstance(outcome, Fetched) else outcome
                    self._counts.bytes_read += len(body) if isinstance(body, bytes) else 0
                    for attempt in attempts:
                        yield attempt._replace(http_status=outcome.http_status), body
            self._counts.slowest_hosts = ()

    def _look_at_hosts(self, fetcher: "Fetcher[list[_Attempt]]", turns: Lanes[list[_Attempt]]) -> None:
        now = time.monotonic()
        if now >= self._hosts_due:
            # What is no URL is of no host.
            aside = {host: rows for host, rows in turns.aside().items() if isinstance(host, str)}
            self._counts.slowest_hosts = fetcher.slowest_hosts(aside)
            self._hosts_due = now + _HOSTS_EVERY_S
            # Verdicts come in batches: when only slow hosts are left, long after one another.
            self._progress(self._counts)

    def take(self, attempt: _Attempt, data: bytes | Problem, verdict: Checked) -> None:
        """Write what is due; commit a unit that is whole. If another worker was first, its result stands."""
        unit = self._open.get(attempt.unit)
        if unit is None:
            unit = _Unit(self._rows[attempt.unit], self._writer(attempt), self._memory)
            self._open[attempt.unit] = unit
        original = data if isinstance(data, bytes) else b""
        stored = unit.writer.stored(original, verdict)
        self._count(verdict, stored)
        if verdict.data is not None:  # held once, as `stored`
            verdict = replace(verdict, data=None)
        outcome = attempt, isinstance(data, Problem) and data.retryable, verdict
        lane = self._lanes.get(attempt.unit)
        for (due, retryable, judged), image in unit.reorder.put(attempt.row, outcome, stored):
            if lane is not None:
                lane.ahead -= 1
            self._write(unit.writer, due, retryable, judged, image)
        if unit.reorder.next == unit.rows:
            self._commit(attempt.unit, self._open.pop(attempt.unit))
            self._lanes.pop(attempt.unit, None)
        self._progress(self._counts)

    def _writer(self, attempt: _Attempt) -> ShardWriter | InPlaceWriter:
        source = self._sources.get(attempt.source)
        shard = None if source is None else source.shard()
        if shard is None:
            return ShardWriter(self._plan.store, attempt.unit, extra=self._extra)
        if self._indexed.setdefault(shard.name, shard.sha256) != shard.sha256:
            raise UserError(
                f"{shard.name} has changed since a part of it was indexed: restore it to go on, or use "
                "another --output"
            )
        return InPlaceWriter(self._plan.store, attempt.unit, shard=shard, extra=self._extra)

    def _not_done(self, units: Sequence[int]) -> list[int]:
        left = []
        tars = {source.name for source in self._plan.sources if source.kind.stays_in_place}
        for unit, record in read_commits(self._plan.store, units):
            if record is None:
                left.append(unit)
            else:
                self._counts.add_committed(record)
                if record.shard.name in tars:
                    self._indexed[record.shard.name] = record.shard.sha256
        return left

    def _lanes_left(self) -> Iterator[list[int]]:
        left = set(self._left)
        for lane in self._plan.lanes:
            if units := [unit for unit in lane if unit in left]:
                yield units

    def _attempts(self, units: Iterable[int]) -> Iterator[_Attempt]:
        """Those of units that nobody has made, in the plan's order."""
        for unit in units:
            # Hours may have passed: another worker may have made it.
            if unit not in self._rows and (record := read_commit(self._plan.store, unit)) is not None:
                self._counts.add_committed(record)
                continue
            table = self._plan.table(unit)
            self._rows[unit] = len(table)
            fetched = unit not in self._plan.local_units
            hosts = hosts_of(table["path"].cast(pa.string())).to_pylist() if fetched else repeat(None)
            for row, ((source, item), host) in enumerate(zip(items_of(table), hosts, strict=False)):
                yield _Attempt(unit, row, source, item, host)

    def _turns(self, is_idle: Callable[[], bool]) -> Lanes[list[_Attempt]]:
        limits = self._fetch.limits()
        return Lanes(
            (_by_file(self._attempts(units)) for units in self._lanes_left()),
            host_of=lambda attempts: attempts[0].host,
            per_host=lambda host: limits.connections(host) if isinstance(host, str) else 1,
            is_idle=is_idle,
            is_full=self._lacks_room,
        )

    def _requests(
        self, turns: Lanes[list[_Attempt]]
    ) -> Iterator[tuple[list[_Attempt], str | Problem] | None]:
        """What to ask for, and whose it is: parts of a video that follow each other are asked for once."""
        for turn in turns:
            if turn is None:
                yield None
                continue
            lane, attempts = turn
            self._lanes[attempts[0].unit] = lane
            path, _, problem = _whole(attempts[0].item)
            yield attempts, PROBLEMS[problem] if problem else path.decode()

    def _lacks_room(self) -> bool:
        """Whether most of the room is gone in which images wait for their place: a million, at worst."""
        now = time.monotonic()
        if now >= self._room_due:
            self._room = shutil.disk_usage(tempfile.gettempdir()).free
            self._room_before = self._room_before or self._room
            self._room_due = now + _ROOM_EVERY_S
        return self._room < min(self._room_before * _ROOM_KEPT, _MOST_KEPT)

    def _read(self) -> Iterator[tuple[_Attempt, bytes | Problem]]:
        """What lies in folders and archives, in the plan's order."""
        max_bytes = self._settings.treatment.limits.max_bytes
        opened: int | None = None
        local = self._attempts(unit for unit in self._left if unit in self._plan.local_units)
        for (_, source), group in groupby(local, key=lambda each: (each.unit, each.source)):
            if opened not in (None, source):
                self._sources[opened].close()  # thousands of archives cannot all be open
            opened = source
            attempts = list(group)
            # Parts of one file follow each other: it is read once.
            files = list(_by_file(attempts))
            read = self._sources[source].read([parts[0].item for parts in files], max_bytes=max_bytes)
            for parts, data in zip(files, read, strict=True):
                self._counts.bytes_read += len(data) if isinstance(data, bytes) else 0
                for attempt in parts:
                    yield attempt, data

    def _write(
        self,
        writer: ShardWriter | InPlaceWriter,
        attempt: _Attempt,
        retryable: bool,
        verdict: Checked,
        image: bytes,
    ) -> None:
        item = attempt.item
        url = _text(item.path)
        if attempt.source in self._sources and not _is_address(item.path):
            url = _within(self._sources[attempt.source].name, url)
        columns = {**item.extra, **verdict.columns}
        if (span := span_of(item.extra)) is not None:
            columns["parent"] = f"{url}#{span.fragment}"
        row = {
            "url": url,
            "labels": item.labels,
            "caption": item.caption,
            "retryable": retryable,
            "http_status": attempt.http_status,
            "extra": columns,
        }
        writer.add(verdict, image, offset=item.offset, **row)

    def _commit(self, number: int, unit: _Unit) -> None:
        ours = unit.writer.publish(generation=self._plan.generation, fingerprint=self._plan.fingerprint)
        unit.close()
        if commit(self._plan.store, ours) != ours:
            logger.info("unit %d was committed by another worker first, with another result", number)
        self._counts.units_done += 1

    def _count(self, verdict: Checked, stored: bytes) -> None:
        if verdict.status == "kept":
            self._counts.kept += 1
            self._counts.bytes_stored += len(stored)
        else:
            reasons = self._counts.rejected if verdict.status == "rejected" else self._counts.failed
            reasons[verdict.reason] += 1


def _by_file(attempts: Iterable[_Attempt]) -> Iterator[list[_Attempt]]:
    """Parts of one file that follow each other in a unit."""
    for _, parts in groupby(attempts, key=lambda each: (each.unit, _whole(each.item))):
        yield list(parts)


def _whole(item: Item) -> tuple[bytes, int, str]:
    """What a part is a part of."""
    return item.path, item.offset, item.problem


def _within(source: str, path: str) -> str:
    """Where an image came from, for people."""
    return f"{source}/{path}" if path else source


def _is_address(path: bytes) -> bool:
    # Paths within folders and tars have no empty part.
    return b"://" in path


def _text(name: bytes) -> str:
    """Bytes that are no text show as \\x escapes."""
    return name.decode("utf-8", "backslashreplace")
