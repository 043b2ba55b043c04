"""The crawl: plan, read, check, shard, commit, seal. Running it again finishes what is missing."""

import errno
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from ingest.commit import commit, make_folder, read_commit, seal
from ingest.image import Checked
from ingest.plan import CrawlSettings, Plan, freeze, open_source
from ingest.pool import Checker, Result
from ingest.shard import ShardWriter
from ingest.sources.source import Item, Problem, Source

__all__ = ["Counts", "CrawlReport", "CrawlSettings", "Progress", "crawl_shards"]

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

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
        output: the dataset's folder.
        root: the sealed dataset's Merkle root, hex.
        counts: kept + rejected + failed = planned.
    """

    output: Path
    root: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class _Attempt:
    unit: int
    source: int
    item: Item


def crawl_shards(
    sources: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    workers: int,
    progress: Progress,
) -> CrawlReport:
    """Turn images into a sealed dataset; go on where an earlier run of the same crawl stopped.

    Args:
        sources: folders and local tars, in the order of their images in the dataset.
        output: the dataset's folder, outside the sources.
        settings: what is made of each image.
        workers: checking processes; does not change the result.
        progress: is told how far the crawl is.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    output = Path(output)
    if not sources:
        raise UserError("a crawl needs at least one source: a folder or a tar")
    opened = [open_source(text) for text in sources]
    _refuse_output_inside(sources, output)
    try:
        return _crawled(opened, output, settings, workers=workers, progress=progress)
    except OSError as error:
        # Trouble with reading a source is a row; what is left is the output's.
        if error.errno not in _MENDABLE:
            raise
        reason = (error.strerror or "").lower()
        raise UserError(
            f"cannot write {output}: {reason}; mend that, then run the same command again"
        ) from error
    finally:
        for source in opened:
            source.close()


def _crawled(
    sources: Sequence[Source], output: Path, settings: CrawlSettings, *, workers: int, progress: Progress
) -> CrawlReport:
    make_folder(output)
    counts = Counts()

    def listed(items: int) -> None:
        counts.planned = items
        progress(counts)

    plan = freeze(output, sources, settings, listed=listed)
    counts.units, counts.planned = len(plan.units), plan.rows
    crawl = _Crawl(plan=plan, sources=sources, settings=settings, counts=counts, progress=progress)
    with Checker[_Attempt](
        settings.treatment, workers=workers, seconds=settings.seconds, memory_mb=settings.memory_mb
    ) as checker:
        for unit, results in groupby(checker.run(crawl.rows()), key=lambda result: result[0].unit):
            crawl.make_unit(unit, results)
    root = seal(output, dict.fromkeys(plan.units, plan.fingerprint))
    progress(counts)
    return CrawlReport(output=output, root=root, counts=counts)


def _refuse_output_inside(sources: Sequence[str], output: Path) -> None:
    for text in sources:
        if output.resolve().is_relative_to(Path(text).resolve()):
            raise UserError(f"--output {output} lies inside the source {text}: choose a folder outside it")


@dataclass(frozen=True, kw_only=True)
class _Crawl:
    """One run over a plan's units."""

    plan: Plan
    sources: Sequence[Source]
    settings: CrawlSettings
    counts: Counts
    progress: Progress

    def rows(self) -> Iterator[tuple[_Attempt, bytes | Problem]]:
        """Every attempt of the units that nobody has committed yet, with its bytes, in order."""
        max_bytes = self.settings.treatment.limits.max_bytes
        for unit in self.plan.units:
            record = read_commit(self.plan.output, unit)
            if record is not None:
                self.counts.add_committed(record)
                continue
            for number, group in groupby(self.plan.items(unit), key=lambda pair: pair[0]):
                items = [item for _, item in group]
                read = self.sources[number].read(items, max_bytes=max_bytes)
                for item, data in zip(items, read, strict=True):
                    self.counts.bytes_read += len(data) if isinstance(data, bytes) else 0
                    yield _Attempt(unit, number, item), data

    def make_unit(self, unit: int, results: Iterator[Result[_Attempt]]) -> None:
        """Write and commit one unit. If another worker was first, its result stands and ours is garbage."""
        with ShardWriter(self.plan.output, unit) as writer:
            for attempt, data, verdict in results:
                self._add(writer, attempt, data, verdict)
                self.progress(self.counts)
            ours = writer.publish(generation=self.plan.generation, fingerprint=self.plan.fingerprint)
        if commit(self.plan.output, ours) != ours:
            logger.info("unit %d was committed by another worker first, with another result", unit)
        self.counts.units_done += 1
        self.progress(self.counts)

    def _add(self, writer: ShardWriter, attempt: _Attempt, data: bytes | Problem, verdict: Checked) -> None:
        original = data if isinstance(data, bytes) else b""
        stored = original if verdict.data is None else verdict.data
        writer.add(
            verdict,
            stored,
            url=_url(self.sources[attempt.source].name, attempt.item.path),
            labels=_labels(attempt.item.path),
            retryable=isinstance(data, Problem) and data.retryable,
        )
        if verdict.status == "kept":
            self.counts.kept += 1
            self.counts.bytes_stored += len(stored)
        else:
            reasons = self.counts.rejected if verdict.status == "rejected" else self.counts.failed
            reasons[verdict.reason] += 1


def _url(source: str, path: bytes) -> str:
    """Where an image came from, for people: bytes that are no text show as \\\\x escapes."""
    if _is_address(path):
        return _text(path)
    return f"{source}/{_text(path)}" if path else source


def _labels(path: bytes) -> list[str]:
    """The first folder below the source; an address on the web has none."""
    if _is_address(path):
        return []
    folder, slash, _ = path.partition(b"/")
    return [_text(folder)] if slash else []


def _is_address(path: bytes) -> bool:
    # Paths within folders and tars have no empty part.
    return b"://" in path


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
