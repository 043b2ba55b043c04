"""Independent tasks in processes of this machine."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from cluster import main_script
from cluster.errors import UserError
from cluster.map.tasks import MapTasks, R, T

# Tasks given out, for each process, before the first of them is answered: one that takes long holds up no
# other, and what the others leave in files stays bounded.
AHEAD = 4


@contextmanager
def processes(workers: int) -> Iterator[MapTasks]:
    """A pool of so many processes; with one worker, this process does the work."""
    if workers == 1:
        yield one_by_one
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process that has threads may hang
        initializer=signal.signal,  # Ctrl-C is for this process, which then ends its workers
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:

        def map_tasks(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
            waiting: deque[Future[R]] = deque()
            for task in tasks:
                with main_script.left_out():
                    waiting.append(pool.submit(function, task))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield map_tasks
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside, perhaps for want of memory: run the same command "
            "again, with fewer --workers"
        ) from None
    except BaseException:  # Ctrl-C, too: what they are at is wanted no more
        for worker in list((pool._processes or {}).values()):
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def one_by_one(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
    """Tasks in this process."""
    return map(function, tasks)
