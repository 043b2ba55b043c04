"""Numbered things made by worker processes and handed over in order, whatever the number of workers."""

import ctypes
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from cluster.errors import UserError

# Batches that torch lets each worker run ahead.
_PREFETCH = 2
# Where torch puts what workers share.
_SHARED_MEMORY = Path("/dev/shm")
# glibc's mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


class Pinnable(Protocol):
    """A value that can move itself to page-locked memory."""

    def pin_memory(self) -> Self: ...


T = TypeVar("T", bound=Pinnable)


def numbered(
    make: Callable[[int], T], first: int, *, workers: int, pin_memory: bool, shared_bytes: int
) -> Iterator[T]:
    """make(first), make(first + 1), … without end.

    Args:
        make: must be picklable and depend on its argument alone.
        workers: processes; each makes every workers-th value. 0 makes them here, when they are asked for.
        pin_memory: move the values to page-locked memory, for copies to a GPU.
        shared_bytes: size of one value's tensors.

    Raises:
        UserError: from `make`, in whichever process; or if shared memory cannot hold what the workers make.
    """
    if workers == 0:
        for number in itertools.count(first):
            yield make(number).pin_memory() if pin_memory else make(number)
    _refuse_little_shared_memory(shared_bytes * (_PREFETCH * workers + 1), workers)
    loaded: Any = DataLoader(
        cast(Any, _Numbered(make)),
        batch_size=None,
        sampler=itertools.count(first),
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        multiprocessing_context=start_fork_server(),
        worker_init_fn=_prepare_worker,
    )
    for value in loaded:
        if isinstance(value, _Refusal):
            raise UserError(value.sentence)
        yield value


def start_fork_server() -> ForkServerContext:
    """Start the process that will fork the workers, unless it runs; call early, its imports take seconds.

    Forking this process could copy a lock that a thread of ours holds, and spawning would import torch once
    per worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.loader"])
    forkserver.ensure_running()
    return context


class _Refusal:
    """A UserError on its way out of a worker; torch would bury the sentence in a traceback."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def pin_memory(self) -> Self:
        return self


class _Numbered(Generic[T]):
    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> T | _Refusal:
        try:
            return self._make(number)
        except UserError as error:
            return _Refusal(str(error))


def _unchanged(value: T) -> T:
    return value


def _prepare_worker(_: int) -> None:
    # Preemption and interruption are the trainer's to handle; it still needs batches until it stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # The fork server outlives a killed trainer while workers live, so that torch's own check sees no change.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def keep_freed_memory() -> None:
    """Let malloc keep what images free: page faults of fresh memory cost up to half of a decode."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def _refuse_little_shared_memory(needed: int, workers: int) -> None:
    """Too little of it would kill a worker with a bus error, later and without a word."""
    if not _SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{workers} workers need {needed >> 20} MiB of shared memory and {_SHARED_MEMORY} has "
            f"{free >> 20} MiB: use fewer run.workers (0 needs none), smaller batches per rank, or more "
            "shared memory (docker run --shm-size)"
        )
