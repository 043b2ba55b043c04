"""The crawl: plan, read, check, shard, commit, seal. Running it again finishes what is missing."""

import errno
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.errors import UserError
from ingest.commit import commit, read_commit, read_commits, seal
from ingest.crawl_settings import CrawlSettings
from ingest.fetch import Fetched, Fetcher, FetchSettings
from ingest.hosts import SlowHost
from ingest.image import Checked
from ingest.in_place import KIND as IN_PLACE
from ingest.in_place import ForeignTar, InPlaceWriter
from ingest.plan import Plan, freeze, open_images, open_source, read_plans
from ingest.pool import Checker
from ingest.reorder import Memory, Reorder
from ingest.shard import ShardWriter
from ingest.sources.source import Item, Problem, Source
from ingest.sources.urls import Columns, UrlList, expand
from ingest.store import Store, open_store

__all__ = ["Counts", "CrawlReport", "CrawlSettings", "Progress", "crawl_shards"]

# What may wait in memory for its turn in a shard, in all units together.
_WAITING_BYTES = 128 << 20
# URLs known at a time: enough that slow sites do not hold up the others.
_WINDOW = 16_384
_HOSTS_EVERY_S = 2.0
_MENDABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ETIMEDOUT,
)

NAMES_TELL = Columns()

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Counts:
    """How far a crawl is. Units committed by an earlier run, or by another, are counted too.

    Attributes:
        planned: attempts in the plan; grows while sources are being listed.
        kept, rejected, failed: attempts with a verdict, the latter two by reason.
        bytes_read: of this run, from the sources.
        bytes_stored: size of the kept images.
        units, units_done: work units planned and committed.
        resumed: attempts that this run found done.
        slowest_hosts: those that URLs will wait for longest, as far as URLs are known; renewed now and then.
    """

    planned: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_stored: int = 0
    units: int = 0
    units_done: int = 0
    resumed: int = 0
    slowest_hosts: Sequence[SlowHost] = ()

    @property
    def done(self) -> int:
        return self.kept + self.rejected.total() + self.failed.total()

    def add_committed(self, record: dict[str, Any]) -> None:
        self.kept += record["kept"]
        self.rejected.update(record["rejected"])
        self.failed.update(record["failed"])
        self.bytes_stored += record["bytes"]
        self.units_done += 1
        self.resumed += record["rows"]


class Progress(Protocol):
    """Called often, from one thread, with the same object that counts up; must return quickly."""

    def __call__(self, counts: Counts) -> None: ...


@dataclass(frozen=True, kw_only=True)
class CrawlReport:
    """What a finished crawl made.

    Attributes:
        output: the dataset's folder or URL.
        root: the sealed dataset's Merkle root, hex.
        counts: kept + rejected + failed = planned.
    """

    output: Path | str
    root: str
    counts: Counts


class _Attempt(NamedTuple):
    unit: int
    row: int
    source: int
    item: Item
    http_status: int | None = None


def crawl_shards(
    sources: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    workers: int,
    progress: Progress,
    columns: Columns = NAMES_TELL,
    extend: bool = False,
) -> CrawlReport:
    """Turn images into a sealed dataset; go on where an earlier run of the same crawl stopped.

    Args:
        sources, output, settings, columns, extend: see `plan_shards`.
        workers: checking processes; does not change the result.
        progress: is told how far the crawl is.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    counts = Counts()
    plan = plan_shards(
        sources, output, settings, progress=progress, counts=counts, columns=columns, extend=extend
    )
    with told_if_it_cannot_be_written(plan.store):
        return crawl_plan(plan, fetch=settings.fetch, workers=workers, progress=progress, counts=counts)


def plan_shards(
    sources: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    progress: Progress,
    counts: Counts,
    columns: Columns = NAMES_TELL,
    extend: bool = False,
) -> Plan:
    """Freeze what there is to do, or find the plan of an earlier run of the same crawl.

    Args:
        sources: folders, local tars, and lists of URLs, in the order of their images in the dataset; rows of
            lists come last, sorted by site.
        output: the dataset's folder, outside the sources, or `s3://bucket/prefix`.
        settings: what is made of each image.
        progress: is told how many attempts have been found, in `counts`.
        columns: which columns of lists mean what.
        extend: add these sources to a dataset that was made from others; URLs that it knows are left out.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    store = open_store(output)
    if not sources:
        raise UserError("a crawl needs at least one source: a folder, a tar, or a list of URLs")
    places = [place for text in sources for place in expand(text)]
    opened = [open_source(place, columns) for place in places]
    if isinstance(store.root, Path):
        _refuse_output_inside(places, store.root)
    # Before an hour of planning, too.
    _refuse_without_contact(settings.fetch, any(isinstance(source, UrlList) for source in opened))

    def listed(items: int) -> None:
        counts.planned = items
        progress(counts)

    with ExitStack() as stack, told_if_it_cannot_be_written(store):
        for source in opened:
            if not isinstance(source, UrlList):
                stack.callback(source.close)
        store.prepare()
        locations = [place if "://" in place else str(Path(place).resolve()) for place in places]
        return freeze(store, opened, settings, listed=listed, extend=extend, locations=locations)


