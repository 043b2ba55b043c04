"""The largest memory that a tree of processes takes together, sampled."""

import threading
from typing import Literal

import psutil


class PeakMemory:
    """Samples a process and all below it as long as the context lasts.

    Args:
        process: the root of the tree; None for this process.
        kind: "pss", in which shared pages count once, or "rss", which is quicker to read and counts more.
        every: seconds between samples.

    Attributes:
        peak: bytes.
    """

    def __init__(
        self, process: int | None = None, *, kind: Literal["pss", "rss"] = "pss", every: float = 0.01
    ) -> None:
        self.peak = 0
        self._root = psutil.Process(process)
        self._kind = kind
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(self._size, tree)))

    def _size(self, process: psutil.Process) -> int:
        try:
            if self._kind == "rss":
                return int(process.memory_info().rss)
            return int(process.memory_full_info().pss)
        except psutil.Error:
            return 0  # it has just ended
