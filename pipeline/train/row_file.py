"""Files of rows that a training writes beside itself, and that never end it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.atomic_file import replacing
from cluster.json_rows import lines_from_end, parse_row

logger = logging.getLogger(__name__)

HELD = 100_000  # rows, while there is no room on the disk


class RowFile:
    """A file of JSON rows in the order of their steps, opened to go on after one of them.

    What cannot be written now is held, and written with the rows after it. It may be used by several threads.

    Args:
        path: rows after `step` are forgotten, and a last line that was cut short.
        step: the step of the checkpoint that the run goes on from.
        every: steps between two rows; if more than one row is missing before `step`, that is said. None for
            rows that have no rhythm.
    """

    def __init__(self, path: Path, *, step: int, every: int | None = None) -> None:
        self.path = path
        last = _forget_after(path, step)
        if every is not None and step - last >= 2 * every:
            logger.warning(
                "%s ends at step %d, and the training is at step %d: rows are lost, unless no step between "
                "was accepted",
                path,
                last,
                step,
            )
        self._file = path.open("ab", buffering=0)
        self._end = os.fstat(self._file.fileno()).st_size
        self._held: deque[bytes] = deque()
        self._lost = 0
        self._lock = threading.Lock()
        self._in_trouble = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row, or hold it."""
        with self._lock:
            if len(self._held) == HELD:
                self._held.popleft()
                self._lost += 1
            self._held.append(json.dumps(row, allow_nan=False).encode() + b"\n")
            try:
                self._write_held()
            except OSError as error:
                if not self._in_trouble:
                    logger.warning(
                        "%s cannot be written (%s): its rows are held until it can", self.path, error
                    )
                self._in_trouble = True

    def sync(self) -> None:
        """Bring every row to the disk.

        Raises:
            OSError: if that is not possible now; the rows are kept.
        """
        with self._lock:
            self._write_held()
        os.fsync(self._file.fileno())  # it may take long, and the training writes meanwhile

    def close(self) -> None:
        """Write what is held, if that is possible, and close."""
        with self._lock:
            with contextlib.suppress(OSError):
                self._write_held()
            if self._held:
                logger.warning("%s lacks its last %d rows", self.path, len(self._held))
            self._file.close()

    def _write_held(self) -> None:
        rest = memoryview(b"".join(self._held))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            # Half a row would spoil the next one.
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += sum(map(len, self._held))
        self._held.clear()
        if self._in_trouble:
            lost = f"all rows but {self._lost}, which there was no room to hold" if self._lost else "all rows"
            logger.warning("%s can be written again, and has %s", self.path, lost)
            self._in_trouble, self._lost = False, 0


def _forget_after(path: Path, step: int) -> int:
    """Keep the rows up to a step; the step of the last of them, 0 if there is none.

    Steps never go down in it, so that its end alone is looked at. What is kept goes into a file of its own:
    a process of an earlier attempt that does not know yet that it was given up writes into the old one.
    """
    if not path.is_file():
        return 0
    # A line that a power cut has spoilt is none: what a checkpoint knows of is on the disk before it.
    steps = ((end, (parse_row(line) or {}).get("step", math.inf)) for end, line in lines_from_end(path))
    kept, last = next(((end, last) for end, last in steps if last <= step), (0, 0))
    with replacing(path) as copy:
        shutil.copyfile(path, copy)
        os.truncate(copy, kept)
    return int(last)
