"""How far a long command is: a bar on a terminal, a plain line every ten seconds in a log."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ingest.crawl import Counts
from ingest.wording import duration

LINE_EVERY_S = 10.0
BAR_WIDTH = 40
SHORTEST_LEFT_S = 10.0


class Meter:
    """Shows what it was last told. Use as a context manager: the last state is always shown, but what
    ends before a first line was due leaves a log as it is.

    Args:
        console: where to show it; a bar if it is a terminal, else lines.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._line_due = clock() + LINE_EVERY_S
        self._doing = ""
        self._done = 0
        self._total = 0
        self._figures: Sequence[str] = ()
        self._last_line = ""
        # The bar is drawn four times a second from the last state, so that telling costs nothing.
        self._live = Live(console=console, get_renderable=self._bar) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        elif self._last_line:
            self._print_line()

    def tell(self, doing: str, *, done: int, total: int, figures: Sequence[str] = ()) -> None:
        """Say how far it is, as often as one likes; `total` is 0 while it is not known."""
        self._doing, self._done, self._total, self._figures = doing, done, total, figures
        if self._live is None and self._clock() >= self._line_due:
            self._print_line()
            self._line_due = self._clock() + LINE_EVERY_S

    def _bar(self) -> Group:
        row = Table.grid(padding=(0, 1))
        share = f"{self._done:,}/{self._total:,}" if self._total else f"{self._done:,}"
        bar = ProgressBar(self._total or None, self._done, width=BAR_WIDTH, pulse=not self._total)
        row.add_row(self._doing, bar, share)
        return Group(row, Text("  " + " · ".join(self._figures), style="dim"))

    def _print_line(self) -> None:
        share = f"{self._done:,}"
        if self._total:
            share += f"/{self._total:,} ({100 * self._done / self._total:.0f} %)"
        line = ", ".join([f"{self._doing}: {share}", *self._figures])
        if line != self._last_line:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
        self._last_line = line


class CrawlProgress:
    """Tells a meter about a crawl. What an earlier run had done moves the bar, not the rates."""

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter = meter
        self._clock = clock
        self._started = clock()

    def __call__(self, counts: Counts) -> None:
        if not counts.units:
            self._meter.tell("planning, files found", done=counts.planned, total=0)
            self._started = self._clock()
            return
        self._meter.tell("crawling", done=counts.done, total=counts.planned, figures=self.figures(counts))

    def figures(self, counts: Counts) -> list[str]:
        """The rates of this run, the counts, and the time that is left at this rate."""
        seconds = self.seconds
        decided = counts.done - counts.resumed
        rate = decided / seconds if seconds > 0 else 0.0
        figures = [
            f"{rate:,.0f} images/s",
            f"{counts.bytes_read / 1e6 / seconds if seconds > 0 else 0:,.1f} MB/s",
            f"{counts.kept:,} kept",
            f"{counts.rejected.total():,} rejected",
            f"{counts.failed.total():,} failed",
        ]
        left = (counts.planned - counts.done) / rate if rate else 0.0
        if left >= SHORTEST_LEFT_S:
            figures.append(f"about {duration(left)} left")
        return figures

    @property
    def seconds(self) -> float:
        """Since the last file was planned."""
        return self._clock() - self._started
