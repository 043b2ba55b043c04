"""What one rank of a preflight has found so far, on disk after every check.

The file is what is left of a rank that dies: the checks it finished name the one it was in.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.json_rows import lines_from_end, parse_row
from cluster.rank.preempt import STOP_SIGNALS

REPORTS = "rank-*.jsonl"
WHOLE_SECONDS = 90.0  # for all checks of one rank
CLOSING_SECONDS = 10.0  # to leave the process groups
SIGN_IN_SECONDS = 20.0  # for ranks that start later than the first one
WATCH_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        name: as people read it.
        seconds: the longest it may take on a rank.
        together: it needs other ranks, so that one that does not end says nothing about the rank's own node.
    """

    name: str
    seconds: float
    together: bool = False


# A check of the rank's own is given less time than one that waits for peers: a rank that hangs must be over
# its limit, and say so, before the others are over theirs.
CHECKS = (
    Check(name="signing in", seconds=SIGN_IN_SECONDS + 10),
    Check(name="devices", seconds=20),
    Check(name="loading torch", seconds=40),  # some GB of small files, from a shared file system at worst
    Check(name="matmul", seconds=20),
    Check(name="disk", seconds=20),
    Check(name="writing to the shared folder", seconds=20),
    Check(name="joining", seconds=50, together=True),
    Check(name="reading the shared folder", seconds=20),
    Check(name="clock", seconds=40, together=True),
    Check(name="all-reduce in the node", seconds=40, together=True),
    Check(name="links", seconds=40, together=True),
    Check(name="all-reduce across nodes", seconds=40, together=True),
)


class Devices(BaseModel):
    """What a rank computes on.

    Attributes:
        expected, found: GPUs of the node.
        name: of this rank's device.
        free: share of the device's memory that nobody uses; of the machine's on the CPU.
        free_gib: the same in GiB.
        cores: that this rank may run on.
        faults: what nvidia-smi says is broken, on any GPU of the node; only the first rank of a node asks.
    """

    model_config = ConfigDict(frozen=True)

    expected: int
    found: int
    name: str
    free: float
    free_gib: float
    cores: int
    faults: tuple[str, ...] = ()


class Disk(BaseModel):
    """Free space in GiB: where the run is written, in the node's own temporary folder, in shared memory."""

    model_config = ConfigDict(frozen=True)

    run_gib: float
    temporary_gib: float
    shared_memory_gib: float


class Report(BaseModel):
    """All that one rank has found. What it has not come to is None or empty.

    Attributes:
        rank, node: who reports.
        start: which start of the job this is; one that SLURM starts again leaves reports of the start before.
        nodelist: SLURM's short form of all nodes, for the names of those that never report.
        done: checks that ended, in order.
        ended: how the rank ended: stopped by somebody, by its own clock, by an error; None: it has not, or it
            could not say so.
        error: in which words.
        interface: of the network, by which the ranks' host-side messages go; empty if that is left to gloo.
        tflops: matmul rate.
        unseen: nodes whose file in the shared folder did not show up, or has other bytes.
        shared_seconds: until the last of them was there.
        clock_offset: seconds that this node's clock is ahead of rank 0's.
        node_gb_per_s, across_gb_per_s: bus bandwidth of an all-reduce in the node, across nodes.
        links: GB/s of an exchange with each neighbour, by node.
    """

    rank: int
    node: str
    start: int = 0
    nodelist: str = ""
    done: list[str] = []
    ended: Literal["finished", "failed", "overdue", "stopped"] | None = None
    error: str = ""
    devices: Devices | None = None
    interface: str = ""
    tflops: float | None = None
    disk: Disk | None = None
    unseen: list[str] = []
    shared_seconds: float | None = None
    clock_offset: float | None = None
    node_gb_per_s: float | None = None
    links: dict[str, float] = {}
    across_gb_per_s: float | None = None

    @property
    def current(self) -> Check:
        """The check that comes after those that are done."""
        return CHECKS[min(len(self.done), len(CHECKS) - 1)]


