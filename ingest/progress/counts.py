"""How far a crawl is, and what it has made."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ingest.dataset.records import CommitRecord
from ingest.web.host_queues import SlowHost


@dataclass(kw_only=True)
class Counts:
    """How far a crawl is. Units committed by an earlier run, or by another, are counted too.

    Attributes:
        planned: attempts in the plan; grows while sources are being listed.
        merged, known: rows that are no attempts: their URL is that of an earlier row, or they were planned in
            a generation before.
        over_per_site: rows that are no attempts, for their site has as many as --per-site says.
        kept, rejected, failed: attempts with a verdict, the latter two by reason.
        bytes_read: of this run, from the sources.
        bytes_stored: size of the kept images.
        units, units_done: work units planned and committed.
        resumed: attempts that this run found done.
        slowest_hosts: those that URLs will wait for longest, as far as URLs are known; renewed now and then.
    """

    planned: int = 0
    merged: int = 0
    known: int = 0
    over_per_site: int = 0
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

    def add_committed(self, record: CommitRecord) -> None:
        self.kept += record.kept
        self.rejected.update(record.rejected)
        self.failed.update(record.failed)
        self.bytes_stored += record.bytes
        self.units_done += 1
        self.resumed += record.rows


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
