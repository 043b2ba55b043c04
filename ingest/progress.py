"""How far a crawl is: a bar on a terminal, a plain line every ten seconds in a log."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class CrawlProgress:
    """Counts attempts as they are decided and shows them.

    Rates are those of this process: attempts that an earlier, interrupted crawl decided move the bar,
    not the rate. Use as a context manager; the last state is always shown.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = clock()
        self._line_due = self._started + LINE_EVERY_S
        self._before = 0
        self.planned = 0
        self.kept = 0
        self.rejected = 0
        self.failed = 0
        self.bytes_read = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("planning", total=None, rates="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()
        self._bar.stop()
        if not self._console.is_terminal and self.planned:
            self._line()

    def start(self, *, planned: int, kept: int = 0, rejected: int = 0, failed: int = 0) -> None:
        """The plan is known: how many attempts it has, and what an earlier crawl has decided already."""
        self.planned, self.kept, self.rejected, self.failed = planned, kept, rejected, failed
        self._before = self.done
        self._started = self._clock()
        self._line_due = self._started + LINE_EVERY_S
        self._show()

    def add(self, *, kept: int = 0, rejected: int = 0, failed: int = 0, bytes_read: int = 0) -> None:
        """More attempts have been decided."""
        self.kept += kept
        self.rejected += rejected
        self.failed += failed
        self.bytes_read += bytes_read
        self._show()

    @property
    def done(self) -> int:
        return self.kept + self.rejected + self.failed

    @property
    def seconds(self) -> float:
        """Since the plan was known."""
        return self._clock() - self._started

    @property
    def images_per_second(self) -> float:
        return (self.done - self._before) / self.seconds if self.seconds > 0 else 0.0

    def rates(self) -> str:
        megabytes = self.bytes_read / 1e6 / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{self.images_per_second:,.0f} images/s, {megabytes:,.1f} MB/s, "
            f"{self.kept:,} kept, {self.rejected:,} rejected, {self.failed:,} failed"
        )

    def _show(self) -> None:
        self._bar.update(
            self._task,
            description="crawling" if self.planned else "planning",
            total=self.planned or None,
            completed=self.done,
            rates=self.rates() if self.planned else "",
        )
        if not self._console.is_terminal and self.planned and self._clock() >= self._line_due:
            self._line()
            self._line_due = self._clock() + LINE_EVERY_S

    def _line(self) -> None:
        share = 100 * self.done / self.planned
        line = f"{self.done:,}/{self.planned:,} ({share:.0f} %), {self.rates()}"
        rate = self.images_per_second
        if rate and self.done < self.planned:
            line += f", about {duration((self.planned - self.done) / rate)} left"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
