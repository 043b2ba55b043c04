"""The sample that each worker has in hand, noted where the trainer can read it when the worker is gone.

A decoder may crash, or be killed for the memory that a picture takes. What it held then is known, and no
picture is worth a training: another takes its place, as of any that cannot be used.
"""

import os
from typing import Any, Self

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
        # For each worker its process id, unit index and row.
        self._notes = torch.full((workers, 3), _NOTHING)
        self._notes.share_memory_()  # type: ignore[no-untyped-call]
        self._own: memoryview | None = None  # this process's, if it is a worker

    def holding(self, place: Place) -> Self:
        """A context in which a sample is decoded.

        Raises:
            BadSampleError: workers have died of it.
        """
        if place in self.deadly:
            raise BadSampleError("the process that decodes it dies")
        if self._own is None:
            worker = get_worker_info()
            if worker is None:
                return self
            notes: Any = self._notes.numpy()
            self._own = memoryview(notes[worker.id])
            self._own[0] = os.getpid()
        self._own[1], self._own[2] = place
        return self

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own[2] = _NOTHING

    def left_by(self, process: int) -> Place | None:
        """What a process that is gone had in hand; None if nothing."""
        for pid, unit_index, row in self._notes.tolist():
            if pid == process and row != _NOTHING:
                return unit_index, row
        return None
