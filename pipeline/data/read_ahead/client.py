"""A rank's side of the read-ahead: the process, if it is its node's first, and packs for its workers."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from ingest.dataset.open import Dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.cache import HandedOver, make_place, place_of
from pipeline.data.read_ahead.demand import Demand
from pipeline.data.read_ahead.packs import Packs
from pipeline.data.read_ahead.program import Assignment
from pipeline.data.read_ahead.requests import IN_FLIGHT
from pipeline.data.workers import PREFETCH, trainers_signals_blocked

_END_SECONDS = 5.0


T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A rank among those of its node.

    Args:
        name: of the node in this start of the run, the same for all its ranks and for nothing else.
        ranks: of the whole run, those of this node.
        number: which of them this one is.
    """

    name: str
    ranks: tuple[int, ...]
    number: int

    @classmethod
    def alone(cls, rank: int = 0) -> Node:
        """Of a rank without others on its node."""
        return cls(secrets.token_hex(8), (rank,), 0)


class ReadAhead:
    """What a rank's main process has of the read-ahead, of which its node's first rank starts the process.

    Of a dataset in folders nothing is read ahead, and there are no packs.

    Args:
        cache: where packs, windows and what is known of units are kept, and how much.
        use: how often the node has read ahead before in this start of the run.
        first: the step that the ranks begin with.
        workers: of each rank.

    Attributes:
        packs: for the workers; None if they read for themselves.
    """

    def __init__(
        self,
        dataset: Dataset,
        demand: Demand,
        *,
        workers: int,
        cache: CachePlace | None = None,
        node: Node | None = None,
        use: int = 0,
        first: int = 0,
    ) -> None:
        cache, node = cache or CachePlace(), node or Node.alone()
        self.packs: Packs | None = None
        self._number = node.number
        self._handed_over: HandedOver | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        if len(dataset) == 0 or dataset.shard_is_local(0):
            return
        name = f"{node.name}-{use}"
        self.packs = Packs(place_of(cache, name), node.number)
        if node.number == 0:
            place, room, alive = make_place(cache, name, ranks=len(node.ranks), first=first)
            rows = max(1, sum(len(units) for units, _ in demand.places(first) or []))
            # So many that requests are in flight all the time, besides the steps that workers are busy with.
            depth = PREFETCH * workers + 2 + -(-4 * IN_FLIGHT // rows)
            self._process, self._pipe = _start(alive)
            with contextlib.suppress(BrokenPipeError):  # its death will be seen by whoever waits for a pack
                self._pipe.send(Assignment(dataset, demand, cache, first, depth, place, room))

    def follow(self, values: Iterator[T], first: int = 0) -> Generator[T]:
        """Values that workers have made of packs, step by step from `first` on; then the process ends."""
        try:
            for step, value in enumerate(values, first):
                self._hand_over(step)
                yield value
        finally:
            self.close()

    def _hand_over(self, step: int) -> None:
        """This rank's value of a step is made, and those before: their packs may go."""
        if self.packs is None:
            return
        with contextlib.suppress(FileNotFoundError):  # the node's first rank has ended before
            if self._handed_over is None:
                self._handed_over = HandedOver(self.packs.place)
            self._handed_over[self._number] = step + 1

    def close(self) -> None:
        """End the process, and remove what it has left."""
        if self._process is None or self._pipe is None or self.packs is None:
            return
        self._pipe.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.packs.place, ignore_errors=True)
        self._process = self._pipe = None


def _start(alive: int) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start the process, which takes the lock over; it lives until the pipe to it is closed.

    A new process, for the library that reads object stores has threads that do not survive a fork; in a
    session of its own, for it shall outlast Ctrl-C: the rank needs batches until it stops.
    """
    receiver, sender = Pipe(duplex=False)
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    with trainers_signals_blocked():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.data.read_ahead"],
            stdin=receiver.fileno(),
            stdout=subprocess.DEVNULL,
            pass_fds=(alive,),
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
    receiver.close()
    os.close(alive)
    return process, sender
