"""Being asked to stop: signals only set a flag, which the work looks at when it can stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol, Self

from cluster.run.folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SECONDS_BETWEEN_LOOKS = 5.0


class Preempted(Exception):  # noqa: N818 -- not an error
    """The work has saved where it is and ends early; its rank exits with status 85."""


class PreemptionFlag:
    """Within its `with` block, SIGTERM and SIGUSR2 set `requested` and do nothing else.

    A signal may be lost: SLURM passes none on to a step that is suspended, or just being resumed, and says
    nothing of it. So the first rank also looks, now and then, for a request to cancel in the run folder.

    Entered by the work itself, hence after any handler that a launcher has installed in the process.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._heard = False
        self._looks = os.environ.get("RANK", "0") == "0"
        self._next_look = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank knows that the work is to stop."""
        if self._looks and not self._heard and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            with contextlib.suppress(OSError):  # a disk that does not answer now is asked again
                self._heard = self._run.cancel_requested()
        return self._heard

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._heard = True


def time_is_short(needed: float) -> bool:
    """Whether the job's time is over in less than so many seconds, where it has an end that is known."""
    ends = os.environ.get("SUBMIT_ENDS", "")
    return ends.isdecimal() and time.time() + needed > int(ends)


class Ranks(Protocol):
    """All ranks of a job, as one of them sees them."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes for all."""

    def barrier(self) -> None:
        """Wait for all ranks."""


def end_preempted(ranks: Ranks, run: RunFolder, message: str) -> NoReturn:
    """All ranks have saved: end together, to be started again. Called on all of them.

    The mark is made between two barriers: a rank that crashed never reaches the first one, so that its end
    is not taken for a wish; and once the first rank has left, a launcher may kill the others.
    """
    ranks.barrier()
    if ranks.is_first:
        run.mark_requeue()
    ranks.barrier()
    raise Preempted(message)
