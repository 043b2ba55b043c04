"""What reads ahead of a node's ranks: packs in the order of the steps, windows while they last."""

from __future__ import annotations

import asyncio
import errno
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset.open import ROW, Dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.cache import HandedOver
from pipeline.data.read_ahead.demand import Demand, Places
from pipeline.data.read_ahead.index import Index
from pipeline.data.read_ahead.pack import pack_bytes, pack_name, write_pack
from pipeline.data.read_ahead.ranges import Range, coalesce
from pipeline.data.read_ahead.requests import Requests
from pipeline.data.read_ahead.room import CHUNK_BYTES, FEW_STEPS, share_out
from pipeline.data.read_ahead.source import Source
from pipeline.data.read_ahead.windows import Chunk, Windows

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.005
_HEAD_START_SECONDS = 0.5  # of the first step before the windows
_WRITERS = 2
# obstore reads up to ten side by side for little more work than one; if one fails, all are asked for anew.
_RANGES_AT_ONCE = 5
_TRIES_OF_FULL_DISK = 8
GIB = 2**30

# A sample's bytes, or the chunk that they are in and where they are in the tar.
Part = memoryview | tuple[Chunk, int, int]


@dataclass(frozen=True)
class Share:
    """What one rank reads at one step: (n,) units, rows in them, and their `ROW`s; and of which windows."""

    units: NDArray[np.int64]
    rows: NDArray[np.int64]
    table: NDArray[np.void]
    windows: range


@dataclass(frozen=True)
class Assignment:
    """What the process is to do.

    Args:
        cache: where the node's readers share what they know of the dataset.
        first: the step to begin with.
        depth: steps that are made before the slowest rank has handed over the first of them, at most.
        place: the folder of this start.
        room: bytes in it, at most.
    """

    dataset: Dataset
    demand: Demand
    cache: CachePlace
    first: int
    depth: int
    place: Path
    room: int