def crawl_plan(
    plan: Plan, *, fetch: FetchSettings, workers: int, progress: Progress, counts: Counts
) -> CrawlReport:
    """Do what is left of a plan, and seal the dataset.

    Raises:
        UserError: an earlier generation is not finished, or a unit was made under another plan.
    """
    refuse_to_start(plan, fetch)
    counts.units, counts.planned = len(plan.units), plan.rows
    crawl_units(plan, plan.units, fetch=fetch, workers=workers, progress=progress, counts=counts)
    root = seal_plan(plan)
    progress(counts)
    return CrawlReport(output=plan.store.root, root=root, counts=counts)


def refuse_to_start(plan: Plan, fetch: FetchSettings) -> None:
    """Look before anything is fetched.

    Raises:
        UserError: nobody could be reached about the requests, or an earlier generation is not finished.
    """
    _refuse_without_contact(fetch, any(source["kind"] == "urls" for source in plan.sources))
    for earlier in read_plans(plan.store)[: plan.generation]:
        if any(record is None for _, record in read_commits(plan.store, earlier.units)):
            raise UserError(
                f"{plan.store.root} is not finished: run the crawl of generation {earlier.generation} first"
            )


def seal_plan(plan: Plan) -> str:
    """Seal the dataset of this generation and those before; its root, hex. Sealing again changes nothing.

    Raises:
        UserError: a unit is missing, or was made under another plan.
    """
    plans = read_plans(plan.store)[: plan.generation + 1]
    return seal(plan.store, {unit: each.fingerprint for each in plans for unit in each.units})


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
    settings = plan.settings
    with ExitStack() as stack:
        sources: dict[int, Source] = {}
        for number, (source, place) in enumerate(zip(plan.sources, plan.locations, strict=True)):
            if source["kind"] != "urls":
                in_place = source["kind"] == IN_PLACE
                sources[number] = ForeignTar(place, source["name"]) if in_place else open_images(place)
                stack.callback(sources[number].close)
        checker = stack.enter_context(
            Checker[_Attempt](
                settings.treatment, workers=workers, seconds=settings.seconds, memory_mb=settings.memory_mb
            )
        )
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


@contextmanager
def told_if_it_cannot_be_written(store: Store) -> Iterator[None]:
    """Trouble with the output that a user can mend becomes a sentence."""
    try:
        yield
    except OSError as error:
        # Trouble with reading a source is a row; what is left is the output's.
        if error.errno not in _MENDABLE:
            raise
        reason = error.strerror or ""
        raise UserError(
            f"cannot write {store.root}: {reason[:1].lower()}{reason[1:]}; mend that, then run the same "
            "command again"
        ) from error


def _refuse_without_contact(fetch: FetchSettings, urls: bool) -> None:
    if urls and not fetch.contact:
        raise UserError(
            "webmasters must be able to reach you: give a web page or an e-mail address with --contact"
        )


