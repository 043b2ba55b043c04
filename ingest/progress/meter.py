"""How far a long command is: a bar on a terminal, a plain line every ten seconds in a log."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 10.0
BAR_WIDTH = 40
NOTHING: Mapping[str, str] = MappingProxyType({})


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
        self._details = NOTHING
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

    def tell(
        self,
        doing: str,
        *,
        done: int,
        total: int,
        figures: Sequence[str] = (),
        details: Mapping[str, str] = NOTHING,
    ) -> None:
        """Say how far it is, as often as one likes.

        Args:
            doing: what is being done.
            done, total: how much of it; `total` is 0 while it is not known.
            figures: shown together, below the bar.
            details: by name, each on a line of its own.
        """
        self._doing, self._done, self._total = doing, done, total
        self._figures, self._details = figures, details
        if self._live is None and self._clock() >= self._line_due:
            self._print_line()
            self._line_due = self._clock() + LINE_EVERY_S

    def _bar(self) -> Group:
        row = Table.grid(padding=(0, 1))
        share = f"{self._done:,}/{self._total:,}" if self._total else f"{self._done:,}"
        bar = ProgressBar(self._total or None, self._done, width=BAR_WIDTH, pulse=not self._total)
        row.add_row(self._doing, bar, share)
        lines = [" · ".join(self._figures), *(f"{name}: {text}" for name, text in self._details.items())]
        # Cut, not wrapped: a view whose height changes flickers.
        shown = [Text("  " + line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(row, *shown)

    def _print_line(self) -> None:
        share = f"{self._done:,}"
        if self._total:
            share += f"/{self._total:,} ({100 * self._done / self._total:.0f} %)"
        line = ", ".join([f"{self._doing}: {share}", *self._figures])
        line = "; ".join([line, *(f"{name}: {text}" for name, text in self._details.items())])
        if line != self._last_line:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
        self._last_line = line
