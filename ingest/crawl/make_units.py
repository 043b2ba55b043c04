"""Units of a plan become shards: read or fetch, check, write in the plan's order, commit."""

import gc
import logging
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.crawl.kept import Kept
from ingest.crawl.lanes import WINDOW, Lane, Lanes
from ingest.crawl.results import Memory, Result, Results
from ingest.dataset.commit import commit, read_commit, read_commits
from ingest.dataset.records import CommitRecord
from ingest.dataset.schema import SPAN_COLUMNS, VIDEO_SCHEMA
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
from ingest.video.segments import Span
from ingest.web.domain import hosts_of
from ingest.web.errands import Fetched
from ingest.web.problems import GIVEN_UP
from ingest.web.settings import FetchSettings

if TYPE_CHECKING:
    from ingest.web.fetcher import Fetcher

# What may wait in memory for its turn in a shard, in all units together.
_WAITING_BYTES = 32 << 20
_HOSTS_EVERY_S = 2.0
_ROOM_EVERY_S = 1.0
# Most units are whole before.
_KEEP_AFTER_S = 30.0
_KEEP_EVERY_S = 1.0
_SAVE_EVERY_S = 60.0  # to a bucket
# Of the room that there was for temporary files: a quarter, but not more where the dataset fills the disk.
_ROOM_KEPT = 0.25
_MOST_KEPT = 16 << 30
_MOST_FILES = 65_536
# After which Python looks for cycles among them.
_NEW_OBJECTS = 10_000

logger = logging.getLogger(__name__)


class _Attempt(NamedTuple):
    """A row whose bytes, or problem, are there."""

    unit: "_Unit"
    row: int
    http_status: int | None = None