def _refuse_output_inside(sources: Sequence[str], output: Path) -> None:
    for text in sources:
        if output.resolve().is_relative_to(Path(text).resolve()):
            raise UserError(f"--output {output} lies inside the source {text}: choose a folder outside it")


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
        sources: Mapping[int, Source],
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
        self._hosts_due = 0.0
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
            with Fetcher[_Attempt](self._fetch, window=_WINDOW) as fetcher:
                for attempt, outcome in fetcher.run(self._requests()):
                    self._look_at_hosts(fetcher)
                    body = outcome.data if isinstance(outcome, Fetched) else outcome
                    self._counts.bytes_read += len(body) if isinstance(body, bytes) else 0
                    yield attempt._replace(http_status=outcome.http_status), body
            self._counts.slowest_hosts = ()

    def _look_at_hosts(self, fetcher: Fetcher[_Attempt]) -> None:
        now = time.monotonic()
        if now >= self._hosts_due:
            self._counts.slowest_hosts = fetcher.slowest_hosts()
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
        in_place = isinstance(unit.writer, InPlaceWriter)
        stored = original if verdict.data is None or in_place else verdict.data
        self._count(verdict, stored)
        if verdict.data is not None:  # held once, as `stored`
            verdict = replace(verdict, data=None)
        outcome = attempt, isinstance(data, Problem) and data.retryable, verdict
        for (due, retryable, judged), image in unit.reorder.put(attempt.row, outcome, stored):
            self._write(unit.writer, due, retryable, judged, image)
        if unit.reorder.next == unit.rows:
            self._commit(attempt.unit, self._open.pop(attempt.unit))
        self._progress(self._counts)

    def _writer(self, attempt: _Attempt) -> ShardWriter | InPlaceWriter:
        source = self._sources.get(attempt.source)
        if not isinstance(source, ForeignTar):
            return ShardWriter(self._plan.store, attempt.unit, extra=self._extra)
        shard = source.shard()
        if self._indexed.setdefault(source.name, shard["sha256"]) != shard["sha256"]:
            raise UserError(
                f"{source.name} has changed since a part of it was indexed: restore it to go on, or use "
                "another --output"
            )
        return InPlaceWriter(self._plan.store, attempt.unit, shard=shard, extra=self._extra)

    def _not_done(self, units: Sequence[int]) -> list[int]:
        left = []
        tars = {source.name for source in self._sources.values() if isinstance(source, ForeignTar)}
        for unit, record in read_commits(self._plan.store, units):
            if record is None:
                left.append(unit)
            else:
                self._counts.add_committed(record)
                if record["shard"]["name"] in tars:
                    self._indexed[record["shard"]["name"]] = record["shard"]["sha256"]
        return left

    def _items(self, *, urls: bool) -> Iterator[_Attempt]:
        """The attempts that have a URL, or those that have none."""
        for unit in self._left:
            # Hours may have passed: another worker may have made it.
            if unit not in self._rows and (record := read_commit(self._plan.store, unit)) is not None:
                self._counts.add_committed(record)
                continue
            items = self._plan.items(unit)
            self._rows[unit] = len(items)
            for row, (source, item) in enumerate(items):
                if (source not in self._sources) == urls:
                    yield _Attempt(unit, row, source, item)

    def _requests(self) -> Iterator[tuple[_Attempt, str]]:
        for attempt in self._items(urls=True):
            yield attempt, attempt.item.path.decode()

    def _read(self) -> Iterator[tuple[_Attempt, bytes | Problem]]:
        """What lies in folders and archives, in the plan's order."""
        max_bytes = self._settings.treatment.limits.max_bytes
        opened: int | None = None
        for (_, source), group in groupby(self._items(urls=False), key=lambda each: (each.unit, each.source)):
            if opened not in (None, source):
                self._sources[opened].close()  # thousands of archives cannot all be open
            opened = source
            attempts = list(group)
            read = self._sources[source].read([each.item for each in attempts], max_bytes=max_bytes)
            for attempt, data in zip(attempts, read, strict=True):
                self._counts.bytes_read += len(data) if isinstance(data, bytes) else 0
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
        row = {
            "url": url,
            "labels": item.labels,
            "caption": item.caption,
            "retryable": retryable,
            "http_status": attempt.http_status,
            "extra": item.extra,
        }
        if isinstance(writer, InPlaceWriter):
            writer.add(verdict, image, offset=item.offset, **row)
        else:
            writer.add(verdict, image, **row)

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


def _within(source: str, path: str) -> str:
    """Where an image came from, for people."""
    return f"{source}/{path}" if path else source


def _is_address(path: bytes) -> bool:
    # Paths within folders and tars have no empty part.
    return b"://" in path


def _text(name: bytes) -> str:
    """Bytes that are no text show as \\x escapes."""
    return name.decode("utf-8", "backslashreplace")
