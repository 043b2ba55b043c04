"""Staying with a run that goes on: repeating its log, and passing on what is asked of whoever waits."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

from cluster.run.folder import RunFolder


class Stream(Protocol):
    """Somewhere to repeat a log: a file, or what draws it on a terminal."""

    def write(self, text: str, /) -> object:
        """Take some text, cut anywhere."""

    def flush(self) -> object:
        """Show it now."""


class Echo:
    """Repeats what rank 0 writes from now on, while somebody waits.

    Args:
        stream: None repeats nothing.
    """

    def __init__(self, run: RunFolder, stream: Stream | None) -> None:
        self._run = run
        self._stream = stream
        self._shown = run.log(0).stat().st_size if run.log(0).exists() else 0

    def show(self) -> None:
        """Repeat what is new."""
        if self._stream is None or not self._run.log(0).exists():
            return
        with self._run.log(0).open("rb") as log:
            log.seek(self._shown)
            text = log.read()
        # A failing rank 0 writes its error before its traceback; another rank may be the one to blame.
        if text and not self._run.error(0).is_file():
            self._shown += len(text)
            self._stream.write(text.decode(errors="replace"))
            self._stream.flush()


@contextlib.contextmanager
def signals_passed_on(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C, a closed terminal and a scheduler's signals become a request to save and stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
