"""A function over many tasks, in processes of this machine or on Ray; on SLURM, see `cluster.map.on_slurm`.

What is mapped are functions of modules, of and into plain values, that leave larger results in files: any
executor that calls them all and keeps the answers in order will do. Other machines take JSON values only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class MapTasks(Protocol):
    """Calls a function with each task; the answers come in the order of the tasks."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]: ...
