"""Numbered things made by worker processes and handed over in order, whatever the number of workers."""

import contextlib
import ctypes
import itertools
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from cluster import main_script
from cluster.errors import UserError
from cluster.output_trouble import refusal
from pipeline.data.in_hand import InHand, Place
from pipeline.data.shared_memory import Buffers, Parcel

# Batches that torch lets each worker run ahead.
PREFETCH = 2
# Keys and parameters travel beside the pixels.
_ROOM_FOR_SMALL_TENSORS = 1 << 20
# Preemption and interruption are the trainer's to handle: it needs batches until it stops. The fork server
# and the workers inherit the mask, so that there is no moment without it.
_TRAINERS_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}
# How torch names workers that are gone.
_GONE = re.compile(r"\(pid(?:\(s\))? ([\d, ]+)\)")
_CRASHES = [-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE]
# So many deaths between two values are no picture's fault.
_MOST_DEATHS = 10
# What one picture within the limits takes is a third of it.
_MEMORY_TO_DECODE = 4 << 30
# Where torch puts what workers share.
_SHARED_MEMORY = Path("/dev/shm")
# glibc's mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


class Pinnable(Protocol):
    """A value that can move itself to page-locked memory."""

    def pin_memory(self) -> Self: ...


T = TypeVar("T", bound=Pinnable)
T_co = TypeVar("T_co", bound=Pinnable, covariant=True)
logger = logging.getLogger(__name__)


class Makes(Protocol[T_co]):
    """Makes values by number. It is picklable, and what it makes depends on the number alone."""

    def __call__(self, number: int, /) -> T_co: ...

    def noting(self, in_hand: InHand) -> Self:
        """The same values, of samples that are noted while they are decoded."""
        ...


def numbered(
    make: Makes[T],
    first: int,
    *,
    workers: int,
    pin_memory: bool,
    shared_bytes: int,
    held: int = 1,
) -> Iterator[T]:
    """make(first), make(first + 1), … without end.

    Args:
        make: see there. A sample that workers die of is left to it to replace.
        workers: processes; each makes every workers-th value. 0 makes them here, when they are asked for.
        pin_memory: move the values to page-locked memory, for copies to a GPU.
        shared_bytes: size of one value's large tensors.
        held: values that the caller keeps while it asks for another; more are right too, and slower.

    Raises:
        UserError: from `make`, in whichever process; or if shared memory cannot hold what the workers make.
        RuntimeError: workers die, and not of single samples.
    """
    if workers == 0:
        for number in itertools.count(first):
            yield make(number).pin_memory() if pin_memory else make(number)
    if pin_memory:
        held = 0  # the caller keeps copies in page-locked memory
    suspects: set[Place] = set()
    in_hand, deaths = InHand(workers), 0
    while True:
        made = _by_workers(make.noting(in_hand), first, workers=workers, shared_bytes=shared_bytes, held=held)
        try:
            with contextlib.closing(made):
                for value in made:
                    first, deaths = first + 1, 0
                    yield value.pin_memory() if pin_memory else value
                    del value
        except _WorkersDiedError as error:
            left = {
                place: code for process, code in error.codes.items() if (place := in_hand.left_by(process))
            }
            deaths += 1
            if not left or deaths > _MOST_DEATHS:
                raise error.cause from None
            # Unless it crashed, it may have been the machine's memory, or someone's kill; not a second time.
            deadly = {place for place, code in left.items() if place in suspects or code in _CRASHES}
            in_hand = InHand(workers, in_hand.deadly | deadly)
            suspects |= left.keys()
            logger.warning("%s: its batch is made again", error.cause)


class _WorkersDiedError(Exception):
    """Codes are exit codes, by process id."""

    def __init__(self, cause: RuntimeError, codes: dict[int, int | None]) -> None:
        super().__init__(str(cause))
        self.cause, self.codes = cause, codes


