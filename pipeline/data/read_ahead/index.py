"""Where the samples of units are, for a process that looks up many units at a time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ingest.dataset.open import Dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.demand import Piece
from pipeline.data.unit_index import UnitIndex

_AT_ONCE = 32
# Of which some may be mapped no more, but at hand on this node.
_KEPT = 4096


class Index:
    """The rows of a dataset's units, looked up side by side; keeps those used last."""

    def __init__(self, dataset: Dataset, cache: CachePlace) -> None:
        self._dataset = dataset
        self._index = UnitIndex(dataset, cache)
        self._shards: dict[int, str] = {}
        self._naming = Lock()  # names come in blocks, which are read once
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._units: OrderedDict[int, asyncio.Future[NDArray[np.void]]] = OrderedDict()

    async def rows(self, unit: int) -> NDArray[np.void]:
        """ROW of each sample of a unit."""
        found = self._units.get(unit)
        if found is None:
            loop = asyncio.get_running_loop()
            found = self._units[unit] = asyncio.ensure_future(
                loop.run_in_executor(self._pool, self._look_up, unit)
            )
            while len(self._units) > _KEPT:
                self._units.popitem(last=False)
        else:
            self._units.move_to_end(unit)
        return await asyncio.shield(found)

    async def all(self, units: Iterable[int]) -> dict[int, NDArray[np.void]]:
        """`rows` of each of some units, read together."""
        units = list(units)
        return dict(zip(units, await asyncio.gather(*map(self.rows, units)), strict=True))

    def shard(self, unit: int) -> str:
        """Name of the tar of a unit whose rows were looked up; see `home_of`."""
        return self._shards[unit]

    def _look_up(self, unit: int) -> NDArray[np.void]:
        with self._naming:
            self._shards[unit] = self._dataset.files.name(unit, "shard")
            self._dataset.files.meta_sha256(unit)
        return self._index.rows(unit)

    async def piece(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Numbers, offsets and sizes of a piece's rows."""
        rows = (await self.rows(piece.unit))[piece.first : piece.end]
        return (
            np.arange(piece.first, piece.end),
            rows["offset"].astype(np.int64),
            rows["size"].astype(np.int64),
        )
