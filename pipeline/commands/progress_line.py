"""A run's log on a terminal: progress stays on one line, everything else scrolls by."""

from __future__ import annotations

import os
import re
import shutil
from typing import TextIO

_STEP = re.compile(r"^(?P<stage>\w+ \| )?.* step (?P<done>\d+)/(?P<total>\d+)  (?P<rest>.*)")
_BAR = 24


class ProgressLine:
    """Stands between a log and a terminal; on anything else than a terminal it changes nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._cut = ""  # the beginning of a line whose end has not come yet
        self._drawn = False

    def write(self, text: str) -> None:
        """Some text of the log, cut anywhere."""
        if not self._terminal:
            self._put(text)
            return
        *lines, self._cut = (self._cut + text).split("\n")
        for line in lines:
            self._line(line)

    def flush(self) -> None:
        """Show it now."""
        self._put("", flush=True)

    def close(self) -> None:
        """Leave the last progress where it is and go on below."""
        if self._cut:
            self._line(self._cut)
        if self._drawn:
            self._put("\n")
        self._cut, self._drawn = "", False
        self.flush()

    def _line(self, line: str) -> None:
        found = _STEP.search(line)
        clear = "\r\x1b[K" if self._drawn else ""
        if found is None:
            self._put(f"{clear}{line}\n")
        else:
            done, total = int(found["done"]), int(found["total"])
            filled = _BAR * done // total
            stage = found["stage"] or ""
            drawn = f"{stage}{'━' * filled}{'·' * (_BAR - filled)} {done}/{total}  {found['rest']}"
            # A line that wraps cannot be drawn over.
            self._put(clear + drawn[: shutil.get_terminal_size().columns - 1])
        self._drawn = found is not None

    def _put(self, text: str, *, flush: bool = False) -> None:
        try:
            self._stream.write(text)
            if flush:
                self._stream.flush()
        except BrokenPipeError:
            # Who looked on has gone (`| head`); the run has not. What is in the buffer goes nowhere, too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class StageLines:
    """The output of one of several stages: whole lines, with the stage's name before each."""

    def __init__(self, stage: str, stream: ProgressLine) -> None:
        self._stage, self._stream = stage, stream
        self._cut = ""

    def write(self, text: str) -> None:
        """Some text of the log, cut anywhere."""
        *lines, self._cut = (self._cut + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._stage} | {line}\n")

    def flush(self) -> None:
        """Show what is whole."""
        self._stream.flush()
