"""The sample that each worker has in hand, noted where the trainer can read it when the worker is gone.

A decoder may crash, or be killed for the memory that a picture takes. What it held then is known, and no
picture is worth a training: another takes its place, as of any that cannot be used.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.utils.data import get_worker_info

from pipeline.data.reader import BadSampleError

Place = tuple[int, int]
_NOTHING = -1


class InHand:
    """Notes of some workers; goes with what they make to each of them.

    Attributes:
        deadly: (unit index, row) of samples that workers have died of.
    """

    def __init__(self, workers: int, deadly: frozenset[Place] = frozenset()) -> None:
        self.deadly = deadly
        # For each its process id, unit index and row.
        self._notes = torch.full((workers, 3), _NOTHING)
        self._notes.share_memory_()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def holding(self, place: Place) -> Iterator[None]:
        """While a sample is decoded.

        Raises:
            BadSampleError: workers have died of it.
        """
        if place in self.deadly:
            raise BadSampleError("the process that decodes it dies")
        worker = get_worker_info()
        if worker is None:
            yield
            return
        note = self._notes[worker.id].numpy()
        note[:] = os.getpid(), *place
        try:
            yield
        finally:
            note[1:] = _NOTHING

    def left_by(self, process: int) -> Place | None:
        """What a process that is gone had in hand; None if nothing."""
        for pid, unit_index, row in self._notes.tolist():
            if pid == process and row != _NOTHING:
                return unit_index, row
        return None
