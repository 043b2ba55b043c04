"""How fast a crawl is, and how long the rest will take."""

from collections import deque
from typing import NamedTuple

from cluster.wording import duration, visible
from ingest.progress.counts import Counts
from ingest.web.host_queues import SlowHost

WINDOW_S = 60.0
_SAMPLE_EVERY_S = 1.0


class _Sample(NamedTuple):
    time: float
    decided: int
    bytes_read: int


class TimeLeft(NamedTuple):
    """Seconds that a crawl will take at least.

    Attributes:
        seconds: from now.
        host: the site whose queue alone takes so long; None if that is all of them at the present rate.
    """

    seconds: float
    host: SlowHost | None


# Of a host's name, which comes from the wild and may have 253 characters.
_HOST_WIDTH = 48


def brief(host: str) -> str:
    """A host's name for a line that people read."""
    shown = visible(host)
    return shown if len(shown) <= _HOST_WIDTH else f"…{shown[1 - _HOST_WIDTH :]}"


def what_waits(host: SlowHost) -> str:
    """What is left of a host, and the time that its politeness needs for it."""
    return f"{host.waiting:,} URLs of {brief(host.name)}, {duration(host.seconds)} each"


class Pace:
    """Rates of the last minute: an average since the start would hide that only slow hosts are left.

    What an earlier run had done is not in the rates.

    Args:
        now: when the crawl began, seconds of any clock.
    """

    def __init__(self, now: float) -> None:
        self._samples = deque([_Sample(now, 0, 0)])
        self._latest = self._samples[0]

    def note(self, counts: Counts, now: float) -> None:
        """Take account of what has been done until now."""
        self._latest = _Sample(now, counts.done - counts.resumed, counts.bytes_read)
        if now - self._samples[-1].time >= _SAMPLE_EVERY_S:
            self._samples.append(self._latest)
        while len(self._samples) > 1 and self._samples[1].time <= now - WINDOW_S:
            self._samples.popleft()

    @property
    def images_per_second(self) -> float:
        """Attempts that came to a verdict."""
        return (self._latest.decided - self._samples[0].decided) / self._seconds

    @property
    def bytes_per_second(self) -> float:
        """Read from the sources."""
        return (self._latest.bytes_read - self._samples[0].bytes_read) / self._seconds

    def time_left(self, counts: Counts) -> TimeLeft | None:
        """None while nothing is known: a crawl is not done before its slowest host is."""
        rate = self.images_per_second
        by_rate = (counts.planned - counts.done) / rate if rate else 0.0
        slowest = max(counts.slowest_hosts, key=lambda host: host.seconds_left, default=None)
        if slowest is not None and slowest.seconds_left > by_rate:
            return TimeLeft(slowest.seconds_left, slowest)
        return TimeLeft(by_rate, None) if rate else None

    @property
    def _seconds(self) -> float:
        return max(self._latest.time - self._samples[0].time, 1e-3)
