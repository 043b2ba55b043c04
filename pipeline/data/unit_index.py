"""What a reader needs of each unit's samples, made once per node and mapped by all its readers.

A unit's metadata is a Parquet file, of which each worker of each rank would parse the same columns, and keep
them: 3 ms and 1 MB for 16,384 samples, times a thousand units, times 64 workers. Here the first to need a
unit writes them as an array to a folder of the node, and the others map it, which costs 0.4 ms and no memory
of their own. Unit by unit, for all units of a billion samples would be 52 GB.
"""

import logging
import zlib
from collections import OrderedDict
from collections.abc import Container

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.dataset.open import ROW, Dataset
from pipeline.data.node_cache import CachePlace, NodeCache

logger = logging.getLogger(__name__)
# Names the layout, too: a file of another layout is made anew.
_MAGIC = b"rows%04d" % ROW.itemsize
_HEADER = len(_MAGIC) + 4
# The kernel grants a process 65,530 mappings (vm.max_map_count), of which libraries and malloc need some. A
# unit beyond is mapped again each time that it is needed.
_MOST_MAPPED = 30_000
# Without a folder, all units of a batch of 1,024: up to 0.9 GB, of units of 16,384 samples.
_MOST_PRIVATE = 1_024


class UnitIndex:
    """The rows of a dataset's units.

    Args:
        cache: where the node's processes share them. A folder that cannot be written to is one warning, and
            this process keeps rows in its own memory.

    Raises:
        UserError: see `NodeCache`.
    """

    def __init__(self, dataset: Dataset, cache: CachePlace) -> None:
        self._dataset = dataset
        self._kept: OrderedDict[int, NDArray[np.void]] = OrderedDict()
        self._seen_through = "" if dataset.view is None else f"-{dataset.view.digest}"
        self._cache: NodeCache | None = None
        self._writable = True
        try:
            self._cache = NodeCache(cache, "units")
        except OSError as error:
            self._warn(error)

    def __contains__(self, unit_index: int) -> bool:
        """Whether the unit's rows are at hand, without any reading."""
        return unit_index in self._kept

    def rows(self, unit_index: int) -> NDArray[np.void]:
        """The unit's samples in slot order, those in the view: (n,) `ROW`, read-only if others share it.

        Raises:
            UserError, OSError: as `Dataset.unit_rows`.
        """
        # One act: another thread may forget the same unit.
        rows = self._kept.pop(unit_index, None)
        if rows is None:
            rows = self._mapped(unit_index)
        if rows is None:
            made = self._made(unit_index)
            rows = self._mapped(unit_index)
            rows = made if rows is None else rows
        self._kept[unit_index] = rows
        while len(self._kept) > (_MOST_MAPPED if self._writable else _MOST_PRIVATE):
            self._kept.popitem(last=False)
        return rows

    def ensure(self, unit_index: int) -> None:
        """See to it that `rows` will find the unit's rows on this node; keeps nothing.

        Raises:
            UserError, OSError: as `Dataset.unit_rows`.
        """
        if unit_index in self._kept or self._cache is None or not self._writable:
            return
        if not self._cache.touch(self._name(unit_index)):
            self._made(unit_index)

    def keep(self, units: Container[int]) -> None:
        """Forget the rows of all other units."""
        for unit_index in [unit_index for unit_index in self._kept if unit_index not in units]:
            del self._kept[unit_index]

    def _name(self, unit_index: int) -> str:
        """By content: datasets that share a unit share its rows, and nothing changes under a name."""
        return self._dataset.files.meta_sha256(unit_index).hex() + self._seen_through

    def _made(self, unit_index: int) -> NDArray[np.void]:
        """The rows from the dataset's metadata, written for others."""
        rows = self._dataset.unit_rows(unit_index)
        if self._cache is not None and self._writable:
            name, data = self._name(unit_index), rows.view(np.uint8).data
            try:
                self._cache.write(name, [_MAGIC, _checksum(name, data), data])
            except OSError as error:
                self._warn(error)
        return rows

    def _mapped(self, unit_index: int) -> NDArray[np.void] | None:
        """The rows as some process of this node wrote them; None unless they are there, whole and sound."""
        if self._cache is None:
            return None
        name = self._name(unit_index)
        self._cache.touch(name)
        try:
            # Arrow closes the file and keeps the mapping; Python's mmap would keep a descriptor for each.
            with pa.memory_map(str(self._cache.path(name))) as file:
                data = memoryview(file.read_buffer()).cast("B")
        except (OSError, pa.ArrowException):
            return None
        count = int(self._dataset.counts[unit_index])
        sound = (
            len(data) == _HEADER + count * ROW.itemsize
            and data[: len(_MAGIC)] == _MAGIC
            and data[len(_MAGIC) : _HEADER] == _checksum(name, data[_HEADER:])
        )
        return np.frombuffer(data, ROW, count, _HEADER) if sound else None

    def _warn(self, error: OSError) -> None:
        self._writable = False
        logger.warning(
            "%s: readers of this node cannot share what they know of units, each keeps it in its own memory",
            error,
        )


def _checksum(name: str, data: memoryview) -> bytes:
    """Against torn and mixed-up files, not against people: the folder is private."""
    return zlib.crc32(data, zlib.crc32(name.encode())).to_bytes(4, "little")
