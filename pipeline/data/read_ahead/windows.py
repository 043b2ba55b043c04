"""Windows that fit the cache: read ahead of their steps in ranges of some MB, kept until they are over."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from pipeline.data.read_ahead.demand import Demand
from pipeline.data.read_ahead.index import Index
from pipeline.data.read_ahead.ranges import Range, coalesce
from pipeline.data.read_ahead.requests import Requests
from pipeline.data.read_ahead.room import CHUNK_BYTES

logger = logging.getLogger(__name__)

_LOADS_AT_ONCE = 32
_AGAIN_SECONDS = 30.0  # after the disk was full


@dataclass(eq=False)
class Chunk:
    """Rows `first` … `end` − 1 of a unit: bytes `start` … of its tar, at `place` of the file when loaded.

    `over` once no step will look for it any more.
    """

    first: int
    end: int
    unit: int
    window: int
    start: int
    size: int
    place: int
    loaded: asyncio.Future[bool]
    over: bool = False


class Windows:
    """The chunks of the windows in use, in one file of slots that are used again.

    Args:
        room: bytes of the file, at most; what it cannot hold of windows is read singly.
    """

    def __init__(self, demand: Demand, index: Index, requests: Requests, *, folder: Path, room: int) -> None:
        self._demand, self._index, self._requests = demand, index, requests
        self._file = os.open(folder / "chunks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._slots = list(range(room // CHUNK_BYTES))
        self._freed = asyncio.Condition()
        self._loading = asyncio.Semaphore(_LOADS_AT_ONCE)
        # By window and unit; of each its chunks by their first row, and these rows.
        self._chunks: dict[int, dict[int, tuple[list[int], list[Chunk]]]] = {}
        self._step = self._newest = 0

    async def run(self, first: int) -> None:
        """Load window after window, from those of step `first` on.

        Raises:
            UserError, OSError: the metadata of a unit is damaged or cannot be read.
        """
        self._step = self._newest = first
        window = self._demand.windows(first).start
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wait_for(window)
                if window >= self._demand.windows(self._step).start:
                    await self._load_window(group, window)
                window += 1

    async def _wait_for(self, window: int) -> None:
        """Until it is the one after those that steps are made of."""
        async with self._freed:
            await self._freed.wait_for(lambda: window <= self._demand.windows(self._newest).stop)

    def find(self, unit: int, row: int, *, windows: range) -> Chunk | None:
        """The chunk of some windows that a row is in, or comes in; None if it has not been asked for.

        Windows of another epoch may hold the row, too, and be over first.
        """
        for window in windows:
            firsts, chunks = self._chunks.get(window, {}).get(unit, ((), ()))
            place = bisect_right(firsts, row) - 1
            if place >= 0 and row < chunks[place].end:
                return chunks[place]
        return None

    def read(self, chunk: Chunk, start: int, size: int) -> bytes:
        """Bytes of a loaded chunk, by their place in the tar."""
        return os.pread(self._file, size, chunk.place + start - chunk.start)

    async def at(self, *, oldest: int, newest: int) -> None:
        """Steps before `oldest` are made, and those up to `newest` have begun."""
        async with self._freed:
            self._step, self._newest = oldest, newest
            live = self._demand.windows(oldest).start
            for window in [window for window in self._chunks if window < live]:
                for _, chunks in self._chunks.pop(window).values():
                    for chunk in chunks:
                        chunk.over = True
                        if chunk.loaded.done():
                            self._free(chunk)
            self._freed.notify_all()

    async def _load_window(self, group: asyncio.TaskGroup, window: int) -> None:
        for piece in self._demand.pieces(window):
            rows, offsets, sizes = await self._index.piece(piece)
            for found in coalesce(rows, offsets, sizes, most_bytes=CHUNK_BYTES):
                contiguous = int(found.rows[-1]) - int(found.rows[0]) + 1 == len(found.rows)
                if not contiguous or found.size > CHUNK_BYTES:
                    continue
                await self._loading.acquire()
                chunk = await self._begin(window, piece.unit, found)
                if chunk is None:
                    self._loading.release()
                    return
                group.create_task(self._load(chunk))

    async def _begin(self, window: int, unit: int, found: Range) -> Chunk | None:
        """A chunk for a range, as soon as there is a slot; None if the window is over before."""

        def over() -> bool:
            return window < self._demand.windows(self._step).start

        async with self._freed:
            await self._freed.wait_for(lambda: over() or bool(self._slots))
            if over():
                return None
            slot = self._slots.pop()
        first, end = int(found.rows[0]), int(found.rows[-1]) + 1
        loaded = asyncio.get_running_loop().create_future()
        chunk = Chunk(first, end, unit, window, found.start, found.size, slot * CHUNK_BYTES, loaded)
        firsts, chunks = self._chunks.setdefault(window, {}).setdefault(unit, ([], []))
        place = bisect_right(firsts, first)
        firsts.insert(place, first)
        chunks.insert(place, chunk)
        return chunk

    async def _load(self, chunk: Chunk) -> None:
        whole = full = False
        try:
            async with self._requests.turn():
                (data,) = await self._requests.read(chunk.unit, [chunk.start], [chunk.size])
            if len(data) == chunk.size:
                await asyncio.to_thread(_write, self._file, memoryview(data), chunk.place)
                whole = True
        except (OSError, UserError) as error:
            # What steps need of it they read by themselves, and say what is wrong.
            logger.warning("reading ahead: %s", error)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        async with self._freed:
            chunk.loaded.set_result(whole)
            if not whole and not chunk.over:
                self._forget(chunk)
            if chunk.over:  # what is on its way into a slot keeps it until it is there
                self._free(chunk)
        if full:
            await asyncio.sleep(_AGAIN_SECONDS)
        self._loading.release()

    def _forget(self, chunk: Chunk) -> None:
        firsts, chunks = self._chunks[chunk.window][chunk.unit]
        place = chunks.index(chunk)
        del firsts[place], chunks[place]
        chunk.over = True

    def _free(self, chunk: Chunk) -> None:
        self._slots.append(chunk.place // CHUNK_BYTES)
        self._freed.notify_all()


def _write(file: int, view: memoryview, place: int) -> None:
    while view:
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written