def _by_workers(make: Makes[T], first: int, *, workers: int, shared_bytes: int, held: int) -> Generator[T]:
    """The values of one set of workers, until one of them dies."""
    # As many as can be on their way, those that are held, and the one that is handed over.
    count, size = PREFETCH * workers + held + 1, shared_bytes + _ROOM_FOR_SMALL_TENSORS
    _refuse_little_shared_memory(count * size, workers)
    buffers = Buffers(count=count, size=size)
    free = deque(range(count))
    loaded: Any = DataLoader(
        cast(Any, _Numbered(make, buffers)),
        batch_size=None,
        sampler=_tickets(first, free),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_unchanged,
        multiprocessing_context=start_fork_server(),
        worker_init_fn=partial(_prepare_worker, _MEMORY_TO_DECODE + 4 * size),
    )
    # What is defined in a script (a benchmark's) is found there only.
    with contextlib.nullcontext() if type(make).__module__ == "__main__" else main_script.left_out():
        answers = iter(loaded)
    processes = {process.pid: process for process in multiprocessing.active_children()}
    while True:
        try:
            answer = next(answers)
        except RuntimeError as error:
            if gone := _GONE.search(str(error)):
                pids = [int(pid) for pid in gone[1].split(",")]
                raise _WorkersDiedError(error, {pid: processes[pid].exitcode for pid in pids}) from None
            raise
        if isinstance(answer, _Refusal):
            raise UserError(answer.sentence)
        value: T = buffers.unpack(answer, free) if isinstance(answer, Parcel) else answer
        yield value
        del answer, value  # the buffer goes back as soon as the caller has done with it


def _tickets(first: int, free: deque[int]) -> Iterator[tuple[int, int | None]]:
    """Numbers, each with the buffer that its value shall come in, if one is free."""
    for number in itertools.count(first):
        yield number, free.popleft() if free else None


def start_fork_server() -> ForkServerContext:
    """Start the process that will fork the workers, unless it runs; call early, its imports take seconds.

    Forking this process could copy a lock that a thread of ours holds, and spawning would import torch once
    per worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.fork_server"])
    # Its own helper first, for that unblocks signals.
    resource_tracker.ensure_running()
    with trainers_signals_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def trainers_signals_blocked() -> Iterator[None]:
    """Processes that are started meanwhile never hear the signals that are the trainer's to handle."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class _Refusal:
    """A UserError on its way out of a worker; torch would bury the sentence in a traceback."""

    sentence: str


class _Numbered(Generic[T]):
    def __init__(self, make: Callable[[int], T], buffers: Buffers) -> None:
        self._make, self._buffers = make, buffers

    def __getitem__(self, ticket: tuple[int, int | None]) -> T | Parcel | _Refusal:
        number, slot = ticket
        try:
            value = self._make(number)
        except UserError as error:
            return _Refusal(str(error))
        except PermissionError as error:
            return _Refusal(str(refusal(error)))
        return value if slot is None else self._buffers.pack(value, slot)


def _unchanged(value: Any) -> Any:
    return value


def _prepare_worker(memory: int, _: int) -> None:
    _limit_memory(memory)
    signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    torch.set_num_threads(1)
    keep_freed_memory()
    for wait in (_die_with_trainer, _obey_trainer):
        threading.Thread(target=wait, daemon=True).start()


def _die_with_trainer() -> None:
    # The fork server outlives a killed trainer while workers live, so that torch's own check sees no change.
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _obey_trainer() -> None:
    """End on a SIGTERM of the trainer, who sends one when it exits, but on no one else's."""
    trainer = multiprocessing.parent_process()
    while trainer is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == trainer.pid:
            os._exit(0)


def _limit_memory(extra: int) -> None:
    """Bound what this process has for itself to what it has now and `extra` bytes; shared memory is apart."""
    try:
        found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return
    if found is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = (int(found[1]) << 10) + extra
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))


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
