"""Independent tasks in processes of this machine."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from cluster.errors import UserError
from cluster.map.tasks import MapTasks, R, T


@contextmanager
def processes(workers: int) -> Iterator[MapTasks]:
    """A pool of so many processes; with one worker, this process does the work."""
    if workers == 1:
        yield _one_by_one
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process that has threads may hang
        initializer=signal.signal,  # Ctrl-C is for this process, which then ends its workers
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:

        def spread(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
            return pool.map(function, tasks)

        yield spread
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside, perhaps for want of memory: run the same command "
            "again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
    return map(function, tasks)