class Program:
    """Reads ahead until it is cancelled."""

    def __init__(self, given: Assignment) -> None:
        self._given = given
        self._handed_over = HandedOver(given.place)
        self._index = Index(given.dataset, given.cache)
        source = Source(given.dataset)
        self._requests = Requests(
            lambda unit, starts, sizes: source.read(self._index.shard(unit), starts, sizes)
        )
        self._windows: Windows | None = None
        self._room = given.room
        self._packs: dict[int, int] = {}  # bytes of the packs of each step that are made and not handed over
        self._making: set[int] = set()
        self._changed = asyncio.Condition()
        self._writers = ThreadPoolExecutor(_WRITERS)

    @property
    def requests(self) -> int:
        """How many ranges were asked for so far."""
        return self._requests.sent

    async def run(self) -> None:
        """Make packs to the last step, if there is one, and remove those that are handed over, without end.

        Raises:
            UserError: the dataset is damaged or may not be read, or the cache is too small.
            OSError: reading or writing fails again and again.
        """
        demand, step = self._given.demand, self._given.first
        async with asyncio.TaskGroup() as group:
            group.create_task(self._clear())
            while (places := demand.places(step)) is not None:
                shares = await self._look_up(step, places)
                size = sum(pack_bytes(share.table["size"]) for share in shares)
                windows = await self._divide_room(size, shares) if step == self._given.first else 0
                await self._wait_for_room(step, size)
                made = group.create_task(self._make(step, shares))
                if windows:
                    # What is needed first comes first, sample by sample.
                    await asyncio.wait([made], timeout=_HEAD_START_SECONDS)
                    self._windows = Windows(
                        demand, self._index, self._requests, folder=self._given.place, room=windows
                    )
                    group.create_task(self._windows.run(step))
                step += 1

    async def _look_up(self, step: int, places: list[Places]) -> list[Share]:
        units = np.unique(np.concatenate([units for units, _ in places]))
        known = await self._index.all(units.tolist())
        shares = []
        for of_rank, rows in places:
            table = np.empty(len(rows), ROW)
            for unit in np.unique(of_rank).tolist():
                here = of_rank == unit
                table[here] = known[unit][rows[here]]
            shares.append(Share(of_rank, rows, table, self._given.demand.windows(step)))
        return shares

    async def _divide_room(self, step_bytes: int, shares: list[Share]) -> int:
        """Keep as much of the cache as packs may take; returns what is for windows, if they fit."""
        known = await self._index.all(np.unique(shares[0].units).tolist())
        samples = sum(len(rows) for rows in known.values())
        mean = sum(_extent(rows) for rows in known.values()) / max(samples, 1)
        demand = self._given.demand
        room = share_out(self._given.room, step_bytes=step_bytes, window_bytes=demand.window_rows * mean)
        self._room = room.packs
        if FEW_STEPS * step_bytes > self._room:
            raise UserError(
                f"{FEW_STEPS} steps of this node read {FEW_STEPS * step_bytes / GIB:.3g} GiB, and "
                f"{self._given.place.parent} may hold {self._given.room / GIB:.3g} (run.cache_gib, and half "
                "of what is free): let it hold more, or give run.cache a folder on a larger local disk"
            )
        return room.windows

    async def _wait_for_room(self, step: int, size: int) -> None:
        def fits() -> bool:
            near = step < min(self._handed_over.all()) + self._given.depth
            return near and (not self._packs or sum(self._packs.values()) + size <= self._room)

        async with self._changed:
            await self._changed.wait_for(fits)
            self._packs[step] = size
            self._making.add(step)
        await self._tell_windows(step)

    async def _tell_windows(self, newest: int) -> None:
        if self._windows is not None:
            oldest = min(self._making, default=newest)
            await self._windows.at(oldest=oldest, newest=max([newest, *self._making]))

    async def _clear(self) -> None:
        """Remove what all ranks have handed over, as soon as they have."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            steps = self._handed_over.all()
            over = [step for step in self._packs if step < min(steps) and step not in self._making]
            if not over:
                continue
            async with self._changed:
                for step in over:
                    for number in range(len(steps)):
                        (self._given.place / pack_name(step, number)).unlink(missing_ok=True)
                    del self._packs[step]
                self._changed.notify_all()

    async def _make(self, step: int, shares: list[Share]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, share in enumerate(shares):
                group.create_task(self._make_pack(self._given.place / pack_name(step, number), share))
        async with self._changed:
            self._making.discard(step)
            self._changed.notify_all()
        await self._tell_windows(step)

    async def _make_pack(self, path: Path, share: Share) -> None:
        parts: list[Part] = [memoryview(b"")] * len(share.units)
        by_unit = np.argsort(share.units, kind="stable")
        cuts = np.flatnonzero(np.diff(share.units[by_unit])) + 1
        async with asyncio.TaskGroup() as group:
            for here in np.split(by_unit, cuts):
                if len(here):
                    group.create_task(self._gather(share, here, parts))
        await self._publish(path, share.table, parts)

    async def _publish(self, path: Path, table: NDArray[np.void], parts: list[Part]) -> None:
        loop = asyncio.get_running_loop()
        for tries in range(_TRIES_OF_FULL_DISK):
            try:
                return await loop.run_in_executor(self._writers, self._write, path, table, parts)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                trouble = error
                await asyncio.sleep(tries)
        raise UserError(
            f"{path.parent} is on a disk that is full ({trouble}): free some space there, or give run.cache "
            "a folder on another one"
        )

    async def _gather(self, share: Share, here: NDArray[np.int64], parts: list[Part]) -> None:
        """Get the samples of one unit, which are at `here` in the share: those of chunks, and the others."""
        coming: dict[Chunk, list[int]] = {}
        alone = []
        for place in here.tolist():
            chunk = self._find(share, place)
            if chunk is None:
                alone.append(place)
            else:
                coming.setdefault(chunk, []).append(place)
        async with asyncio.TaskGroup() as group:
            self._ask(group, share, alone, parts)
            for chunk, places in coming.items():
                if await asyncio.shield(chunk.loaded):
                    self._take(chunk, share, places, parts)
                else:
                    self._ask(group, share, places, parts)

    def _ask(self, group: asyncio.TaskGroup, share: Share, places: list[int], parts: list[Part]) -> None:
        """Read samples of one unit from the store, neighbours together."""
        table = share.table[places]
        offsets, sizes = table["offset"].astype(np.int64), table["size"].astype(np.int64)
        ranges = coalesce(np.array(places, np.int64), offsets, sizes, most_bytes=CHUNK_BYTES)
        while some := list(islice(ranges, _RANGES_AT_ONCE)):
            group.create_task(self._from_store(share, some, parts))

    async def _from_store(self, share: Share, ranges: list[Range], parts: list[Part]) -> None:
        unit = int(share.units[ranges[0].rows[0]])
        async with self._requests.turn(len(ranges)):
            if self._windows is not None:
                ranges = [found for found in ranges if not self._has_come(share, found, parts)]
            if not ranges:
                return
            starts, sizes = [found.start for found in ranges], [found.size for found in ranges]
            answers = await self._requests.read(unit, starts, sizes)
        for found, answer in zip(ranges, answers, strict=True):
            data, places = memoryview(answer), found.rows.tolist()
            for place, (offset, size, *_) in zip(places, share.table[places].tolist(), strict=True):
                parts[place] = data[offset - found.start : offset - found.start + size]

    def _has_come(self, share: Share, found: Range, parts: list[Part]) -> bool:
        """Whether a sample has meanwhile come with its neighbours; then it is taken."""
        places = found.rows.tolist()
        chunk = self._find(share, places[0]) if len(places) == 1 else None
        if chunk is None or not chunk.loaded.done() or not chunk.loaded.result():
            return False
        self._take(chunk, share, places, parts)
        return True

    def _find(self, share: Share, place: int) -> Chunk | None:
        if self._windows is None:
            return None
        return self._windows.find(int(share.units[place]), int(share.rows[place]), windows=share.windows)

    @staticmethod
    def _take(chunk: Chunk, share: Share, places: list[int], parts: list[Part]) -> None:
        for place, (offset, size, *_) in zip(places, share.table[places].tolist(), strict=True):
            parts[place] = (chunk, offset, size)

    def _write(self, path: Path, table: NDArray[np.void], parts: list[Part]) -> None:
        data: list[bytes | memoryview] = []
        for part in parts:
            if isinstance(part, memoryview):
                data.append(part)
            else:
                assert self._windows is not None
                data.append(self._windows.read(*part))
        write_pack(path, table["slot"], table["sha256"], data)


def _extent(rows: NDArray[np.void]) -> int:
    """Bytes of the tar from a unit's first sample to its last."""
    return int((rows["offset"] + rows["size"]).max() - rows["offset"].min()) if len(rows) else 0