@dataclass(slots=True, eq=False)
class _Request:
    """Rows of a unit that follow each other, and are asked for once.

    Attributes:
        unit, first, rows: which ones.
        host: that they are asked from; None if nobody is asked.
        kept: an earlier process has asked.
    """

    unit: "_Unit"
    first: int
    rows: int
    host: str | None
    kept: bool

    def __len__(self) -> int:
        return self.rows


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
        detail=lambda attempt: attempt.unit.span(attempt.row),
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
    """A unit under way: results come in any order, and are written in the plan's.

    Attributes:
        number: of the unit.
        table: its rows, as they were planned.
        results: of its rows, so far.
        begun: when, seconds.
        items: in order, of the rows that are not written: the source's number, and what it is.
        lane: of units with URLs.
        writer: once there is a result.
    """

    def __init__(self, number: int, table: pa.Table, results: Results) -> None:
        self.number = number
        self.table = table
        self.results = results
        self.items = items_of(table)
        self.begun = time.monotonic()
        self.lane: Lane[_Request] | None = None
        self.writer: ShardWriter | InPlaceWriter | None = None
        self._closing = ExitStack()
        self._closing.callback(results.close)

    def begin(self, writer: ShardWriter | InPlaceWriter) -> None:
        self._closing.enter_context(writer)
        self.writer = writer

    def close(self) -> None:
        self._closing.close()

    def span(self, row: int) -> Span | None:
        """The part of a video that a row means."""
        names = [name for name in SPAN_COLUMNS.names if name in self.table.column_names]
        return span_of({name: self.table[name][row].as_py() for name in names})

    def asked(self, row: int) -> str | Problem:
        """The URL of a row, or why there is none."""
        problem: str = self.table["problem"][row].as_py()
        return PROBLEMS[problem] if problem else self.table["path"][row].as_py().decode()

    def requests(self) -> Iterator[_Request]:
        """For all rows, in order. Parts of one video that follow each other are one; and so are rows whose
        results are kept.
        """
        hosts = hosts_of(self.table["path"].cast(pa.string())).combine_chunks().dictionary_encode()
        names, known = hosts.dictionary.to_pylist(), hosts.indices.to_pylist()
        rows = len(self.table)
        kept = np.fromiter(map(self.results.is_kept, range(rows)), bool, rows)
        goes_on = (kept[1:] & kept[:-1]) | (self._same_file() & (kept[1:] == kept[:-1]))
        for first, stop in pairwise([0, *(np.flatnonzero(~goes_on) + 1).tolist(), rows]):
            host = None if kept[first] or known[first] is None else names[known[first]]
            yield _Request(self, first, stop - first, host, bool(kept[first]))

    def _same_file(self) -> NDArray[np.bool_]:
        """Of each row but the first, whether its file is that of the row before."""
        same = np.ones(max(len(self.table) - 1, 0), bool)
        for name in ("path", "offset", "problem"):
            column = self.table[name].combine_chunks()
            same &= pc.equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
        return same


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
        self._open: dict[int, _Unit] = {}
        self._kept = Kept(plan, units)
        self._hosts_due = self._room_due = self._keep_due = self._save_due = 0.0
        self._room = self._room_before = 0  # bytes: now, and when the crawl began
        self._indexed: dict[str, str] = {}  # sha256 of foreign tars that units name
        self._left = self._not_done(units)

    def close(self) -> None:
        """Give up what is under way."""
        for unit in self._open.values():
            unit.close()
        self._kept.close()

    def arrivals(self) -> Iterator[tuple[_Attempt, bytes | Problem] | None]:
        """Every attempt of the units left, with what came of getting its bytes, in the order of arrival; None
        while none comes.
        """
        if self._sources:
            yield from self._read()
        if len(self._sources) < len(self._plan.sources):
            from ingest.web.fetcher import Fetcher  # takes long, and folders need none

            with Fetcher[_Request](self._fetch, window=WINDOW) as fetcher:
                turns = self._turns(fetcher.is_idle)
                for answer in fetcher.run_with_pauses(self._requests(turns)):
                    self._look_at_hosts(fetcher, turns)
                    self._keep()
                    if answer is None:
                        yield None
                        continue
                    request, outcome = answer
                    assert request.unit.lane is not None
                    request.unit.lane.ended(request, request.host)
                    body = outcome.data if isinstance(outcome, Fetched) else outcome
                    self._counts.bytes_read += len(body) if isinstance(body, bytes) else 0
                    for row in range(request.first, request.first + request.rows):
                        yield _Attempt(request.unit, row, outcome.http_status), body
            self._counts.slowest_hosts = ()

    def _look_at_hosts(self, fetcher: "Fetcher[_Request]", turns: Lanes[_Request]) -> None:
        now = time.monotonic()
        if now >= self._hosts_due:
            # What is no URL is of no host.
            left = {host: rows for host, rows in turns.left().items() if isinstance(host, str)}
            self._counts.slowest_hosts = fetcher.slowest_hosts(left)
            self._hosts_due = now + _HOSTS_EVERY_S
            # Verdicts come in batches: when only slow hosts are left, long after one another.
            self._progress(self._counts)

    def _keep(self) -> None:
        """See that what has come of units that do not end soon survives a kill."""
        now = time.monotonic()
        if now < self._keep_due:
            return
        self._keep_due = now + _KEEP_EVERY_S
        for unit in self._open.values():
            # Of those in lanes: what lies in folders and archives is read again.
            if unit.lane is not None and not unit.results.keeps and unit.begun <= now - _KEEP_AFTER_S:
                written = unit.writer.rows_so_far() if isinstance(unit.writer, ShardWriter) else ()
                unit.results.keep((self._result_of(row), data) for row, data in written)
        if now >= self._save_due:
            self._save_due = now + _SAVE_EVERY_S
            for unit in self._open.values():
                if unit.results.keeps:
                    self._kept.save(unit.number, unit.results)

    def _result_of(self, row: Mapping[str, Any]) -> Result:
        """The result that a row was made of."""
        names = ("status", "format", "width", "height", "original_width", "original_height", "phash")
        own = VIDEO_SCHEMA.names if self._settings.video is not None else ()
        verdict = Checked(
            **{name: row[name] for name in names},
            reason=row["reason"] or "",
            sha256=None if row["sha256"] is None else row["sha256"].hex(),
            columns={name: row[name] for name in own},
        )
        return Result(verdict, row["retryable"], row["http_status"])

    def take(self, attempt: _Attempt, data: bytes | Problem, verdict: Checked) -> None:
        """Write what is due; commit a unit that is whole. If another worker was first, its result stands."""
        unit = attempt.unit
        writer = self._begun(unit)
        stored = b""
        if verdict.status == "kept":
            stored = writer.stored(data if isinstance(data, bytes) else b"", verdict)
        self._count(verdict, len(stored))
        if verdict.data is not None:  # held once, as `stored`
            verdict = replace(verdict, data=None)
        retryable = isinstance(data, Problem) and data.retryable
        result = Result(verdict, retryable, attempt.http_status)
        self._write(unit, unit.results.put(attempt.row, result, stored))
        self._progress(self._counts)

    def _begun(self, unit: _Unit) -> ShardWriter | InPlaceWriter:
        if unit.writer is None:
            unit.begin(self._writer(unit))
        assert unit.writer is not None
        return unit.writer

    def _writer(self, unit: _Unit) -> ShardWriter | InPlaceWriter:
        # Units of what stays in its place have rows of one source.
        source = self._sources.get(unit.table["source"][0].as_py())
        shard = None if source is None else source.shard()
        if shard is None:
            return ShardWriter(self._plan.store, unit.number, extra=self._extra)
        if self._indexed.setdefault(shard.name, shard.sha256) != shard.sha256:
            raise UserError(
                f"{shard.name} has changed since a part of it was indexed: restore it to go on, or use "
                "another --output"
            )
        return InPlaceWriter(self._plan.store, unit.number, shard=shard, extra=self._extra)

    def _not_done(self, units: Sequence[int]) -> list[int]:
        left = []
        tars = {source.name for source in self._plan.sources if source.kind.stays_in_place}
        for unit, record in read_commits(self._plan.store, units):
            if record is None:
                left.append(unit)
            else:
                self._add_committed(unit, record)
                if record.shard.name in tars:
                    self._indexed[record.shard.name] = record.shard.sha256
        return left

    def _lanes_left(self) -> Iterator[list[int]]:
        left = set(self._left)
        for lane in self._plan.lanes:
            if units := [unit for unit in lane if unit in left]:
                yield units

    def _units(self, numbers: Iterable[int]) -> Iterator[_Unit]:
        """Those that nobody has made, under way from now on."""
        for number in numbers:
            # Hours may have passed: another worker may have made it.
            if (record := read_commit(self._plan.store, number)) is not None:
                self._add_committed(number, record)
                continue
            table = self._plan.table(number)
            results = self._kept.results(number, len(table), self._memory)
            unit = self._open[number] = _Unit(number, table, results)
            for result, size in results.load(self._kept.files(number), lasts=_lasts):
                self._count(result.verdict, size)
                self._counts.resumed += 1
            yield unit

    def _add_committed(self, number: int, record: CommitRecord) -> None:
        self._counts.add_committed(record)
        self._kept.remove(number)

    def _turns(self, is_idle: Callable[[], bool]) -> Lanes[_Request]:
        limits = self._fetch.limits()
        return Lanes(
            (
                (
                    sum(map(self._plan.rows_of, numbers)),
                    chain.from_iterable(unit.requests() for unit in self._units(numbers)),
                )
                for numbers in self._lanes_left()
            ),
            host_of=lambda request: request.host,
            per_host=lambda host: limits.connections(host) if isinstance(host, str) else 1,
            is_idle=is_idle,
            is_full=self._lacks_room,
        )

    def _requests(self, turns: Lanes[_Request]) -> Iterator[tuple[_Request, str | Problem] | None]:
        """What to ask for, and whose it is."""
        for turn in turns:
            if turn is None:
                yield None
                continue
            lane, request = turn
            unit = request.unit
            unit.lane = lane
            if not request.kept:
                yield request, unit.asked(request.first)
                continue
            lane.ended(request, request.host)
            for row in range(request.first, request.first + request.rows):
                self._write(unit, unit.results.take_up(row))

    def _lacks_room(self) -> bool:
        """Whether most of the room is gone in which images wait for their place: a million, at worst."""
        now = time.monotonic()
        if now >= self._room_due:
            root = self._plan.store.root
            place = root if isinstance(root, Path) else tempfile.gettempdir()
            self._room = shutil.disk_usage(place).free
            self._room_before = self._room_before or self._room
            self._room_due = now + _ROOM_EVERY_S
        return self._room < min(self._room_before * _ROOM_KEPT, _MOST_KEPT)

    def _read(self) -> Iterator[tuple[_Attempt, bytes | Problem]]:
        """What lies in folders and archives, in the plan's order."""
        max_bytes = self._settings.treatment.limits.max_bytes
        opened: int | None = None
        for unit in self._units(number for number in self._left if number in self._plan.local_units):
            row = 0
            for source, group in groupby(items_of(unit.table), key=itemgetter(0)):
                if opened not in (None, source):
                    self._sources[opened].close()  # thousands of archives cannot all be open
                opened = source
                # Parts of one file follow each other: it is read once.
                files = [list(parts) for _, parts in groupby((item for _, item in group), key=_whole)]
                read = self._sources[source].read([parts[0] for parts in files], max_bytes=max_bytes)
                for parts, data in zip(files, read, strict=True):
                    self._counts.bytes_read += len(data) if isinstance(data, bytes) else 0
                    for _ in parts:
                        yield _Attempt(unit, row), data
                        row += 1

    def _write(self, unit: _Unit, due: Iterable[tuple[Result, bytes]]) -> None:
        """Write results that are due; commit the unit when it is whole."""
        writer = self._begun(unit)
        for (verdict, retryable, http_status), image in due:
            if unit.lane is not None:
                unit.lane.ahead -= 1
            source, item = next(unit.items)
            url = _text(item.path)
            if source in self._sources and not _is_address(item.path):
                url = _within(self._sources[source].name, url)
            columns = {**item.extra, **verdict.columns}
            if (span := span_of(item.extra)) is not None:
                columns["parent"] = f"{url}#{span.fragment}"
            row = {
                "url": url,
                "labels": item.labels,
                "caption": item.caption,
                "retryable": retryable,
                "http_status": http_status,
                "extra": columns,
            }
            writer.add(verdict, image, offset=item.offset, **row)
        if unit.results.next == len(unit.table):
            self._commit(unit)

    def _commit(self, unit: _Unit) -> None:
        ours = self._begun(unit).publish(generation=self._plan.generation, fingerprint=self._plan.fingerprint)
        unit.close()
        del self._open[unit.number]
        if commit(self._plan.store, ours) != ours:
            logger.info("unit %d was committed by another worker first, with another result", unit.number)
        self._kept.remove(unit.number)
        self._counts.units_done += 1

    def _count(self, verdict: Checked, size: int) -> None:
        if verdict.status == "kept":
            self._counts.kept += 1
            self._counts.bytes_stored += size
        else:
            reasons = self._counts.rejected if verdict.status == "rejected" else self._counts.failed
            reasons[verdict.reason] += 1


def _lasts(result: Result) -> bool:
    """Whoever goes on may have more time."""
    return result.verdict.reason != GIVEN_UP.reason


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
