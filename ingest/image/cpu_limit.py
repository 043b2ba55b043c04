"""An end to a picture that takes the processor for too long: the fence behind those that count."""

import signal
import threading
import time
from types import FrameType
from typing import ClassVar, Self


class CpuLimit:
    """A context in which an error is raised once the main thread has computed for so long.

    CPU time, not the clock: a machine that is busy, or stopped for a while, fails no good picture. The error
    comes between two steps of Python: a call into a decoder ends first. Nothing is limited in another thread,
    nor where somebody else listens to the signal.
    """

    # Signals are a process's: one limit at a time, and a handler that stays, for it costs more than a timer.
    _running: ClassVar["CpuLimit | None"] = None

    def __init__(self, seconds: float, error: Exception) -> None:
        self._seconds, self._error, self._ends = seconds, error, 0.0

    def __enter__(self) -> Self:
        if threading.get_ident() == threading.main_thread().ident and _is_ours():
            self._ends = time.thread_time() + self._seconds
            CpuLimit._running = self
            # Again and again: what is raised may be passed over, and other threads' time is counted, too.
            signal.setitimer(signal.ITIMER_PROF, self._seconds, 1.0)
        return self

    def __exit__(self, *_: object) -> None:
        if CpuLimit._running is self:
            CpuLimit._running = None
            signal.setitimer(signal.ITIMER_PROF, 0)

    @staticmethod
    def expire(number: int, frame: FrameType | None) -> None:
        """What the signal does."""
        limit = CpuLimit._running
        if limit is not None and time.thread_time() >= limit._ends:
            raise limit._error


def _is_ours() -> bool:
    handler = signal.getsignal(signal.SIGPROF)
    if handler is signal.SIG_DFL:
        signal.signal(signal.SIGPROF, CpuLimit.expire)
    return handler in (signal.SIG_DFL, CpuLimit.expire)
