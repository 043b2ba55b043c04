"""A crawl's numbers in Prometheus' text format, for the textfile collector of node-exporter.

The collector reads files named *.prom in one folder. Each file is replaced as a whole, so that it never sees
half of one.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.errors import UserError
from cluster.wording import visible
from ingest.progress.counts import Counts
from ingest.progress.pace import Pace

WRITE_EVERY_S = 10.0

logger = logging.getLogger(__name__)


class MetricsFile:
    """Rewritten at most every ten seconds while it is told, and at the end.

    Args:
        path: the file.
        output: the dataset, a label of every number: two crawls may report from one machine.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: Path, *, output: str) -> None:
        self._path = path
        self._numbers = _Numbers(visible(output))
        self._registry = CollectorRegistry()
        self._registry.register(self._numbers)
        self._due = 0.0
        try:
            self._write(Counts(), Pace(0.0), finished=False)
        except OSError as error:
            raise UserError(
                f"--metrics-file {path} cannot be written ({error.strerror}): name a file in a folder that "
                "exists and is yours"
            ) from error

    def tell(self, counts: Counts, pace: Pace, now: float) -> None:
        """Write it if that is due; trouble with it does not stop a crawl."""
        if now < self._due:
            return
        self._due = now + WRITE_EVERY_S
        try:
            self._write(counts, pace, finished=False)
        except OSError as error:
            logger.warning("cannot write the metrics file: %s", error)

    def end(self, counts: Counts, pace: Pace) -> None:
        """Write what came of it, and that it is finished."""
        try:
            self._write(counts, pace, finished=True)
        except OSError as error:
            logger.warning("cannot write the metrics file: %s", error)

    def _write(self, counts: Counts, pace: Pace, *, finished: bool) -> None:
        self._numbers.now = counts, pace, finished
        write_to_textfile(str(self._path), self._registry)


class _Numbers(Collector):
    """What the registry asks for: the numbers as they are at that moment."""

    def __init__(self, output: str) -> None:
        self._output = output
        self.now = Counts(), Pace(0.0), False

    def collect(self) -> Iterator[Metric]:
        counts, pace, finished = self.now
        attempts = CounterMetricFamily(
            "ingest_attempts",
            "Attempts that came to a verdict, those of earlier runs included.",
            labels=["output", "status", "reason"],
        )
        attempts.add_metric([self._output, "kept", ""], counts.kept)
        for status, reasons in (("rejected", counts.rejected), ("failed", counts.failed)):
            for reason, count in sorted(reasons.items()):
                attempts.add_metric([self._output, status, visible(reason)], count)
        yield attempts
        yield self._counter("ingest_read_bytes", "Read from the sources by this run.", counts.bytes_read)
        yield self._counter("ingest_stored_bytes", "Of the images that were kept.", counts.bytes_stored)
        yield self._gauge("ingest_planned_attempts", "Attempts in the plan.", counts.planned)
        yield self._gauge("ingest_planned_units", "Work units in the plan.", counts.units)
        yield self._gauge("ingest_committed_units", "Work units that are done.", counts.units_done)
        rate = pace.images_per_second
        yield self._gauge("ingest_attempts_per_second", "Over the last minute.", rate)
        yield self._gauge("ingest_read_bytes_per_second", "Over the last minute.", pace.bytes_per_second)
        left = pace.time_left(counts)
        if left is not None:
            yield self._gauge("ingest_left_seconds", "That the crawl takes at least.", left.seconds)
        hosts = GaugeMetricFamily(
            "ingest_slow_host_left_seconds",
            "That the hosts with the longest queues take at their own pace.",
            labels=["output", "host"],
        )
        for host in counts.slowest_hosts:
            hosts.add_metric([self._output, visible(host.name)], host.seconds_left)
        yield hosts
        yield self._gauge("ingest_finished", "1 when the dataset is sealed.", int(finished))

    def _counter(self, name: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(name, words, labels=["output"])
        family.add_metric([self._output], value)
        return family

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, words, labels=["output"])
        family.add_metric([self._output], value)
        return family
