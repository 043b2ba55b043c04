"""What a training shows in TensorBoard, and that never ends it."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)

HELD_ROWS = 10_000  # while there is no room on the disk; older ones are in metrics.jsonl


class TensorBoard:
    """Numbers by name and step. Those since the last flush are held: if one fails, they are written anew, to
    another file.

    Args:
        folder: of TensorBoard's files.
        step: the step of the checkpoint that the run goes on from: what was shown after it never happened.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        self._folder = folder
        self._held: deque[tuple[dict[str, float], int]] = deque(maxlen=HELD_ROWS)
        self._writer: SummaryWriter | None = None
        self._in_trouble = False
        self._try(lambda: self._open(step + 1))

    def add(self, numbers: dict[str, float], step: int) -> None:
        """Show a step's numbers, soon."""
        self._held.append((numbers, step))
        if self._writer is not None:
            writer = self._writer
            self._try(lambda: _write(writer, numbers, step))

    def flush(self) -> None:
        """Bring all to the disk, if that is possible now."""
        self._try(self._flush)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._drop()

    def _flush(self) -> None:
        writer = self._writer
        if writer is None:
            writer = self._open(self._held[0][1] if self._held else None)
            for held in self._held:
                _write(writer, *held)
        writer.flush()
        self._held.clear()
        if self._in_trouble:
            logger.warning("TensorBoard's files can be written again, with what was held")
            self._in_trouble = False

    def _open(self, purge_step: int | None) -> SummaryWriter:
        # Imported by the one rank that writes: it takes as long as a tenth of the rest together.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        return self._writer

    def _try(self, act: Callable[[], object]) -> None:
        """Trouble is said once, until it is over; the file that it befell is given up."""
        try:
            act()
        except OSError as error:
            if not self._in_trouble:
                logger.warning("TensorBoard's files cannot be written, until they can: %s", error)
            self._in_trouble = True
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        self._writer = None


def _write(writer: SummaryWriter, numbers: dict[str, float], step: int) -> None:
    """All in one: TensorBoard opens and closes its file for each event."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if writer.file_writer is not None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        writer.file_writer.add_summary(Summary(value=values), step)
