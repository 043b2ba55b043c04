"""What a meter and a file of metrics are told of a crawl."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.wording import duration, visible
from ingest.progress.counts import Counts
from ingest.progress.meter import Meter
from ingest.progress.pace import Pace, brief, what_waits

if TYPE_CHECKING:
    from ingest.progress.metrics_file import MetricsFile

SHORTEST_LEFT_S = 10.0
# As often as the bar is drawn.
TELL_EVERY_S = 0.25
REASONS_SHOWN = 4
HOSTS_SHOWN = 3


class CrawlProgress:
    """Tells a meter about a crawl, and a file of metrics if there is one. What an earlier run had done moves
    the bar, not the rates.

    Args:
        meter: what people look at.
        clock: seconds, monotonic.
        metrics: is written now and then; `end` writes it a last time.
    """

    def __init__(
        self,
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
        *,
        metrics: "MetricsFile | None" = None,
    ) -> None:
        self._meter = meter
        self._clock = clock
        self._metrics = metrics
        self._started = clock()
        self._pace = Pace(self._started)
        self._due = self._started

    def __call__(self, counts: Counts) -> None:
        # It is called for every image: a clock is all that most calls cost.
        now = self._clock()
        if not counts.units:
            self._started, self._pace = now, Pace(now)
            self._meter.tell("planning, files found", done=counts.planned, total=0)
            return
        if now < self._due and counts.done < counts.planned:
            return
        self._due = now + TELL_EVERY_S
        self._pace.note(counts, now)
        self._meter.tell(
            "crawling",
            done=counts.done,
            total=counts.planned,
            figures=self.figures(counts),
            details=crawl_details(counts),
        )
        if self._metrics is not None:
            self._metrics.tell(counts, self._pace, now)

    def end(self, counts: Counts) -> None:
        """The crawl has come to its end."""
        if self._metrics is not None:
            self._metrics.end(counts, self._pace)

    def figures(self, counts: Counts) -> list[str]:
        """The rates of the last minute, the counts, and the time that is left."""
        figures = [
            f"{self._pace.images_per_second:,.0f} images/s",
            f"{self._pace.bytes_per_second / 1e6:,.1f} MB/s",
            f"{counts.kept:,} kept{_share(counts.kept, counts.done)}",
            f"{counts.rejected.total():,} rejected",
            f"{counts.failed.total():,} failed",
        ]
        left = self._pace.time_left(counts)
        if left is not None and left.seconds >= SHORTEST_LEFT_S:
            host = left.host
            for_whom = f", for {what_waits(host)}" if host else ""
            figures.append(f"{'at least' if host else 'about'} {duration(left.seconds)} left{for_whom}")
        return figures

    @property
    def seconds(self) -> float:
        """Since the last file was planned."""
        return self._clock() - self._started


def crawl_details(counts: Counts) -> dict[str, str]:
    """The most frequent reasons for not keeping an image, and the hosts that take longest."""
    reasons = (counts.rejected + counts.failed).most_common(REASONS_SHOWN)
    hosts = counts.slowest_hosts[:HOSTS_SHOWN]
    details = {
        "not kept": ", ".join(f"{count:,} {visible(reason)}" for reason, count in reasons),
        "slowest": ", ".join(
            f"{brief(host.name)} ({host.waiting:,} waiting, {duration(host.seconds)} each)" for host in hosts
        ),
    }
    return {name: text for name, text in details.items() if text}


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f} %)" if whole else ""
