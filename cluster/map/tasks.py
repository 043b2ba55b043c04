"""A function over many tasks, in processes of this machine or on Ray; on SLURM, see `cluster.map.on_slurm`.

What is mapped are functions of modules, of and into plain values, that leave larger results in files: any
executor that calls them all and keeps the answers in order will do. Other machines take JSON values only.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from cluster.errors import UserError
from cluster.site import Site

T = TypeVar("T")
R = TypeVar("R")
_RAY_RETRIES = 20


class MapTasks(Protocol):
    """Calls a function with each task; the answers come in the order of the tasks."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]: ...


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


def on_ray(site: Site, *, parts: int) -> MapTasks:
    """A Ray cluster: the site's, RAY_ADDRESS's, a SLURM allocation's, or one started here.

    A task whose worker or node is lost is done again.

    Args:
        parts: tasks at a time, on a core each.
    """
    from cluster.ray.executor import RayExecutor

    executor = RayExecutor(site.ray_address, site=site)

    def spread(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        early: dict[int, Any] = {}
        following = 0
        for index, answer in executor.map(
            import_name(function), tasks, in_flight=parts, retries=_RAY_RETRIES, cpus=1
        ):
            early[index] = answer
            while following in early:
                yield early.pop(following)
                following += 1

    return spread


def import_name(function: Callable[..., Any]) -> str:
    """By which another machine imports it."""
    return f"{function.__module__}:{function.__name__}"


def _one_by_one(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
    return map(function, tasks)
