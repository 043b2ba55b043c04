"""Ranks that hold the others up. Collectives make the steps of all ranks equally long: a slow one shows only
in what it does alone. That is waiting for data and augmenting it on its device; on a CPU all the time of a
step in which its thread computes, or waits for a core: whoever waits for other ranks sleeps, under every
strategy.

What a rank sleeps for by itself is not seen there, such as memory that is swapped out.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.rank.torch_dist import World

logger = logging.getLogger(__name__)

SLOW = 1.2  # times the median
INTERVALS = 3  # in a row: one slow read of a shared file system is no straggler
MATERIAL_SECONDS, MATERIAL_SHARE = 1e-3, 0.005
NOISE_ON_CPU = 0.1  # seconds of a step, which other work of its core may take


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of one rank per optimizer step, averaged over a log interval.

    Attributes:
        step: the whole step, as long on every rank.
        waiting: for data.
        augmenting: on the device.
        on_cpu: computing, or waiting for a core; None on a device.
    """

    host: str
    step: float
    waiting: float
    augmenting: float
    on_cpu: float | None = None

    @property
    def alone(self) -> float:
        """What the rank does without the others."""
        return self.waiting + (self.augmenting if self.on_cpu is None else self.on_cpu)


def slow_ranks(paces: Sequence[Pace]) -> dict[int, str]:
    """The ranks that are slow in one log interval, each with the figures that say so.

    The slowest rank waits for nobody: what it does not do alone is the work that all share, shared = step -
    max(alone). By itself a rank would need shared + alone for a step. It is slow if

    - that is more than 1.2 times the median: its data comes late, or its augmentation takes long; or
    - its augmentation takes more than 1.2 times the median, and longer by more than a millisecond and 0.5 %
      of the step. Augmentation is the same work on every rank: a device that is slow at it, throttled or
      shared with another job, is slow at the shared work as well, where it cannot be seen. A millisecond is
      what launching some dozens of kernels varies by: augmentations that hardly matter are not compared by
      their noise.

    On a CPU everything varies with what else runs there: augmentations are not compared, and a slow rank is
    so by more than a tenth of a second.

    The lower median: of two ranks, the slow one must not pull up what it is measured by.
    """
    step = statistics.median_low(pace.step for pace in paces)
    shared = max(0.0, step - max(pace.alone for pace in paces))
    own = statistics.median_low(shared + pace.alone for pace in paces)
    augmenting = statistics.median_low(pace.augmenting for pace in paces)
    slow = {}
    for rank, pace in enumerate(paces):
        late, noise = shared + pace.alone - own, 0.0 if pace.on_cpu is None else NOISE_ON_CPU
        material = pace.augmenting - augmenting > max(MATERIAL_SECONDS, MATERIAL_SHARE * step)
        throttled = material and pace.augmenting > SLOW * augmenting and pace.on_cpu is None
        if late > max((SLOW - 1) * own, noise) or throttled:
            slow[rank] = (
                f"its own step takes {shared + pace.alone:.4g} s, the median rank's {own:.4g} s; "
                f"{pace.waiting:.4g} s it waits for data, {pace.augmenting:.4g} s it augments "
                f"(median {augmenting:.4g} s)"
            )
    return slow


class Stragglers:
    """Measures what this rank does alone, and names slow ranks in the first one's log.

    Args:
        world: the ranks that are compared.
        step: where they begin.
    """

    def __init__(self, world: World, *, step: int) -> None:
        self._world = world
        self.begin_at(step)
        self._seconds, self._computed = 0.0, 0.0
        self._on_cpu = world.device.type == "cpu"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin_at(self, step: int) -> None:
        """Compare from this step on, as if nothing had been slow before."""
        self._step = step
        self._in_a_row: dict[int, int] = {}

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around what all ranks do alike in a step, augmentation included."""
        before = _busy()
        yield
        self._computed += _busy() - before

    @contextlib.contextmanager
    def augmenting(self) -> Iterator[None]:
        """Around the augmentation of a batch. On a GPU by the GPU's own clock: nothing waits for it."""
        if not self._on_cpu:
            begin, end = _event(), _event()
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before

    def report(self, *, step: int, seconds: float, waiting: float) -> None:
        """Compare the ranks since the last report; called on all of them together.

        Args:
            step: steps done.
            seconds, waiting: per step, this rank's.
        """
        pace = Pace(
            host=socket.gethostname(),
            step=seconds,
            waiting=waiting,
            augmenting=self._lap() / (step - self._step),
            on_cpu=self._computed / (step - self._step) if self._on_cpu else None,
        )
        self._computed = 0.0
        self._step = step
        paces = self._world.gather(pace)
        slow = slow_ranks(paces)
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in slow}
        for rank, why in slow.items():
            times = self._in_a_row[rank]
            # After 3 intervals, 6, 12, 24, …: a log that somebody reads days later still shows it.
            if self._world.is_first and times % INTERVALS == 0 and (times // INTERVALS).bit_count() == 1:
                logger.warning(
                    "rank %d on %s is slow, for %d log intervals in a row up to step %d: %s",
                    rank,
                    paces[rank].host,
                    times,
                    step,
                    why,
                )

    def _lap(self) -> float:
        seconds = self._seconds
        for begin, end in self._events:
            end.synchronize()  # long done: every step ends with a look at its loss
            seconds += begin.elapsed_time(end) / 1e3
        self._seconds = 0.0
        self._events.clear()
        return seconds


def _busy() -> float:
    """Seconds in which this thread has computed, or could have, but for others on its core."""
    held_up = 0.0
    with contextlib.suppress(OSError, IndexError):  # some kernels do not count it
        held_up = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.thread_time() + held_up


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