def read_reports(folder: Path) -> list[Report]:
    """The reports of the job's last start, by rank: of each the last row that is whole."""
    reports = []
    for path in folder.glob(REPORTS):
        with contextlib.suppress(OSError, StopIteration, ValidationError):
            rows = (parse_row(line) for _, line in lines_from_end(path))
            reports.append(Report.model_validate(next(row for row in rows if row is not None)))
    last = max((report.start for report in reports), default=0)
    return sorted((r for r in reports if r.start == last), key=lambda report: report.rank)


class Reporter:
    """Writes a rank's report after every check, and ends the rank when one takes too long.

    A thread does the latter: a rank that waits for a broken link or a dead file system cannot. It also writes
    down that the rank was asked to end, which happens to all once one of them has died.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self.report = report
        self._path = folder / f"rank-{report.rank}.jsonl"
        self._deadline = time.monotonic() + WHOLE_SECONDS
        self._limit = self._deadline
        self._lock = threading.Lock()
        self._left = threading.Event()

    def __enter__(self) -> Self:
        self.write()
        self._signals, self._written_by_signals = os.pipe()
        os.set_blocking(self._written_by_signals, False)
        # Python's own handlers wait for the main thread, which may be deep in a collective.
        self._previous = {number: signal.signal(number, _leave_to_the_thread) for number in STOP_SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._written_by_signals, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._signals)
        os.close(self._written_by_signals)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Report]:
        """One check: its time limit, and its end written down."""
        if self.report.current.name != name:
            raise ValueError(f"{name!r} is not the check that comes after {self.report.done}")
        self._limit = min(time.monotonic() + self.report.current.seconds, self._deadline)
        try:
            yield self.report
        except Exception as error:
            self._end("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            self._limit = time.monotonic() + CLOSING_SECONDS
            raise
        self.report.done.append(name)
        self.write()

    def finish(self) -> None:
        """All checks are done."""
        self._end("finished", "")
        self._limit = time.monotonic() + CLOSING_SECONDS

    def sign_in(self, ranks: int) -> None:
        """Wait until all have reported for the first time, or could have. When a rank dies in a check, the
        launcher ends the others: one that had no time to report would look like one that cannot.
        """
        with self.check("signing in"):
            deadline, pause = time.monotonic() + SIGN_IN_SECONDS, 0.1
            while len(list(self._path.parent.glob(REPORTS))) < ranks and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(2.0, 1.3 * pause)  # hundreds of ranks list hundreds of names each time

    def write(self) -> None:
        """Put the report where others see it, as one more row: hundreds of ranks have one file each.

        A rank that was asked to end has a few seconds for its last words: it does not wait for a disk.
        """
        with self._lock, self._path.open("a") as file:
            file.write(self.report.model_dump_json() + "\n")

    def _end(self, how: Literal["finished", "failed", "overdue", "stopped"], error: str) -> None:
        if self.report.ended is None:
            self.report.ended, self.report.error = how, error
            self.write()

    def _watch(self) -> None:
        while not self._left.is_set():
            readable, _, _ = select.select([self._signals], [], [], WATCH_SECONDS)
            numbers = os.read(self._signals, 64) if readable else b""
            if any(number in STOP_SIGNALS for number in numbers):
                self._exit("stopped", "asked to end")
            elif time.monotonic() > self._limit:
                self._exit("overdue", f"did not end in {self._seconds():.0f} s")

    def _seconds(self) -> float:
        whole = self._limit >= self._deadline
        return WHOLE_SECONDS if whole else self.report.current.seconds

    def _exit(self, how: Literal["overdue", "stopped"], error: str) -> None:
        # In a thread: the file system may be what hangs.
        writing = threading.Thread(target=self._end, args=(how, error), daemon=True)
        writing.start()
        writing.join(5)
        os._exit(0 if self.report.ended == "finished" else 2)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor has told the thread already."""
